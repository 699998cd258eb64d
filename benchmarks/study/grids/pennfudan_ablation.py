# What in UBN helps, where and how. Runs that pennfudan.py has too are done once where both studies
# share a --work-dir.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
baseline = 'BN'
seeds = [0, 1, 2, 3, 4]
_off = dict(type='UBN', condensation_threshold=None)
_rectifiers = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
_norms = {
    'BN': dict(type='BN'),
    'UBN, threshold off': _off,
    'neighbourhood alone': dict(_off, centering=False, scaling=False),
    'centering and scaling': dict(_off, affine_kernel=1),
    'score of BN': dict(
        type='UBN', affine_kernel=1, centering=False, scaling=False, condensation_threshold=1.0
    ),
    'score of UBN': dict(type='UBN', condensation_threshold=1.0),
    'threshold 0.4': dict(type='UBN', condensation_threshold=0.4, warmup=50),
    'threshold 0.8': dict(type='UBN', condensation_threshold=0.8, warmup=50),
    'threshold 0.6, freeze': dict(type='UBN', condensation_threshold=0.6, warmup=50),
    'neighbourhood 5 alone': dict(_off, centering=False, scaling=False, affine_kernel=5),
    'centering alone': dict(_off, affine_kernel=1, scaling=False),
    'scaling alone': dict(_off, affine_kernel=1, centering=False),
}
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places}
    for name, norm in _norms.items()
}
settings['backbone only'] = dict(
    settings['BN'], **{'model.backbone.norm_cfg': dict(_off, _delete_=True)}
)
settings['without gain'] = {
    **settings['UBN, threshold off'],
    'optim_wrapper.paramwise_cfg': dict(custom_keys={n: dict(lr_mult=0.1) for n in _rectifiers}),
}
settings['without decay'] = {
    **settings['UBN, threshold off'],
    'optim_wrapper.paramwise_cfg': dict(custom_keys={n: dict(decay_mult=0) for n in _rectifiers}),
}
# What UBN's time is worth to BN, and a larger step to both.
settings['BN, 4/3 of the iterations'] = {
    **settings['BN'],
    'train_cfg': dict(max_iters=320, val_interval=40),
    'default_hooks.checkpoint.interval': 320,
    'param_scheduler.1.end': 320,
    'param_scheduler.1.T_max': 290,
}
for _name in ('BN', 'UBN, threshold off'):
    settings[f'{_name}, twice the learning rate'] = {
        **settings[_name],
        'optim_wrapper.optimizer.lr': 2e-3,
    }
evaluations = {
    'batch of 2': {'test_dataloader.batch_size': 2},
    'padded to 64': {'model.data_preprocessor.pad_size_divisor': 64},
    'padded to 256': {'model.data_preprocessor.pad_size_divisor': 256},
}

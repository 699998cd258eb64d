# Which norm: Penn-Fudan from scratch, 240 iterations of four images.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
baseline = 'BN'
seeds = [0, 1, 2, 3, 4]
_norms = dict(
    BN=dict(type='BN'),
    **{
        # The defaults, spelled out.
        'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
        'UBN, threshold 0.6': dict(type='UBN', condensation_threshold=0.6, warmup=50),
    },
    GN=dict(type='GN', num_groups=8),
    RBN=dict(type='UBN', affine_kernel=1, condensation_threshold=None),
)
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places}
    for name, norm in _norms.items()
}
# As published: its parameters at the learning rate of all others.
settings['RBN']['optim_wrapper.paramwise_cfg'] = dict(
    custom_keys={k: dict(lr_mult=0.1) for k in ('center_weight', 'scale_weight', 'scale_bias')}
)
# What the padding of batch mates, and more of it, does to the final weights.
evaluations = {
    'batch of 2': {'test_dataloader.batch_size': 2},
    'padded to 64': {'model.data_preprocessor.pad_size_divisor': 64},
    'padded to 256': {'model.data_preprocessor.pad_size_divisor': 256},
}

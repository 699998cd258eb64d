# SGD in place of AdamW: the gain of the rectifiers does nothing there.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
baseline = 'BN, rate of 0.05'
seeds = [0, 1, 2, 3, 4]
_norms = {
    'BN': dict(type='BN'),
    'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
}
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    f'{name}{end}': {
        'optim_wrapper.optimizer': dict(
            type='SGD', lr=lr, momentum=0.9, weight_decay=1e-4, _delete_=True
        ),
        **{f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places},
    }
    for name, norm in _norms.items()
    for end, lr in (('', 0.02), (', rate of 0.05', 0.05), (', rate of 0.1', 0.1))
}
_rectifiers = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
settings['UBN 10 times as fast, rate of 0.05'] = {
    **settings['UBN, threshold off, rate of 0.05'],
    'optim_wrapper.paramwise_cfg': dict(custom_keys={n: dict(lr_mult=10) for n in _rectifiers}),
}
settings['neighbourhood 10 times as fast, rate of 0.05'] = {
    **settings['UBN, threshold off, rate of 0.05'],
    'optim_wrapper.paramwise_cfg': dict(custom_keys={'neighbour_weight': dict(lr_mult=10)}),
}

# 2 images a step.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
baseline = 'BN'
seeds = [0, 1, 2, 3, 4]
_norms = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=8),
    'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
    'UBN, threshold 0.6': dict(type='UBN', condensation_threshold=0.6, warmup=50),
    'score of BN': dict(
        type='UBN', affine_kernel=1, centering=False, scaling=False, condensation_threshold=1.0
    ),
}
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {
        'train_dataloader.batch_size': 2,
        **{f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places},
    }
    for name, norm in _norms.items()
}

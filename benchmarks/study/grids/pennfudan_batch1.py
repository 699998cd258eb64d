# One image a step, where the statistics of a batch are poor. A score needs two.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
baseline = 'BN'
seeds = [0, 1, 2, 3, 4]
_norms = dict(
    BN=dict(type='BN'),
    GN=dict(type='GN', num_groups=8),
    **{'UBN, threshold off': dict(type='UBN', condensation_threshold=None)},
)
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {
        'train_dataloader.batch_size': 1,
        **{f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places},
    }
    for name, norm in _norms.items()
}

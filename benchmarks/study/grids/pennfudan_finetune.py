# From a backbone with BN that generated.py has trained: how to go on, for half of the iterations.
config = '../mask-rcnn_r18-small_fpn_pennfudan-finetune.py'
baseline = 'BN, frozen'
seeds = [0, 1, 2, 3, 4]
_norms = {
    'BN, frozen': (dict(type='BN', requires_grad=False), True),
    'BN, trained': (dict(type='BN'), False),
    'UBN, trained': (dict(type='UBN', condensation_threshold=None), False),
    'UBN, statistics frozen': (dict(type='UBN', condensation_threshold=None), True),
}
settings = {
    name: {
        'model.backbone.norm_cfg': dict(norm, _delete_=True),
        'model.backbone.norm_eval': norm_eval,
        # New layers train in any case.
        'model.neck.norm_cfg': dict(norm, requires_grad=True, _delete_=True),
        'model.roi_head.mask_head.norm_cfg': dict(norm, requires_grad=True, _delete_=True),
    }
    for name, (norm, norm_eval) in _norms.items()
}

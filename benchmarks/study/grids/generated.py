# A reduced grid that any clone can run: the generated data set in work_dirs/study/data.
config = '../mask-rcnn_r18-small-scratch_fpn_generated.py'
baseline = 'BN'
seeds = [0, 1]
# The defaults, spelled out: old runs are told by their settings.
_norms = dict(BN=dict(type='BN'), UBN=dict(type='UBN', condensation_threshold=None))
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places}
    for name, norm in _norms.items()
}
# pennfudan_finetune.py starts from one.
checkpoint = True

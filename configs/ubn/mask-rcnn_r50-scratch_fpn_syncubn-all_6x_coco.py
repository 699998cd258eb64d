_base_ = ['mmdet::scratch/mask-rcnn_r50-scratch_fpn_gn-all_6x_coco.py', '../_base_/ubn.py']
norm_cfg = dict(_delete_=True, type='SyncUBN', requires_grad=True)
model = dict(
    # From scratch nothing is worth keeping fixed, the statistics least of all.
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
default_hooks = _base_.ubn_hooks

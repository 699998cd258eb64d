_base_ = ['./mask-rcnn_r18-scratch_fpn_bn_400i_pennfudan.py', '../_base_/ubn.py']
norm_cfg = dict(type='UBN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(mask_head=dict(norm_cfg=norm_cfg)),
)
default_hooks = _base_.ubn_hooks

# What the twins in configs/norm_comparison share: Mask R-CNN with norms in backbone, neck and
# heads, whose statistics train. They differ in norm_cfg, and in the weights that a norm can start
# from.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    './ubn.py',
]
default_hooks = _base_.ubn_hooks
model = dict(
    backbone=dict(norm_eval=False),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256),
    ),
)

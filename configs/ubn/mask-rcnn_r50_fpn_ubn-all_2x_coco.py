_base_ = ['mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py', '../_base_/ubn.py']
# num_groups of the base config's GN has to go.
norm_cfg = dict(_delete_=True, type='SyncUBN', requires_grad=True)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        norm_cfg=norm_cfg,
        # Statistics and gate of UBN work only while they train.
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
default_hooks = _base_.ubn_hooks

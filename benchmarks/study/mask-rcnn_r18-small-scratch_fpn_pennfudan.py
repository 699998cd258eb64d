# The recipe of the study: as small as it can be and still tell norms apart, for a core a run.
_base_ = [
    '../../configs/_base_/mask-rcnn_r18-scratch_fpn.py',
    '../../configs/_base_/coco_instance_small.py',
    '../../configs/_base_/schedule_400i.py',
]
num_classes = 1
model = dict(
    backbone=dict(base_channels=24),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=48),
    rpn_head=dict(in_channels=48, feat_channels=48),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=48, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=48, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(in_channels=48, conv_out_channels=48, num_convs=2, num_classes=num_classes),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=64), rcnn=dict(sampler=dict(num=32))
    ),
    test_cfg=dict(rpn=dict(nms_pre=150, max_per_img=32), rcnn=dict(max_per_img=20)),
)

scale = (192, 136)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
# Loading in the process itself: a run has one core.
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(loading, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(loading, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# A larger step than that of the larger model, and fewer of them.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
max_iters = 240
train_cfg = dict(max_iters=max_iters, val_interval=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=max_iters, T_max=max_iters - 30),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters))
log_processor = dict(window_size=10)

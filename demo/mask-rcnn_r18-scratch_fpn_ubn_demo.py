# demo.py puts in the data set, its classes and the folder of the run.
_base_ = [
    '../configs/_base_/mask-rcnn_r18-scratch_fpn.py',
    '../configs/_base_/coco_instance_small.py',
    '../configs/_base_/schedule_400i.py',
    '../configs/_base_/ubn.py',
]
# With a gate, for the picture of its work.
norm_cfg = dict(type='UBN', condensation_threshold=0.6)
# Half the channels, and two samples per RoI bin instead of as many as a large region has pixels:
# the demo is to take minutes on a CPU.
model = dict(
    backbone=dict(base_channels=32, norm_cfg=norm_cfg),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, norm_cfg=norm_cfg),
    # Objects of 20 pixels are common in images of 224.
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(
            in_channels=64,
            fc_out_channels=512,
            # One regressor for all classes learns from all objects.
            reg_class_agnostic=True,
            loss_bbox=dict(loss_weight=2.0),
        ),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=96, pos_fraction=0.4)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

data_root = 'work_dirs/demo/data/'
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (224, 224)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (224, 224)
train_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# A larger step than the recipe's: there are few of them.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=100)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=max_iters, T_max=max_iters - 30),
]
default_hooks = dict(_base_.ubn_hooks, logger=dict(interval=20), checkpoint=dict(interval=100))
log_processor = dict(window_size=20)
randomness = dict(seed=0)

# Random crops of 0.6 of each side, so that batches of one image differ in more than a flip.
_base_ = './mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
custom_imports = dict(
    imports=['condensed_stream', 'norm_peers', 'ubn_det'], allow_failed_imports=False
)
train_pipeline = _base_.train_pipeline
train_pipeline.insert(
    2,
    dict(
        type='RandomCrop',
        crop_type='relative_range',
        crop_size=(0.6, 0.6),
        allow_negative_crop=True,
    ),
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
# Once, at the end.
train_cfg = dict(val_interval=240)

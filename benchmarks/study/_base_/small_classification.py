# What the small studies of norms in classification share.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(
    imports=['small_classification', 'condensed_stream', 'norm_peers', 'ubn_det'],
    allow_failed_imports=False,
)
default_scope = 'mmengine'
model = dict(type='SmallResNet', norm_cfg=dict(type='BN'))
# Loading in the process itself: a run has one core.
loading = dict(num_workers=0, collate_fn=dict(type='default_collate'))
train_dataloader = dict(loading, sampler=dict(type='InfiniteSampler'))
val_dataloader = dict(loading, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='ImageAccuracy')
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop')
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    _delete_=True,
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
visualizer = dict(_delete_=True, type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(type='LogProcessor', window_size=10, by_epoch=False)

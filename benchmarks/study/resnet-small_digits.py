# Handwritten digits from few examples: a classification check of a minute a norm.
_base_ = './_base_/small_classification.py'
model = dict(in_channels=1, channels=(16, 32))
train_dataloader = dict(batch_size=4, dataset=dict(type='Digits', end=200))
val_dataloader = dict(batch_size=50, dataset=dict(type='Digits', start=200))
test_dataloader = val_dataloader
val_evaluator = dict(prefix='digits')
test_evaluator = val_evaluator
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=50)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=max_iters, T_max=max_iters)
]
default_hooks = dict(checkpoint=dict(interval=max_iters))

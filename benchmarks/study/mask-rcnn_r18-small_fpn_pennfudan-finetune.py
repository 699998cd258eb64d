_base_ = './mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/study/generated/bn/seed0/iter_240.pth',
            prefix='backbone.',
        )
    )
)
max_iters = 120
train_cfg = dict(max_iters=max_iters, val_interval=15)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=15),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=15, end=max_iters, T_max=max_iters - 15),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))

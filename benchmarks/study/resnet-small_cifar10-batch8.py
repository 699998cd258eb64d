# One epoch of eight images a step.
_base_ = './resnet-small_cifar10.py'
batch_size = 8
max_iters = 10_000 // batch_size
# As large a step for an image as with 64.
lr = 0.1 * batch_size / 64
train_dataloader = dict(batch_size=batch_size)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters, dynamic_intervals=None)
optim_wrapper = dict(optimizer=dict(lr=lr))
param_scheduler = [dict(type='OneCycleLR', by_epoch=False, eta_max=lr, total_steps=max_iters)]
default_hooks = dict(checkpoint=dict(interval=max_iters), logger=dict(interval=10))
log_processor = dict(window_size=10)

# CIFAR-10, reduced: three epochs of 10,000 images, a minute for BN on a core.
_base_ = './_base_/small_classification.py'
data_root = 'data/'
archive = dict(type='CIFAR10', archive='cifar10.tar.xz', data_root=data_root)
num_train = 10_000
batch_size = 64
max_iters = 3 * num_train // batch_size
model = dict(
    in_channels=3,
    channels=(16, 32, 64),
    data_preprocessor=dict(
        type='ImgDataPreprocessor', mean=(125.3, 123.0, 113.9), std=(51.6, 50.8, 51.3)
    ),
)
train_dataloader = dict(
    batch_size=batch_size, dataset=dict(archive, split='train', end=num_train, augment=True)
)
val_dataloader = dict(batch_size=250, dataset=dict(archive, split='test'))
test_dataloader = val_dataloader
val_evaluator = dict(prefix='cifar10')
test_evaluator = val_evaluator
# At a quarter, at half and at the end: every quarter, and from the first one on every half.
quarter = max_iters // 4
train_cfg = dict(
    max_iters=max_iters, val_interval=quarter, dynamic_intervals=[(quarter + 2, 2 * quarter)]
)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4)
)
param_scheduler = [dict(type='OneCycleLR', by_epoch=False, eta_max=0.1, total_steps=max_iters)]
# The last log is that of the last iteration.
default_hooks = dict(checkpoint=dict(interval=max_iters), logger=dict(interval=12))
log_processor = dict(window_size=12)

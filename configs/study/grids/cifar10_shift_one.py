# A lasting shift that gates notice: from the middle of the training on, every batch is of one
# image. The rule of decision is that of cifar10_shift.py.
_base_ = './cifar10_shift.py'
settings = {
    name: {'train_dataloader.batch_sampler': dict(images=1)}
    for name in ('BN', 'UBN, threshold off', 'UBN, threshold auto')
}

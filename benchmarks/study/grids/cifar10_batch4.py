# Four images a step, the rest as in cifar10_batch8.py, whose rules of decision hold here too.
_base_ = './cifar10_batch8.py'
config = '../resnet-small_cifar10-batch4.py'
settings = {
    name: {'train_dataloader.batch_sampler': dict(num_batches=10_000 // 4)}
    for name in _base_.settings
}

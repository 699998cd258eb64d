# What a threshold costs at four images a step, and what it protects where the last 10 batches are
# of one image each. The rules of decision are those of cifar10_ordinary.py and
# cifar10_condensed_last.py, a loss being that within this file.
config = '../resnet-small_cifar10-batch4.py'
baseline = 'BN'
seeds = [5, 6, 7, 8, 9]
_num_batches = 10_000 // 4
_norms = {
    'BN': dict(type='BN'),
    'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
    'UBN, threshold auto': dict(type='UBN', condensation_threshold='auto', warmup=50),
}
settings = {
    f'{name}{stream}': {
        'model.norm_cfg': dict(norm, _delete_=True),
        'train_dataloader.batch_sampler': dict(
            type='CondensedBatchSampler', num_batches=_num_batches, last=last
        ),
    }
    for stream, last in (('', 0), (', last 10 condensed', 10))
    for name, norm in _norms.items()
}

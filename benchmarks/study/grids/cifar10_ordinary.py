# What a threshold costs where no batch is condensed. cifar10_condensed_last.py and
# cifar10_condensed_fifth.py are the same settings on streams that are.
#
# Decided before the first run, on seeds that no setting was chosen on. Compared is the accuracy on
# the test images at the end, in points: paired differences of the five seeds, their mean and its
# 95 % interval of Student's t.
# A threshold costs nothing where the interval of its difference to 'UBN, threshold off' contains
# 0, which is reported with its half-width, and where at most 1 % of the batches after the warm-up
# were closed, over all layers and seeds.
config = '../resnet-small_cifar10.py'
baseline = 'BN'
seeds = [5, 6, 7, 8, 9]
_bn = dict(type='UBN', centering=False, scaling=False, affine_kernel=1, warmup=50)
_norms = {
    'BN': dict(type='BN'),
    'BN, momentum 0.01': dict(type='BN', momentum=0.01),
    'BN, precise statistics': dict(type='BN'),
    'Batch Renormalization': dict(type='BatchRenorm', num_batches=468),
    'GN': dict(type='GN', num_groups=4),
    # The defaults of the threshold, spelled out.
    'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
    'UBN, threshold 0.6': dict(type='UBN', condensation_threshold=0.6, warmup=50),
    'UBN, threshold auto': dict(type='UBN', condensation_threshold='auto', warmup=50),
    # The threshold on BN, and gates of other signals.
    'BN, threshold 0.6': dict(_bn, condensation_threshold=0.6),
    'BN, threshold auto': dict(_bn, condensation_threshold='auto'),
    'BN, distance gate': dict(type='DistanceGatedBN'),
    'BN, score and distance gate': dict(type='DistanceGatedBN', score=True),
}
settings = {name: {'model.norm_cfg': dict(norm, _delete_=True)} for name, norm in _norms.items()}
# From the batches that a new loader on the same stream begins with.
settings['BN, precise statistics']['custom_hooks'] = [
    dict(type='PreciseStatisticsHook', num_batches=100)
]

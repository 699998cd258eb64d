# What a threshold costs in detection where no batch is condensed; pennfudan_condensed_last.py is
# the same settings on a stream that is.
#
# Decided before the first run, on seeds that no setting was chosen on. Compared is the mean of box
# and mask mAP on the test images at the end, in points: paired differences of the five seeds,
# their mean and its 95 % interval of Student's t.
# A threshold costs nothing where the interval of its difference to 'UBN, threshold off' contains
# 0, which is reported with its half-width, and where at most 1 % of the batches after the warm-up
# were closed, over all layers and seeds.
config = '../mask-rcnn_r18-small-scratch_fpn_pennfudan-crops.py'
baseline = 'BN'
seeds = [5, 6, 7, 8, 9]
_norms = {
    'BN': dict(type='BN'),
    'BN, momentum 0.01': dict(type='BN', momentum=0.01),
    'BN, precise statistics': dict(type='BN'),
    'Batch Renormalization': dict(type='BatchRenorm', num_batches=240),
    'GN': dict(type='GN', num_groups=8),
    # The defaults of the threshold, spelled out.
    'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
    'UBN, threshold 0.6': dict(type='UBN', condensation_threshold=0.6, warmup=50),
    'UBN, threshold auto': dict(type='UBN', condensation_threshold='auto', warmup=50),
}
_places = ('backbone', 'neck', 'roi_head.mask_head')
settings = {
    name: {f'model.{place}.norm_cfg': dict(norm, _delete_=True) for place in _places}
    for name, norm in _norms.items()
}
# From the batches that a new loader on the same stream begins with.
settings['BN, precise statistics']['custom_hooks'] = [
    dict(type='PreciseStatisticsHook', num_batches=100)
]

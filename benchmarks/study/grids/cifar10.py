# Which norm in classification, and what of UBN does it: CIFAR-10, three epochs of 10,000 images.
#
# Decided before the first run, on seeds that no setting was chosen on. Compared is the accuracy on
# the test images, in points, of each setting with BN: paired differences of the five seeds, their
# mean and its 95 % interval of Student's t.
# UBN is better than BN where the lower end is above 0. The aim is a lower end above +3.0 at a
# quarter of the schedule and above +1.0 at its end, at equal iterations. At equal time, it has to
# be above BN trained for as many iterations as take as long, which is a grid of its own.
# A part is worth its cost where the lower end of UBN less UBN without that part is above 0.
config = '../resnet-small_cifar10.py'
baseline = 'BN'
seeds = [5, 6, 7, 8, 9]
_off = dict(type='UBN', condensation_threshold=None)
_norms = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=4),
    'UBN, threshold off': _off,
    'neighbourhood alone': dict(_off, centering=False, scaling=False),
    'centering and scaling': dict(_off, affine_kernel=1),
    'centering alone': dict(_off, affine_kernel=1, scaling=False),
    'scaling alone': dict(_off, affine_kernel=1, centering=False),
}
settings = {name: {'model.norm_cfg': dict(norm, _delete_=True)} for name, norm in _norms.items()}

# Which norm in classification: handwritten digits, 200 to learn from and 1597 to test on.
config = '../resnet-small_digits.py'
baseline = 'BN'
seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
settings = {
    name: {'model.norm_cfg': dict(norm, _delete_=True)}
    for name, norm in {
        'BN': dict(type='BN'),
        'GN': dict(type='GN', num_groups=4),
        'UBN, threshold off': dict(type='UBN', condensation_threshold=None),
        'UBN, threshold 0.6': dict(type='UBN', condensation_threshold=0.6, warmup=50),
        'UBN, rectifiers alone': dict(type='UBN', affine_kernel=1, condensation_threshold=None),
        'UBN, neighbourhood alone': dict(
            type='UBN', centering=False, scaling=False, condensation_threshold=None
        ),
    }.items()
}

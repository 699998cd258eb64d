# A fifth of all batches, at random places, are of one image each.
#
# Decided before the first run, on seeds that no setting was chosen on. Compared is the accuracy on
# the test images at the end, in points: paired differences of the five seeds, their mean and its
# 95 % interval of Student's t.
# A threshold protects where the lower end of its difference to BN is above 0 and the upper end of
# its difference to 'UBN, threshold off' is not below 0.
# Precise statistics are those of this stream: a fifth of their batches is condensed.
_base_ = './cifar10_ordinary.py'
settings = {
    name: {
        'train_dataloader.batch_sampler': dict(
            type='CondensedBatchSampler', num_batches=468, fraction=0.2
        )
    }
    for name in _base_.settings
}

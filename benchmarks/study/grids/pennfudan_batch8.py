# Eight images a step, the rest as with two.
_base_ = './pennfudan_batch2.py'
settings = {name: {'train_dataloader.batch_size': 8} for name in _base_.settings}

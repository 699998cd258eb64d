_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
custom_imports = dict(imports=['ubn_det'], allow_failed_imports=False)
default_hooks = dict(condensation=dict(type='CondensationHook'))
model = dict(backbone=dict(norm_cfg=dict(type='UBN')))

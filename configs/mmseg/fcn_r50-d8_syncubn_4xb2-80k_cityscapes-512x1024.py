_base_ = 'mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['ubn_det'], allow_failed_imports=False)
default_hooks = dict(condensation=dict(type='CondensationHook'))
norm_cfg = dict(type='SyncUBN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)

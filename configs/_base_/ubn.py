# Turns any config over to UBN. Another config says, whatever its detector is:
#     _base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/ubn.py']
#     model = dict(_base_.ubn, model_type=_base_.model.type)
#     default_hooks = _base_.ubn_hooks
# A config that sets norm_cfg where the norms are needs the registration and the hooks only.
custom_imports = dict(imports=['ubn_det'], allow_failed_imports=False)
ubn = dict(
    type='WithUBN',
    # BN becomes UBN and SyncBN SyncUBN; type='SyncUBN' makes all of them that.
    norm_cfg=dict(),
    # Statistics and gate of UBN work only while they train.
    backbone=dict(norm_eval=False),
)
# The checks and curves. Not custom_hooks: bases of one config must not share a key, and some
# detectors have hooks of their own there.
ubn_hooks = dict(condensation=dict(type='CondensationHook'))

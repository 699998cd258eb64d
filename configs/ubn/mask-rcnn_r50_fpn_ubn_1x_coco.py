_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/ubn.py']
model = dict(
    backbone=dict(
        norm_cfg=dict(type='UBN', requires_grad=True),
        # The base config keeps pretrained statistics fixed; those of UBN, and its gate, work only
        # while they train. The stem and the first stage stay frozen as in the base config: there
        # UBN is the pretrained BN.
        norm_eval=False,
    )
)
default_hooks = _base_.ubn_hooks

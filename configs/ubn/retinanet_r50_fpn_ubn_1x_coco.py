_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/ubn.py']
model = dict(_base_.ubn, model_type=_base_.model.type)
default_hooks = _base_.ubn_hooks

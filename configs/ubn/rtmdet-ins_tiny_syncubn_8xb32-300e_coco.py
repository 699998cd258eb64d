_base_ = ['mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', '../_base_/ubn.py']
model = dict(_base_.ubn, model_type=_base_.model.type)
default_hooks = _base_.ubn_hooks

_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', '../_base_/ubn.py']
model = dict(_base_.ubn, model_type=_base_.model.type)
default_hooks = _base_.ubn_hooks

_base_ = ['mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', '../_base_/ubn.py']
model = dict(_base_.ubn, model_type=_base_.model.type)
default_hooks = _base_.ubn_hooks

_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', '../_base_/ubn.py']
model = dict(_base_.ubn, model_type=_base_.model.type)
default_hooks = _base_.ubn_hooks

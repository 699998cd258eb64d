_base_ = [
    '../_base_/mask-rcnn_r18-scratch_fpn.py',
    '../_base_/coco_instance_small.py',
    '../_base_/schedule_400i.py',
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)))
randomness = dict(seed=0)

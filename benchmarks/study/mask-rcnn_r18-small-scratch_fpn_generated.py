# The same on the generated data set: half as many training images as the demo has, and smaller.
# demo/make_demo_data.py work_dirs/study/data --num-train 120 --num-val 50 --side-range 128 192
_base_ = './mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
data_root = 'work_dirs/study/data/'
classes = ('disk', 'square', 'triangle', 'star', 'cross')
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes), reg_class_agnostic=True),
        mask_head=dict(num_classes=len(classes)),
    )
)
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

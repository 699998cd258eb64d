_base_ = '../norm_comparison/mask-rcnn_r50_fpn_syncubn-all_2x_coco.py'
# Statistics over the 8 GPUs of a node instead of over all ranks; docs/scaling.md says from how
# many ranks on this pays. Running statistics are averaged before evaluation and saving.
default_hooks = dict(
    sync_group=dict(type='SyncGroupHook', group_size=8),
    sync_buffers=dict(type='SyncBuffersHook'),
)

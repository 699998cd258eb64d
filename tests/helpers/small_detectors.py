"""Detectors of mmdet's sizes cut to what trains in seconds, for tests that need every kind."""

from pathlib import Path

import numpy as np
from generated import CLASSES
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from ubn_det import UBN

ROOT = Path(__file__).parents[2]
SIDE = 64
# Two for each of the 32 groups of GN, which has to have them on maps of one pixel.
CHANNELS = 64
NUM_STUFF = 2

WIDTHS = (
    *('in_channels', 'out_channels', 'feat_channels', 'conv_out_channels', 'fc_out_channels'),
    *('inner_channels', 'embed_dims', 'feedforward_channels'),
)
SMALL = dict(
    num_classes=len(CLASSES),
    num_things_classes=len(CLASSES),
    num_queries=10,
    num_points=64,
    num_feats=CHANNELS // 2,
    nms_pre=200,
    max_per_img=20,
    max_per_image=20,
    # Untrained heads are sure of nothing.
    score_thr=0.0,
    filter_thr=0.0,
    stuff_area_limit=16,
    # Boxes of an untrained head have a size then.
    exp_on_reg=True,
)


@TRANSFORMS.register_module()
class SemanticFromMasks(BaseTransform):
    """Make ``gt_seg_map`` of the objects' masks, the rest being stuff: above of one kind, below.

    In the place of LoadPanopticAnnotations, which needs panopticapi.
    """

    def transform(self, results):
        masks = results['gt_masks'].to_ndarray()
        height, width = masks.shape[1:]
        seg = np.full((height, width), len(CLASSES), np.uint8)
        seg[height // 2 :] += 1
        for mask, label in zip(masks, results['gt_bboxes_labels'], strict=True):
            seg[mask > 0] = label
        return dict(results, gt_seg_map=seg)


@METRICS.register_module()
class PixelAccuracy(BaseMetric):
    """Share of pixels whose predicted category is right, whatever the instance."""

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            predicted = sample['pred_panoptic_seg']['sem_seg'].cpu().numpy() % 1000
            truth = sample['gt_sem_seg']['sem_seg'].cpu().numpy()
            self.results.append((predicted == truth).mean())

    def compute_metrics(self, results):
        return dict(pixel_accuracy=float(np.mean(results)))


def read(name):
    return Config.fromfile(ROOT / f'configs/ubn/{name}.py')


def shrink(cfg, in_channels):
    """Make all that a part of a model's config says about widths and numbers small, in place."""
    items = cfg.items() if isinstance(cfg, dict) else enumerate(cfg)
    for key, value in list(items):
        if key in WIDTHS and isinstance(value, int):
            cfg[key] = CHANNELS
        elif key == 'in_channels':
            cfg[key] = in_channels
        elif key in SMALL and isinstance(value, (int, float)):
            cfg[key] = SMALL[key]
        elif isinstance(value, (dict, list)):
            shrink(value, in_channels)


def make_small(cfg):
    """Leave a config its structure and its depth, and take its width."""
    model = cfg.model
    is_resnet = model.backbone.type == 'ResNet'
    small = dict(base_channels=4, stem_channels=4) if is_resnet else dict(widen_factor=0.125)
    # Pretrained weights come from the network.
    model.backbone.update(small, init_cfg=None)
    in_channels = [16, 32, 64, 128] if is_resnet else [32, 64, 128]
    shrink({key: value for key, value in model.items() if key != 'backbone'}, in_channels)
    if 'panoptic_head' in model:
        model.panoptic_head.loss_cls.class_weight = [1.0] * len(CLASSES) + [0.1]
        model.data_preprocessor.batch_augments[0].size = (SIDE, SIDE)
    if 'semantic_head' in model:
        for part in (model.semantic_head, model.panoptic_fusion_head):
            part.num_stuff_classes = NUM_STUFF
    return cfg


def make_config(name, data, work_dir):
    """Read a config, make its model small, and let it train an epoch of two iterations."""
    cfg = make_small(read(name))
    is_panoptic = 'semantic_head' in cfg.model
    has_masks = any(part in str(cfg.model) for part in ('mask_head', 'panoptic_head', 'Ins'))
    image = dict(type='LoadImageFromFile')
    load = [dict(type='LoadAnnotations', with_bbox=True, with_mask=has_masks)]
    if is_panoptic:
        load.append(dict(type='SemanticFromMasks'))
    resize = [
        dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=True),
        dict(type='Pad', size=(SIDE, SIDE)),
    ]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type='PackDetInputs', meta_keys=keys)

    def loader(split, batch_size, pipeline):
        dataset = dict(
            type='CocoDataset',
            data_root=str(data),
            metainfo=dict(classes=CLASSES),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
            test_mode=split == 'val',
            pipeline=pipeline,
        )
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dataset,
        )

    train = loader('train', 2, [image, *load, *resize, pack])
    if cfg.train_dataloader.dataset.type == 'MultiImageMixDataset':
        # A hook of YOLOX counts on it.
        dataset = dict(train['dataset'], pipeline=[image, *load])
        train['dataset'] = dict(
            type='MultiImageMixDataset', dataset=dataset, pipeline=[*resize, pack]
        )
    cfg.train_dataloader = train
    cfg.val_dataloader = loader('val', 1, [image, *resize, *load, pack])
    cfg.test_dataloader = cfg.val_dataloader
    if is_panoptic:
        cfg.val_evaluator = dict(type='PixelAccuracy')
    else:
        cfg.val_evaluator = dict(
            type='CocoMetric',
            ann_file=str(data / 'annotations/instances_val.json'),
            metric=['bbox', 'segm'] if has_masks else ['bbox'],
        )
    cfg.test_evaluator = cfg.val_evaluator
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{name}_{work_dir.name}'
    cfg.randomness = dict(seed=0)
    return cfg


def ubn_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, UBN)}

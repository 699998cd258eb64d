"""A Mask R-CNN that trains in process, for tests that look at every iteration."""

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData
from tiny_config import ROOT

from ubn_det import UBN

CHANNELS = 8
NUM_CLASSES = 2
STRIDES = [4, 8]

# In each of backbone, neck, box head and mask head there are layers to normalize.
PARTS = ('backbone', 'neck', 'roi_head.bbox_head', 'roi_head.mask_head')


def build_detector(norm_cfg, roi_size=4, **changes):
    """Build a Mask R-CNN whose backbone, neck and heads all have ``norm_cfg``.

    Args:
        norm_cfg (dict): Type and arguments of the norm layers.
        roi_size (int): Side of the maps of a region in the box head; in the mask head it is twice
            as much.
        **changes: What else to set in the detector's config, a dot written as two underscores.
    """
    cfg = Config.fromfile(ROOT / 'configs/_base_/mask-rcnn_r18-scratch_fpn.py')
    extractor = dict(out_channels=CHANNELS, featmap_strides=STRIDES)
    head = dict(
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        norm_cfg=norm_cfg,
    )
    cfg.merge_from_dict(
        dict(
            model=dict(
                data_preprocessor=dict(pad_size_divisor=4),
                backbone=dict(
                    stem_channels=4,
                    base_channels=4,
                    num_stages=1,
                    strides=(1,),
                    dilations=(1,),
                    out_indices=(0,),
                    norm_cfg=norm_cfg,
                ),
                neck=dict(in_channels=[4], out_channels=CHANNELS, num_outs=3, norm_cfg=norm_cfg),
                rpn_head=dict(
                    in_channels=CHANNELS,
                    feat_channels=CHANNELS,
                    anchor_generator=dict(scales=[4], strides=[*STRIDES, 16]),
                ),
                roi_head=dict(
                    bbox_roi_extractor=dict(extractor, roi_layer=dict(output_size=roi_size)),
                    bbox_head=dict(
                        head,
                        type='ConvFCBBoxHead',
                        num_shared_convs=1,
                        num_shared_fcs=1,
                        fc_out_channels=CHANNELS,
                        roi_feat_size=roi_size,
                    ),
                    mask_roi_extractor=dict(extractor, roi_layer=dict(output_size=2 * roi_size)),
                    mask_head=dict(head, num_convs=1),
                ),
                train_cfg=dict(
                    rpn=dict(sampler=dict(num=32)),
                    rpn_proposal=dict(nms_pre=50, max_per_img=20),
                    rcnn=dict(sampler=dict(num=16), mask_size=4 * roi_size),
                ),
            )
        )
    )
    cfg.merge_from_dict({f'model.{k.replace("__", ".")}': v for k, v in changes.items()})
    detector = MODELS.build(cfg.model)
    detector.train()
    for part in PARTS:
        assert layers_of(detector.get_submodule(part)) or norm_cfg['type'] == 'BN', part
    return detector


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, UBN)]


def make_batch(shapes, num_objects):
    """Make images of noise with bright rectangles, whose sides are up to half the image's.

    Args:
        shapes (list[tuple[int, int]]): Height and width of each image.
        num_objects (list[int]): Number of objects in each.
    """
    inputs, samples = [], []
    for (height, width), num in zip(shapes, num_objects, strict=True):
        image = 60 * torch.rand(3, height, width)
        corners = torch.rand(num, 2) * torch.tensor([width, height]) / 2
        sides = (0.25 + torch.rand(num, 2) / 4) * torch.tensor([width, height])
        boxes = torch.cat([corners, corners + sides], 1).round()
        labels = torch.randint(NUM_CLASSES, (num,))
        masks = torch.zeros(num, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom), label in zip(
            masks, boxes.int().tolist(), labels.tolist(), strict=True
        ):
            mask[top:bottom, left:right] = 1
            image[label, top:bottom, left:right] += 150
        sample = DetDataSample()
        sample.set_metainfo(
            dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=labels, masks=BitmapMasks(masks.numpy(), height, width)
        )
        inputs.append(image.byte())
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


class Trainer:
    """Trains a detector by SGD with momentum and clipped gradients, on one process or several.

    Gradients that are not finite raise an error.

    Args:
        detector (nn.Module): As ``build_detector`` makes it.
        wrap (bool): Whether other processes train the same.
        find_unused_parameters (bool): As in DistributedDataParallel.
    """

    def __init__(self, detector, wrap=False, find_unused_parameters=False):
        self.detector = self.model = detector
        if wrap:
            # Small buckets, so that the collectives of the gradients come in between those of the
            # layers.
            self.model = MMDistributedDataParallel(
                detector,
                broadcast_buffers=False,
                find_unused_parameters=find_unused_parameters,
                bucket_cap_mb=0.01,
            )
        self.optim_wrapper = OptimWrapper(
            torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4),
            clip_grad=dict(max_norm=10, error_if_nonfinite=True),
        )

    def step(self, batch):
        """Train on one batch and return what mmdet logs of it."""
        return self.model.train_step(batch, self.optim_wrapper)

    def set_proposals(self, exist):
        """Let the region proposals through, or filter out all of them."""
        self.detector.train_cfg.rpn_proposal.min_bbox_size = 0 if exist else 10000

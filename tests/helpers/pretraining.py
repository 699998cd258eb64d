"""Runs UBN in mmpretrain and mmsegmentation, in a process of its own, for test_classification.py.

Both import torchvision, which no other test may see.

Usage: pretraining.py FOLDER, where FOLDER has a data set of images in a folder per class; leaves
steps.json, what each config built and how it trained a step, and the work folder `classifier`.
"""

import json
import runpy
import sys
from pathlib import Path

import extra_packages
import mmdet.models
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch.nn.modules.batchnorm import _BatchNorm

import ubn_det

assert mmdet.models, 'imported before torchvision can be'
ROOT = Path(__file__).parents[2]
NUM_CLASSES = 2
CHANNELS = 8
PRETRAINING = """
_base_ = '{root}/configs/mmpretrain/resnet18_ubn_8xb32_in1k.py'
norm_cfg = dict(type='UBN', condensation_threshold=None)
model = dict(
    backbone=dict(stem_channels={channels}, base_channels={channels}, norm_cfg=norm_cfg),
    head=dict(num_classes={classes}, in_channels={channels} * 8, topk=1),
)
data_preprocessor = dict(num_classes={classes})
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='{folder}/images', pipeline=pipeline
    ),
)
val_dataloader = train_dataloader
val_evaluator = dict(topk=1)
test_dataloader = train_dataloader
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.05))
custom_hooks = [
    dict(type='CondensationHook'), dict(type='PreciseStatisticsHook', num_batches=2)
]
train_cfg = dict(max_epochs=2)
"""


def classification_batch():
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i % NUM_CLASSES) for i in range(4)]
    return dict(inputs=[torch.randint(256, (3, 32, 32)) for _ in samples], data_samples=samples)


def segmentation_batch():
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.randint(NUM_CLASSES, (1, 64, 64)))
        samples.append(sample)
    return dict(inputs=[torch.randint(256, (3, 64, 64)) for _ in samples], data_samples=samples)


def take_a_step(path):
    """Train the config's model a step; return what was built and what moved."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    # Pretrained weights come from the network.
    cfg.model.pretrained = None
    is_segmentation = cfg.default_scope == 'mmseg'
    if is_segmentation:
        cfg.model.data_preprocessor.size = (64, 64)
    else:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    batch = segmentation_batch() if is_segmentation else classification_batch()
    log = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    return dict(
        norms=len(norms),
        ubn=sum(isinstance(m, ubn_det.UBN) for m in norms),
        sync=sum(isinstance(m, ubn_det.SyncUBN) for m in norms),
        trained=sum(int(m.num_batches_tracked) == 1 for m in norms),
        finite=all(torch.isfinite(torch.as_tensor(value)).all().item() for value in log.values()),
    )


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    extra_packages.enable()
    # OneDL's mmengine looks for mmsegmentation under OpenMMLab's name only.
    MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
    steps = {
        path.stem: take_a_step(path)
        for name in ('mmpretrain', 'mmseg')
        for path in sorted((ROOT / 'configs' / name).glob('*.py'))
    }
    (folder / 'steps.json').write_text(json.dumps(steps))

    config = folder / 'classifier.py'
    config.write_text(
        PRETRAINING.format(root=ROOT, folder=folder, channels=CHANNELS, classes=NUM_CLASSES)
    )
    sys.argv = ['train.py', str(config), '--work-dir', str(folder / 'classifier')]
    sys.path.insert(0, str(ROOT / 'tools'))
    runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')


if __name__ == '__main__':
    main()

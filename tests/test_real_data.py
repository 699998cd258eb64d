"""The configs on real images and annotations, where UBN_DATA_ROOT names a folder that has them."""

import os
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper

from ubn_det import UBN
from ubn_det.engine import set_data_root

CONFIGS = Path(__file__).parent.parent / 'configs'
CASES = {
    'pennfudan': (
        'pennfudan/mask-rcnn_r18-scratch_fpn_ubn_400i_pennfudan.py',
        dict(images=(120, 50), classes=1),
    ),
    'coco-tiny': (
        'ubn/mask-rcnn_r50_fpn_ubn_1x_coco.py',
        dict(images=(80, 80), classes=80),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    root = os.environ.get('UBN_DATA_ROOT')
    if root is None:
        pytest.skip('UBN_DATA_ROOT is not set')
    folder = Path(root) / request.param
    if not folder.is_dir():
        pytest.skip(f'no {request.param} in UBN_DATA_ROOT')
    register_all_modules()
    path, expected = CASES[request.param]
    cfg = Config.fromfile(CONFIGS / path)
    set_data_root(cfg, str(folder))
    cfg.model.backbone.init_cfg = None
    return cfg, expected


def test_every_image_and_class_is_found(case):
    cfg, expected = case
    train, val = (DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in ('train', 'val'))
    filtered = train.filter_cfg is not None
    assert len(val) == expected['images'][1]
    assert 0 < len(train) <= expected['images'][0] and filtered
    assert len(train.metainfo['classes']) == expected['classes']
    assert set(train.cat2label.values()) == set(range(expected['classes']))
    assert Path(cfg.val_evaluator.ann_file).exists()


def test_training_step(case):
    cfg, _ = case
    torch.manual_seed(0)
    # Small images: this is about the data, not about learning from it.
    for transform in cfg.train_dataloader.dataset.pipeline:
        if transform.type == 'Resize':
            transform.scale = (256, 192)
    train = DATASETS.build(cfg.train_dataloader.dataset)
    cfg.model.backbone.norm_cfg.condensation_threshold = 0.6
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    log = model.train_step(pseudo_collate([train[0], train[1]]), optim_wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    layers = [m for m in model.backbone.modules() if isinstance(m, UBN) and m.training]
    assert layers
    assert all(layer.num_batches_tracked == 1 for layer in layers)
    assert all(torch.isfinite(layer.running_var).all() for layer in layers)
    assert any(0 < layer.condensation < 1 for layer in layers)

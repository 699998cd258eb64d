"""Every config builds, has UBN where it says so, and takes a training step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn

from ubn_det import UBN, SyncUBN

REPOSITORY = Path(__file__).parent.parent
ROOT = REPOSITORY / 'configs'
ALL_CONFIGS = [
    *sorted(p for p in ROOT.glob('*/*.py') if p.parent.name != '_base_'),
    *sorted(REPOSITORY.glob('demo/mask-rcnn_*.py')),
    *sorted(REPOSITORY.glob('benchmarks/study/*.py')),
]
# Those that are turned over as a whole are trained in test_detectors.py, those of other frameworks
# in test_classification.py, and the small ones of the study in test_benchmarks/test_study.py and
# test_small_classification.py. Twins are compared below.
OTHERS = ('mmpretrain', 'mmseg', 'norm_comparison')
CONFIGS = [
    path
    for path in ALL_CONFIGS
    if path.parent.name not in OTHERS
    and not path.stem.startswith('resnet-small_')
    and 'model_type' not in path.read_text()
]

# Norm layers of each component: (UBN, SyncUBN, other); frozen are those that do not train.
R50, R101, R18, FPN, CONVS = 53, 104, 20, 8, 4
EXPECTED = {
    'mask-rcnn_r50_fpn_ubn_1x_coco': dict(ubn=R50, frozen=11),
    'mask-rcnn_r101_fpn_ubn_1x_coco': dict(ubn=R101, frozen=11),
    'mask-rcnn_r50_fpn_syncubn_1x_coco': dict(ubn=R50, sync=R50, frozen=11),
    'mask-rcnn_r50_fpn_syncubn-all-node_2x_coco': dict(
        ubn=R50 + FPN + 2 * CONVS, sync=R50 + FPN + 2 * CONVS, frozen=11
    ),
    'mask-rcnn_r50-scratch_fpn_syncubn-all_6x_coco': dict(
        ubn=R50 + FPN + 2 * CONVS, sync=R50 + FPN + 2 * CONVS, frozen=0
    ),
    'mask-rcnn_r18-scratch_fpn_ubn_400i_pennfudan': dict(ubn=R18 + FPN + CONVS, frozen=0),
    'mask-rcnn_r18-scratch_fpn_bn_400i_pennfudan': dict(ubn=0, bn=R18 + FPN + CONVS, frozen=0),
    'mask-rcnn_r18-scratch_fpn_ubn_demo': dict(ubn=R18 + FPN + 2, frozen=0),
    'mask-rcnn_r18-small-scratch_fpn_pennfudan': dict(ubn=0, bn=R18 + FPN + 2, frozen=0),
    'mask-rcnn_r18-small-scratch_fpn_pennfudan-crops': dict(ubn=0, bn=R18 + FPN + 2, frozen=0),
    'mask-rcnn_r18-small-scratch_fpn_generated': dict(ubn=0, bn=R18 + FPN + 2, frozen=0),
    'mask-rcnn_r18-small_fpn_pennfudan-finetune': dict(ubn=0, bn=R18 + FPN + 2, frozen=0),
}


def build(path):
    register_all_modules()
    cfg = Config.fromfile(path)
    # Pretrained weights come from the network.
    cfg.model.backbone.init_cfg = None
    return cfg, MODELS.build(cfg.model)


def test_every_config_is_expected():
    assert {path.stem for path in CONFIGS} == set(EXPECTED)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_a_step(path):
    torch.manual_seed(0)
    cfg, model = build(path)
    model.init_weights()
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    ubn = [m for m in norms if isinstance(m, UBN)]
    expected = dict(sync=0, bn=0) | EXPECTED[path.stem]
    found = dict(
        ubn=len(ubn),
        sync=sum(isinstance(m, SyncUBN) for m in ubn),
        bn=len(norms) - len(ubn),
        frozen=sum(not m.training for m in norms),
    )
    assert found == expected

    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    np.random.seed(0)
    data = demo_mm_inputs(2, [(3, 64, 96), (3, 96, 64)], num_classes=2, with_mask=True)
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = model.train_step(data, optim_wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    for name, module in model.named_modules():
        if isinstance(module, UBN) and module.training and 'roi_head' not in name:
            assert module.num_batches_tracked == 1, name
            has_score = module.condensation_threshold is not None
            assert (0 < module.condensation.abs() <= 1) == has_score, name
        if isinstance(module, UBN) and not module.training:
            assert module.num_batches_tracked == 0, name
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith('backbone.layer4') for name in moved)


@pytest.mark.parametrize(
    'path',
    [
        path
        for path in ALL_CONFIGS
        if '_bn_400i' not in path.stem and path.parent.name not in (*OTHERS[:2], 'study')
    ],
    ids=lambda path: path.stem,
)
def test_config_registers_and_checks(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ['ubn_det']
    assert cfg.default_hooks.condensation == dict(type='CondensationHook')
    # Those of the base are there still.
    assert cfg.default_hooks.logger.type == 'LoggerHook'


def test_config_names_are_unique():
    """The default work folder is named after the config: two of a name would resume each other."""
    names = [path.stem for path in ALL_CONFIGS]
    assert sorted(names) == sorted(set(names))


# As a file name has them, and the classes that they promise.
FAMILY = {'bn': 'BatchNorm2d', 'syncbn': 'SyncBatchNorm', 'ubn': 'UBN', 'syncubn': 'SyncUBN'}


def names_of_norms(path):
    """Return what a file name says of its batch norms; GN is that of some heads."""
    return {FAMILY[part] for part in path.stem.replace('-', '_').split('_') if part in FAMILY}


@pytest.mark.parametrize(
    'path',
    [path for path in ALL_CONFIGS if path.parent.name not in (*OTHERS[:2], 'study')],
    ids=lambda path: path.stem,
)
def test_config_name_says_its_norm(path):
    register_all_modules()
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # UBN2d is UBN for maps.
    found = {type(norm).__name__.removesuffix('2d') for norm in norms}
    assert found == {name.removesuffix('2d') for name in names_of_norms(path)}


@pytest.mark.parametrize(
    'path',
    [path for path in ALL_CONFIGS if path.parent.name in OTHERS[:2]],
    ids=lambda path: path.stem,
)
def test_config_name_of_another_framework_says_its_norm(path):
    found = re.findall(r"\btype='((?:Sync)?U?BN)'", path.read_text())
    assert set(found) == names_of_norms(path)


NORMS = {
    'bn': (nn.BatchNorm2d, 'BN'),
    'syncbn': (SyncBatchNorm, 'SyncBN'),
    'gn': (nn.GroupNorm, 'GN'),
    'ubn': (UBN, 'UBN'),
    'syncubn': (SyncUBN, 'SyncUBN'),
}


@pytest.mark.parametrize('schedule', ['1x', '2x'])
def test_coco_twins_differ_in_the_norm_only(schedule):
    texts = set()
    for name, (_, norm) in NORMS.items():
        cfg = Config.fromfile(
            ROOT / f'norm_comparison/mask-rcnn_r50_fpn_{name}-all_{schedule}_coco.py'
        )
        assert cfg.train_cfg.max_epochs == {'1x': 12, '2x': 24}[schedule]
        assert cfg.param_scheduler[1].milestones == {'1x': [8, 11], '2x': [16, 22]}[schedule]
        parts = [cfg.model.backbone, cfg.model.neck, *cfg.model.roi_head.values()]
        for part in (p for p in parts if isinstance(p, dict) and 'norm_cfg' in p):
            assert part.pop('norm_cfg').type == norm
        cfg.pop('norm_cfg')
        if norm == 'GN':
            # Weights that were trained with GN, and the images that they were trained on.
            assert 'gn' in cfg.model.backbone.init_cfg.pop('checkpoint')
        else:
            cfg.model.backbone.init_cfg.pop('checkpoint')
        for key in ('mean', 'std', 'bgr_to_rgb'):
            cfg.model.data_preprocessor.pop(key)
        texts.add(cfg.pretty_text)
    assert len(texts) == 1


@pytest.mark.parametrize('name', NORMS)
def test_coco_twins_have_their_norm_everywhere(name):
    cfg, model = build(ROOT / f'norm_comparison/mask-rcnn_r50_fpn_{name}-all_1x_coco.py')
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    assert {type(module) for module in norms} == {NORMS[name][0]}
    assert len(norms) == R50 + FPN + 2 * CONVS


def test_twins_differ_in_the_norm_only():
    folder = ROOT / 'pennfudan'
    ubn, bn = (
        Config.fromfile(folder / f'mask-rcnn_r18-scratch_fpn_{name}_400i_pennfudan.py')
        for name in ('ubn', 'bn')
    )
    for key in ('custom_imports', 'ubn', 'ubn_hooks'):
        ubn.pop(key)
    ubn.default_hooks.pop('condensation')
    text = ubn.pretty_text.replace("'UBN'", "'BN'")
    assert text == bn.pretty_text
    assert ubn.pretty_text != bn.pretty_text

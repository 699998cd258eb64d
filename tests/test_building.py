"""Tests of the model type WithUBN: what of a config it reaches, and that it stays what it says."""

import copy
import pickle
import runpy
import sys
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from generated import generate_coco
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.models.detectors import rtmdet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope
from small_detectors import make_config, make_small, read, ubn_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import UBN, SyncUBN, UBN2d
from ubn_det.engine.condensation_hook import CondensationHook
from ubn_det.layers.ubn import EXTRA_PARAMETERS

MMDET = Path(mmdet.__file__).parent / '.mim'
RETINANET = 'retinanet_r50_fpn_ubn_1x_coco'


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def read_mmdet(path, **options):
    """Read a config of mmdet's and set options of it, a dot written as two underscores."""
    cfg = Config.fromfile(MMDET / 'configs' / path)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def turn_over(cfg, **norm_cfg):
    changes = dict(type='WithUBN', model_type=cfg.model.type, norm_cfg=norm_cfg)
    return MODELS.build(dict(cfg.model, **changes))


def plain_bn_of(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, UBN)]


SMALL_RESNET = dict(
    model__backbone__base_channels=4,
    model__backbone__stem_channels=4,
    model__backbone__init_cfg=None,
)


CENTERNET = 'centernet/centernet_r18_8xb16-crop512-140e_coco.py'


@pytest.mark.parametrize(
    'path, num_unreached, options',
    [
        ('yolof/yolof_r50-c5_8xb8-1x_coco.py', 20, dict(model__neck__in_channels=128)),
        (CENTERNET, 6, dict(model__neck__in_channels=32)),
        # All of its norms are defaults of classes: no norm_cfg stands in the config.
        ('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', 72, None),
    ],
    ids=['YOLOF', 'CenterNet', 'YOLOv3'],
)
def test_bn_that_no_norm_cfg_reaches(path, num_unreached, options):
    cfg = read_mmdet(path)
    cfg.model.backbone.init_cfg = None
    if options is not None:
        cfg.merge_from_dict({k.replace('__', '.'): v for k, v in (SMALL_RESNET | options).items()})
    by_norm_cfg = copy.deepcopy(cfg.model)
    for part in by_norm_cfg.values():
        if isinstance(part, dict) and part.get('norm_cfg'):
            part.norm_cfg.type = 'UBN'
    by_norm_cfg = MODELS.build(by_norm_cfg)
    model = turn_over(cfg)
    assert len(plain_bn_of(by_norm_cfg)) == num_unreached
    assert not plain_bn_of(model)
    assert len(ubn_of(model)) == len(ubn_of(by_norm_cfg)) + num_unreached


def test_requires_grad_of_frozen_bases_gives_way():
    cfg = read_mmdet('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', **SMALL_RESNET)
    cfg.model.bbox_head.feat_channels = cfg.model.neck.out_channels = 64
    before = cfg.pretty_text
    for value in (True, False):
        model = turn_over(cfg, requires_grad=value)
        trains = {p.requires_grad for p in model.backbone.layer4[0].bn1.parameters()}
        assert trains == {value}
        # Stages that are frozen stay frozen.
        assert not any(p.requires_grad for p in model.backbone.bn1.parameters())
    assert cfg.pretty_text == before


@pytest.mark.parametrize(
    'norm_cfg, world_size, layer',
    [
        ({}, 1, SyncUBN),
        ({}, 2, SyncUBN),
        (dict(type='UBN'), 2, UBN),
        (dict(type='SyncUBN'), 1, SyncUBN),
    ],
)
@pytest.mark.parametrize('bn', ['BN', 'SyncBN'])
def test_sync(norm_cfg, world_size, layer, bn, monkeypatch):
    # On several ranks RTMDet makes SyncBN of whatever BN it has while it is built.
    monkeypatch.setattr(rtmdet, 'get_world_size', lambda: world_size)
    cfg = make_small(read('rtmdet_tiny_syncubn_8xb32-300e_coco')).model
    for part in (cfg.backbone, cfg.neck, cfg.bbox_head):
        part.norm_cfg = dict(type=bn)
    cfg.norm_cfg = norm_cfg
    model = MODELS.build(cfg)
    if not norm_cfg and bn == 'BN' and world_size == 1:
        layer = UBN2d
    assert {type(m) for m in ubn_of(model).values()} == {layer}
    assert len(ubn_of(model)) == 76
    assert not plain_bn_of(model)


def test_errors():
    cfg = make_small(read(RETINANET)).model
    with pytest.raises(TypeError, match='no_such_argument'):
        MODELS.build(dict(cfg, norm_cfg=dict(no_such_argument=1)))
    with pytest.raises(TypeError, match="norm_cfg must be a dict or None, got 'UBN'"):
        MODELS.build(dict(cfg, norm_cfg='UBN'))
    with pytest.raises(ValueError, match="has no BN that norm_cfg={'type': 'BN'} of WithUBN"):
        MODELS.build(dict(cfg, norm_cfg=dict(type='BN')))
    with pytest.raises(TypeError, match='model_type'):
        MODELS.build({key: value for key, value in cfg.items() if key != 'model_type'})
    with pytest.raises(KeyError, match='NoSuchDetector'):
        MODELS.build(dict(cfg, model_type='NoSuchDetector'))
    cfg.backbone.norm_cfg = dict(type='GN', num_groups=2)
    with pytest.raises(ValueError, match='RetinaNet as this config builds it has no BN'):
        MODELS.build(cfg)


def test_type_may_be_a_class():
    cfg = make_small(read(RETINANET)).model
    cfg.backbone.norm_cfg = dict(type=nn.BatchNorm2d, requires_grad=False)
    model = MODELS.build(dict(cfg, model_type=mmdet.models.RetinaNet))
    assert type(model) is mmdet.models.RetinaNet
    assert model.backbone.layer4[0].bn1.center_weight.requires_grad


def test_options_reach_all_layers_or_one_part():
    cfg = make_small(read(RETINANET))
    cfg.merge_from_dict(
        {
            'model.norm_cfg.type': 'SyncUBN',
            'model.norm_cfg.condensation_threshold': 0.7,
            'model.backbone.frozen_stages': -1,
            'model.backbone.norm_eval': True,
        }
    )
    model = MODELS.build(cfg.model)
    layers = ubn_of(model).values()
    assert {(type(m), m.condensation_threshold) for m in layers} == {(SyncUBN, 0.7)}
    model.train()
    # What the config says of norm_eval and frozen stages is what happens.
    assert not any(m.training for m in layers)
    assert all(p.requires_grad for m in layers for p in m.parameters())


def test_a_child_config_that_changes_the_backbone_is_turned_over_too(tmp_path):
    path = tmp_path / 'child.py'
    path.write_text(
        f"_base_ = '{Path(__file__).parent.parent}/configs/ubn/{RETINANET}.py'\n"
        'model = dict(\n'
        "    backbone=dict(_delete_=True, type='MobileNetV2', out_indices=(1, 2, 4, 7)),\n"
        '    neck=dict(in_channels=[24, 32, 96, 1280]),\n'
        ')\n'
    )
    model = MODELS.build(Config.fromfile(path).model)
    assert len(ubn_of(model)) == 52
    assert not plain_bn_of(model)


def test_dumped_and_pickled_config_says_the_same(tmp_path):
    cfg = read(RETINANET)
    cfg.dump(tmp_path / 'dumped.py')
    for again in (Config.fromfile(tmp_path / 'dumped.py'), pickle.loads(pickle.dumps(cfg))):
        assert again.model == cfg.model
        assert again.model.type == 'WithUBN'
        assert again.custom_imports == cfg.custom_imports
        assert again.default_hooks.condensation.type == 'CondensationHook'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Train RTMDet, which has SyncBN and averaged weights, by mmdet's own tool."""
    folder = tmp_path_factory.mktemp('trained')
    data = folder / 'data'
    generate_coco(data, num_train=2, num_val=1, side_range=(64, 64))
    work_dir = folder / 'work'
    register_all_modules(init_default_scope=False)
    cfg = make_config('rtmdet_tiny_syncubn_8xb32-300e_coco', data, work_dir)
    cfg.dump(folder / 'config.py')
    run_stock_tool('train', folder / 'config.py')
    return work_dir


def run_stock_tool(name, *arguments):
    """Run a tool of mmdet's, which knows nothing of UBN, in this process."""
    path = MMDET / 'tools' / f'{name}.py'
    arguments = [str(path), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', arguments)
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name='__main__')


def test_checkpoint_by_itself_builds_ubn(trained):
    path = trained / 'epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    assert 'ema_state_dict' in saved
    saved = saved['state_dict']
    inferencer = DetInferencer(weights=str(path), device='cpu', show_progress=False)
    detector = init_detector(str(trained / 'config.py'), str(path), device='cpu')
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for model in (inferencer.model, detector):
        assert len(ubn_of(model)) == 76
        assert not plain_bn_of(model)
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], value) for key, value in saved.items())
        for extra in EXTRA_PARAMETERS:
            assert any(key.endswith(extra) and value.any() for key, value in state.items())
    found = inferencer(image, return_datasamples=True)['predictions'][0].pred_instances
    other = inference_detector(detector, image).pred_instances
    assert len(found.scores)
    torch.testing.assert_close(found.scores, other.scores)
    torch.testing.assert_close(found.bboxes, other.bboxes)
    # A config of mmdet's own for the same checkpoint drops the rectifiers, and says so only in
    # the log: hand over the config that is saved beside it.


def test_stock_test_tool(trained, tmp_path):
    run_stock_tool('test', trained / 'config.py', trained / 'epoch_1.pth', '--work-dir', tmp_path)
    assert list(tmp_path.glob('*/*.json'))


def test_hook_says_what_is_there_and_finds_what_replaced_it(monkeypatch):
    class Logger:
        lines = []

        def info(self, line):
            self.lines.append(line)

        def log(self, level, line):
            self.lines.append(line)

    class Runner:
        logger = Logger()
        cfg = make_small(read(RETINANET))
        hooks = []
        iter = 0

    Runner.model = MODELS.build(Runner.cfg.model)
    hook = CondensationHook()
    hook.before_run(Runner)
    hook.before_train(Runner)
    (line,) = Logger.lines
    assert line.startswith('UBN: 53 layers (0 SyncUBN), 42 train their statistics, 11 do not')
    assert line.endswith('0 layers of plain BN left over')
    Runner.model = MODELS.build(read_bn(Runner.cfg.model))
    with pytest.raises(RuntimeError, match='model asks for UBN but the model has BatchNorm2d'):
        hook.before_run(Runner)


def read_bn(cfg):
    """Return the config of the model without WithUBN."""
    cfg = copy.deepcopy(cfg)
    cfg.pop('norm_cfg')
    cfg['type'] = cfg.pop('model_type')
    return cfg

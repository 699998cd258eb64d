"""Every kind of detector of mmdet, turned over by configs/_base_/ubn.py, trains and evaluates."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from generated import CLASSES, generate_coco
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from small_detectors import ROOT, SIDE, make_config, make_small, read, ubn_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det.layers.ubn import EXTRA_PARAMETERS


class Norms(NamedTuple):
    """What a detector has, as its table in docs/detectors.md says.

    Args:
        backbone, neck, heads (int): Layers of UBN.
        frozen (int): Those of them that ``frozen_stages`` freezes.
        others (int): Layers of GN and LN, which stay.
        layer (str): Class of the UBN layers.
    """

    backbone: int
    neck: int = 0
    heads: int = 0
    frozen: int = 0
    others: int = 0
    layer: str = 'UBN2d'


# What evaluation hands to the log, at the least.
METRICS = ('bbox_mAP', 'segm_mAP', 'pixel_accuracy')
R50 = Norms(53, frozen=11)
DETECTORS = {
    'faster-rcnn_r50_fpn_ubn_1x_coco': R50,
    # UBN by norm_cfg, not by the fragment.
    'mask-rcnn_r50_fpn_ubn_1x_coco': R50._replace(layer='UBN'),
    'cascade-mask-rcnn_r50_fpn_ubn_1x_coco': R50,
    'retinanet_r50_fpn_ubn_1x_coco': R50,
    'fcos_r50-caffe_fpn_gn-head_ubn_1x_coco': R50._replace(others=8),
    'atss_r50_fpn_ubn_1x_coco': R50._replace(others=8),
    'solov2_r50_fpn_ubn_1x_coco': R50._replace(others=16),
    'panoptic-fpn_r50_fpn_ubn_1x_coco': R50._replace(others=7),
    'mask2former_r50_ubn_8xb2-lsj-50e_coco': Norms(53, others=45),
    'rtmdet_tiny_syncubn_8xb32-300e_coco': Norms(33, 31, 12, layer='SyncUBN'),
    'rtmdet-ins_tiny_syncubn_8xb32-300e_coco': Norms(33, 31, 16, layer='SyncUBN'),
    'yolox_s_ubn_8xb8-300e_coco': Norms(35, 27, 12),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    generate_coco(folder, num_train=4, num_val=1, side_range=(SIDE, SIDE))
    return folder


def make_bn_twin(cfg):
    """Build what mmdet builds without UBN, with random affine parameters and statistics."""
    cfg = copy.deepcopy(cfg)
    if cfg.type == 'WithUBN':
        cfg['type'] = cfg.pop('model_type')
        cfg.pop('norm_cfg')
    else:
        cfg.backbone.norm_cfg.type = 'BN'
    model = MODELS.build(cfg)
    model.init_weights()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def test_every_config_that_is_turned_over_is_here():
    folder = ROOT / 'configs/ubn'
    found = {p.stem for p in folder.glob('*.py') if '_base_.ubn, model_type' in p.read_text()}
    assert found == {name for name in DETECTORS if not name.startswith('mask-rcnn')}


def test_docs_have_these_numbers():
    text = (ROOT / 'docs/detectors.md').read_text(encoding='utf-8')
    for name, norms in DETECTORS.items():
        numbers = ' | '.join(map(str, norms[:5]))
        assert f'| `{name}` | {numbers} |' in text


@pytest.mark.parametrize('name', DETECTORS)
def test_is_its_bn_twin_before_the_first_step(name):
    expected = DETECTORS[name]
    cfg = make_small(read(name)).model
    bn = make_bn_twin(cfg)
    model = MODELS.build(cfg)
    assert type(model) is type(bn)
    layers = ubn_of(model)
    twins = {n: m for n, m in bn.named_modules() if isinstance(m, _BatchNorm)}
    # In the same places, and no BN is left.
    assert list(layers) == list(twins)
    assert {type(layer).__name__ for layer in layers.values()} == {expected.layer}
    parts = [sum(n.startswith(part) for n in layers) for part in ('backbone', 'neck')]
    assert [*parts, len(layers) - sum(parts)] == list(expected[:3])
    others = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    assert len(others) == expected.others
    for n, layer in layers.items():
        assert (layer.eps, layer.momentum) == (twins[n].eps, twins[n].momentum)
    # Caffe's bases freeze all BN: there UBN trains where no stage is frozen.
    model.train()
    frozen = {n for n, layer in layers.items() if not layer.training}
    assert len(frozen) == expected.frozen
    for n, layer in layers.items():
        assert {p.requires_grad for p in layer.parameters()} == {n not in frozen}, n

    model.load_state_dict(bn.state_dict(), strict=True)
    batch = demo_mm_inputs(2, [(3, 64, 96)] * 2, num_classes=len(CLASSES))
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(ori_shape=(64, 96), scale_factor=(1.0, 1.0)))
    found = []
    for detector in (bn, model):
        detector.eval()
        with torch.no_grad():
            data = detector.data_preprocessor(copy.deepcopy(batch))
            results = detector.predict(data['inputs'], data['data_samples'])
            assert all(len(tensors_of(sample)) for sample in results)
            # The same up to rounding, which float64 makes small.
            found.append(detector.double().extract_feat(data['inputs'].double()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def tensors_of(sample):
    """Return what a detector says about an image, boxes, scores and masks."""
    if 'pred_panoptic_seg' in sample:
        return [sample.pred_panoptic_seg.sem_seg]
    found = sample.pred_instances
    return [found[key] for key in ('bboxes', 'scores', 'labels', 'masks') if key in found]


@pytest.mark.parametrize('name', DETECTORS)
def test_trains_and_evaluates(name, data, tmp_path):
    cfg = make_config(name, data, tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    scalars = runner.message_hub.log_scalars
    losses, _ = scalars['train/loss'].data
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    metrics = {key: log.current() for key, log in scalars.items() if key.endswith(METRICS)}
    assert metrics
    assert all(0 <= value <= 1 for value in metrics.values())

    runner.model.train()
    for name_, layer in ubn_of(runner.model).items():
        if not layer.training:
            assert layer.num_batches_tracked == 0, name_
            continue
        # In RTMDet-Ins the towers of classes and boxes are the same layers.
        is_shared = 'rtmdet-ins' in name and 'cls_convs' in name_
        assert layer.num_batches_tracked == 2 * (1 + is_shared), name_
        assert not torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean)), name_
        # These start at 0, where weight decay does nothing: only a gradient moves them. A tower
        # for a level on which no object was found has none.
        is_reached = layer.bias.any() or name_.startswith(('backbone', 'neck'))
        for extra in EXTRA_PARAMETERS:
            assert getattr(layer, extra).any() == is_reached, f'{name_}.{extra}'

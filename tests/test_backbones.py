"""Every backbone of mmdet with UBN by its norm_cfg: it loads BN's weights and is that BN."""

import copy
from pathlib import Path
from typing import NamedTuple

import mmdet.models  # noqa: F401
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import UBN

# The defaults of CSPNeXt and CSPDarknet, and of EfficientNet. A norm_cfg takes the place of a
# class's default as a whole, so that they have to be written again.
DARKNET_NORM = dict(momentum=0.03, eps=1e-3)
EFFICIENT_NORM = dict(eps=1e-3)


class Backbone(NamedTuple):
    """What to build, as small as its class lets it be, and what is expected of it.

    Args:
        cfg (dict): Config.
        num_norms (int): All of its norm layers.
        num_frozen (int, optional): Those that frozen_stages=1 freezes; None where the class has
            no such argument.
        norm_cfg (dict): Arguments of BN that the class has by default.
    """

    cfg: dict
    num_norms: int
    num_frozen: int | None
    norm_cfg: dict = {}


RESNET = dict(type='ResNet', base_channels=4, stem_channels=4, norm_eval=False)
HRNET_CHANNELS = (4, 8, 16, 32)
BACKBONES = {
    'ResNet-18': Backbone(dict(RESNET, depth=18), 20, 5),
    'ResNet-34': Backbone(dict(RESNET, depth=34), 36, 7),
    'ResNet-50': Backbone(dict(RESNET, depth=50), 53, 11),
    'ResNet-101': Backbone(dict(RESNET, depth=101), 104, 11),
    'ResNeXt-50': Backbone(dict(RESNET, type='ResNeXt', depth=50, groups=4, base_width=2), 53, 11),
    'Res2Net-50': Backbone(dict(RESNET, type='Res2Net', depth=50, scales=4, base_width=4), 87, 19),
    'RegNetX-400MF': Backbone(dict(type='RegNet', arch='regnetx_400mf', norm_eval=False), 71, 5),
    'HRNetV2-W18': Backbone(
        dict(
            type='HRNet',
            norm_eval=False,
            extra={
                f'stage{i + 1}': dict(
                    num_modules=num_modules,
                    num_branches=i + 1,
                    block='BASIC' if i else 'BOTTLENECK',
                    num_blocks=(4,) * (i + 1),
                    num_channels=HRNET_CHANNELS[: i + 1] if i else (8,),
                )
                for i, num_modules in enumerate((1, 1, 4, 3))
            },
        ),
        305,
        None,
    ),
    'MobileNetV2': Backbone(dict(type='MobileNetV2', widen_factor=0.25), 52, 2),
    'CSPNeXt-tiny': Backbone(
        dict(type='CSPNeXt', deepen_factor=0.167, widen_factor=0.125), 33, 10, DARKNET_NORM
    ),
    'CSPDarknet-s': Backbone(
        dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125), 35, 7, DARKNET_NORM
    ),
    'EfficientNet-B0': Backbone(
        dict(type='EfficientNet', arch='b0', out_indices=(3, 4, 5, 6)), 49, 1, EFFICIENT_NORM
    ),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def build(backbone, norm, **changes):
    norm_cfg = dict(backbone.norm_cfg, type=norm, requires_grad=True)
    return MODELS.build(dict(backbone.cfg, norm_cfg=norm_cfg, **changes))


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def make_trained_bn(backbone, x):
    """Build the backbone with BN, with random affine parameters and statistics of its own."""
    model = build(backbone, 'BN')
    model.init_weights()
    for norm in norms_of(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 0.5
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(x + 0.1 * torch.randn_like(x))
    for norm in norms_of(model):
        norm.momentum = backbone.norm_cfg.get('momentum', 0.1)
    return model


def test_docs_have_these_numbers():
    path = Path(__file__).parent.parent / 'docs/detectors.md'
    text = path.read_text(encoding='utf-8')
    for name, backbone in BACKBONES.items():
        num_frozen = 'no such argument'
        if backbone.num_frozen is not None:
            num_frozen = backbone.num_frozen
        assert f'| {name} | {backbone.num_norms} | {num_frozen} |' in text


@pytest.mark.parametrize('name', BACKBONES)
def test_loads_bn_and_is_that_bn(name, tmp_path):
    backbone = BACKBONES[name]
    x = torch.randn(4, 3, 64, 64)
    bn = make_trained_bn(backbone, x)
    path = str(tmp_path / 'bn.pth')
    torch.save(bn.state_dict(), path)

    ubn = build(backbone, 'UBN', init_cfg=dict(type='Pretrained', checkpoint=path))
    ubn.init_weights()
    # Nothing is missing and nothing left over.
    load_checkpoint(build(backbone, 'UBN'), path, strict=True)
    assert len(norms_of(ubn)) == len(norms_of(bn)) == backbone.num_norms
    assert all(type(norm) is UBN for norm in norms_of(ubn))
    state = ubn.state_dict()
    for key, value in bn.state_dict().items():
        assert torch.equal(state[key], value), key

    bn.eval()
    ubn.eval()
    # Other images than those of the statistics. Float64 makes small what rounding leaves.
    x = 0.3 + 1.2 * torch.randn(2, 3, 64, 64)
    bn.double()
    ubn.double()
    x = x.double().requires_grad_()
    tolerance = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ubn(x), bn(x), **tolerance)
    bn.train()
    ubn.train()
    ubn_state, bn_state = ubn.state_dict(), bn.state_dict()
    torch.manual_seed(0)
    expected = bn(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ubn(x), expected, **tolerance)
    for key, value in bn_state.items():
        torch.testing.assert_close(ubn_state[key], value, **tolerance, msg=key)


@pytest.mark.parametrize('name', BACKBONES)
def test_norm_eval_and_frozen_stages(name):
    backbone = BACKBONES[name]
    model = build(backbone, 'UBN', norm_eval=True)
    model.train()
    num_training = sum(norm.training for norm in norms_of(model))
    # EfficientNet looks for nn.BatchNorm2d only.
    assert num_training == (backbone.num_norms if 'EfficientNet' in name else 0)

    if backbone.num_frozen is None:
        with pytest.raises(TypeError, match='frozen_stages'):
            build(backbone, 'UBN', frozen_stages=1)
        return
    model = build(backbone, 'UBN', frozen_stages=1)
    model.train()
    frozen = [norm for norm in norms_of(model) if not norm.training]
    assert len(frozen) == backbone.num_frozen
    for norm in norms_of(model):
        # The rectifiers too, so that it stays the BN that it was loaded as.
        trains = not any(norm is other for other in frozen)
        if name == 'MobileNetV2' and norm is model.conv1.bn:
            # mmdet freezes its parameters and leaves its statistics.
            assert norm.training
            trains = False
        assert {p.requires_grad for p in norm.parameters()} == {trains}


@pytest.mark.parametrize('name', ['CSPNeXt-tiny', 'EfficientNet-B0'])
def test_eps_of_the_class_is_not_inherited(name):
    # What the table of the docs warns of: it is another BN then.
    backbone = BACKBONES[name]
    x = torch.randn(2, 3, 64, 64)
    bn = make_trained_bn(backbone, x)
    bn.eval()
    with torch.no_grad():
        expected = bn(x)[-1]
        for norm_cfg, is_same in ((backbone.norm_cfg, True), ({}, False)):
            ubn = build(backbone._replace(norm_cfg=norm_cfg), 'UBN')
            ubn.load_state_dict(copy.deepcopy(bn.state_dict()))
            ubn.eval()
            assert torch.allclose(ubn(x)[-1], expected, rtol=1e-5, atol=1e-5) is is_same

"""Tests of what MMEngine, MMCV and MMDetection do with the layers by name: build, init, decay."""

import subprocess
import sys

import mmdet.models
import mmdet.registry
import mmengine.registry
import mmengine.utils.dl_utils.misc
import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmdet.models.layers import FrozenBatchNorm2d
from mmdet.models.reid.fc_module import FcModule
from mmengine.config import Config
from mmengine.model import constant_init
from mmengine.model.weight_init import initialize
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.utils.dl_utils.misc import has_batch_norm
from torch import nn

import ubn_det
from ubn_det import UBN, CondensationHook, SyncUBN, UBN1d, UBN2d, UBN3d

assert mmdet.models, 'imported for its registrations'

LAYERS = {'UBN': UBN, 'UBN1d': UBN1d, 'UBN2d': UBN2d, 'UBN3d': UBN3d, 'SyncUBN': SyncUBN}
EXTRAS = {'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'}


def extras_of(module):
    """Return name -> value of the parameters that BN does not have."""
    return {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if name.split('.')[-1] in EXTRAS
    }


@pytest.fixture
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize(
    'cfg, error, message',
    [
        (dict(num_groups=2), TypeError, 'num_groups'),
        (dict(affine_kernel=2), ValueError, 'affine_kernel must be odd'),
        (dict(condensation_threshold=2), ValueError, 'condensation_threshold'),
        (dict(on_condensed='running'), ValueError, 'on_condensed'),
        (dict(eps='1e-5'), TypeError, 'eps'),
        (dict(warmup=-1), ValueError, 'warmup'),
        (dict(patience=0), ValueError, 'patience'),
    ],
)
def test_bad_arguments(name, cfg, error, message):
    for kind in (name, LAYERS[name]):
        with pytest.raises(error, match=message):
            build_norm_layer(dict(type=kind, **cfg), 4)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', None])
def test_unknown_name(scope):
    with DefaultScope.overwrite_default_scope(scope), pytest.raises(KeyError, match='Cannot find'):
        build_norm_layer(dict(type='UBN4d'), 4)


@pytest.mark.parametrize('name', LAYERS)
def test_name_is_taken(name):
    with pytest.raises(KeyError, match=f'{name} is already registered'):
        MODELS.register_module(name=name, module=nn.BatchNorm2d)


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', None])
@pytest.mark.parametrize('by', ['name', 'name with scope', 'class'])
def test_build(name, scope, by):
    layer = LAYERS[name]
    kind = {'name': name, 'name with scope': f'mmengine.{name}', 'class': layer}[by]
    with DefaultScope.overwrite_default_scope(scope):
        built = build_norm_layer(dict(type=kind, warmup=7), 4, postfix=1)
    assert built[0] == 'bn1'
    assert type(built[1]) is layer
    assert (built[1].num_features, built[1].eps, built[1].warmup) == (4, 1e-5, 7)


@pytest.mark.parametrize('name', LAYERS)
def test_registered_once_in_the_root(name):
    assert MODELS.module_dict[name] is LAYERS[name]
    assert name not in mmdet.registry.MODELS.module_dict
    assert mmdet.registry.MODELS.get(name) is LAYERS[name]
    assert HOOKS.module_dict['CondensationHook'] is CondensationHook
    assert mmdet.registry.HOOKS.get('CondensationHook') is CondensationHook


@pytest.mark.parametrize('layer', LAYERS.values())
@pytest.mark.parametrize('requires_grad', [True, False])
def test_requires_grad_of_a_config_sets_all_parameters(layer, requires_grad):
    cfg = dict(type=layer, requires_grad=requires_grad, affine_kernel=3)
    _, built = build_norm_layer(cfg, 4)
    assert {name for name, _ in built.named_parameters()} == EXTRAS | {'weight', 'bias'}
    assert {p.requires_grad for p in built.parameters()} == {requires_grad}


@pytest.mark.parametrize('layer', LAYERS.values())
def test_counts_as_batch_norm(layer):
    built = layer(4)
    assert is_norm(built)
    assert not is_norm(built, exclude=UBN)
    assert mmengine.utils.dl_utils.misc.is_norm(built)
    assert has_batch_norm(nn.Sequential(nn.Sequential(built)))


def test_base_of_the_classes():
    # norm_eval, weight decay and initializers by name go by these.
    assert UBN.__bases__ == (nn.modules.batchnorm._BatchNorm,)
    # Else a Runner of one process would turn it into plain BN.
    assert not issubclass(SyncUBN, nn.SyncBatchNorm)


def test_frozen_batch_norm_leaves_ubn():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), UBN(4), SyncUBN(4), nn.BatchNorm2d(4))
    converted = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert [type(m) for m in converted] == [nn.Conv2d, UBN, SyncUBN, FrozenBatchNorm2d]
    assert {p.requires_grad for p in converted[1].parameters()} == {True}


def test_reid_head_of_two_dimensional_input_raises_where_it_cannot_run():
    for norm, dims in (('UBN', None), ('UBN1d', None), ('UBN2d', '4-D')):
        module = FcModule(3, 4, norm_cfg=dict(type=norm))
        x = torch.randn(5, 3)
        if dims is None:
            assert module(x).shape == (5, 4)
        else:
            with pytest.raises(ValueError, match=f'{norm} expects {dims} input'):
                module(x)


IMPORTS = """
import importlib, sys
import mmdet.models
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

def build():
    with DefaultScope.overwrite_default_scope('mmdet'):
        return build_norm_layer(dict(type='UBN'), 4)[1]

try:
    build()
except KeyError as error:
    assert 'Cannot find' in str(error), error
else:
    raise AssertionError('built without an import')

import ubn_det
first = dict(MODELS.module_dict)
for again in (
    lambda: import_modules_from_strings(['ubn_det', 'ubn_det']),
    lambda: import_modules_from_strings('ubn_det', allow_failed_imports=False),
    lambda: importlib.import_module('ubn_det'),
    lambda: importlib.reload(ubn_det),
):
    again()
    assert MODELS.module_dict == first
    assert type(build()) is ubn_det.UBN is first['UBN']
"""


def test_import():
    done = subprocess.run([sys.executable, '-c', IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert all(hasattr(ubn_det, name) for name in ubn_det.__all__)
    assert set(LAYERS) | {'CondensationHook', 'convert_sync_ubn'} <= set(ubn_det.__all__)


def test_custom_imports_in_a_config(tmp_path, mmdet_scope):
    (tmp_path / 'config.py').write_text("""
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['ubn_det'], allow_failed_imports=False)
norm_cfg = dict(type='UBN')
model = dict(
    backbone=dict(depth=18, base_channels=4, norm_cfg=norm_cfg, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8, norm_cfg=norm_cfg))
""")
    for _ in range(2):
        cfg = Config.fromfile(tmp_path / 'config.py')
    parts = [mmdet.registry.MODELS.build(cfg.model[name]) for name in ('backbone', 'neck')]
    assert [sum(isinstance(m, UBN) for m in part.modules()) for part in parts] == [20, 8]
    # The base config asks for requires_grad=True, which is inherited.
    assert cfg.model.backbone.norm_cfg == dict(type='UBN', requires_grad=True)

    text = (tmp_path / 'config.py').read_text()
    (tmp_path / 'misspelt.py').write_text(text.replace("'ubn_det'", "'ubn_dett'"))
    with pytest.raises(ImportError, match='ubn_dett'):
        Config.fromfile(tmp_path / 'misspelt.py')


def decay_of(paramwise_cfg, layer=UBN):
    """Return parameter name -> (weight decay, learning rate) relative to the optimizer's."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), layer(2, affine_kernel=3))
    optimizer = dict(type='SGD', lr=0.1, weight_decay=0.01)
    build = DefaultOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=optimizer), paramwise_cfg
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(group['params'][0])]: (
            round(group['weight_decay'] / 0.01, 6),
            round(group['lr'] / 0.1, 6),
        )
        for group in build(model).optimizer.param_groups
    }


@pytest.mark.parametrize('layer', [UBN, UBN2d, SyncUBN])
def test_all_parameters_follow_norm_decay_mult(layer):
    found = decay_of(
        dict(norm_decay_mult=0.5, bias_decay_mult=0.0, dwconv_decay_mult=0.1, bias_lr_mult=2.0),
        layer,
    )
    # The convolution before it is depthwise; the kernel of the neighbourhood is none to mmengine.
    assert found.pop('0.weight') == (0.1, 1)
    assert found.pop('0.bias') == (0.0, 2)
    assert found == {f'1.{name}': (0.5, 1) for name in EXTRAS | {'weight', 'bias'}}


def test_flat_decay_mult_meets_all_but_the_kernel():
    found = decay_of(dict(flat_decay_mult=0.0))
    assert found['1.neighbour_weight'] == (1, 1)
    flat = EXTRAS - {'neighbour_weight'} | {'weight', 'bias'}
    assert {name: found[f'1.{name}'] for name in flat} == dict.fromkeys(flat, (0, 1))


def test_custom_keys_match_parts_of_names():
    # A key for something else of this name would meet the rectifiers too.
    found = decay_of(dict(norm_decay_mult=0.0, custom_keys={'scale': dict(lr_mult=3.0)}))
    assert found['1.scale_weight'] == found['1.scale_bias'] == (1, 3)
    assert found['1.center_weight'] == found['1.weight'] == (0, 1)


@pytest.mark.parametrize('name', LAYERS)
def test_initializer_of_norms_changes_nothing(name):
    # UBN is met by the name of its base class, the classes derived from it are not: with 1, which
    # all of MMDetection's configs have, both come to the same.
    layer = LAYERS[name](4, affine_kernel=3)
    expected = {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.Sequential(layer)
    for layers in (['_BatchNorm', 'GroupNorm'], 'BatchNorm2d', name):
        initialize(model, dict(type='Constant', val=1, layer=layers))
        torch.testing.assert_close(layer.state_dict(), expected, rtol=0, atol=0)
    initialize(model, dict(type='Constant', val=0.7, layer='_BatchNorm'))
    assert layer.weight.unique().item() == pytest.approx(0.7 if name == 'UBN' else 1)
    constant_init(layer, 0.3, bias=0.2)
    assert layer.weight.unique().item() == pytest.approx(0.3)
    assert layer.bias.unique().item() == pytest.approx(0.2)
    assert all(not value.any() for value in extras_of(layer).values())


def make_resnet(depth, norm, zero_init_residual):
    cfg = dict(
        type='mmdet.ResNet',
        depth=depth,
        base_channels=4,
        norm_cfg=dict(type=norm, affine_kernel=3),
        norm_eval=False,
        zero_init_residual=zero_init_residual,
    )
    return MODELS.build(cfg)


@pytest.mark.parametrize('norm', ['UBN', 'UBN2d', 'SyncUBN'])
@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('zero_init_residual', [True, False])
def test_init_weights_of_resnet_keeps_the_identity(depth, norm, zero_init_residual):
    model = make_resnet(depth, norm, zero_init_residual)
    before = model.layer1[0].conv1.weight.clone()
    model.init_weights()
    last = 'bn2' if depth == 18 else 'bn3'
    blocks = 0
    for name, layer in model.named_modules():
        if isinstance(layer, UBN):
            is_last = name.endswith(last) and name.startswith('layer')
            blocks += is_last
            assert {*layer.weight.tolist()} == {0.0 if is_last and zero_init_residual else 1.0}
            assert not layer.bias.any()
    assert blocks == (8 if depth == 18 else 16)
    extras = extras_of(model)
    assert len(extras) == 4 * sum(isinstance(m, UBN) for m in model.modules())
    assert all(not value.any() for value in extras.values())
    # The convolutions were initialized: the above is not for want of an initializer.
    assert not torch.equal(model.layer1[0].conv1.weight, before)


def test_zero_init_residual_comes_alive():
    model = make_resnet(18, 'UBN', True)
    model.init_weights()
    x = torch.randn(2, 3, 64, 64)
    norm = model.layer1[0].bn2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        assert norm.weight.grad.any()
        # These have the weight as a factor, which is 0 at first, but the kernel has not.
        for name in ('center_weight', 'scale_weight', 'scale_bias'):
            assert getattr(norm, name).grad.any() or step == 0
        assert norm.neighbour_weight.grad.any()
        optimizer.step()


NECKS_AND_HEADS = {
    'FPN': dict(type='FPN', in_channels=[4, 8], out_channels=4, num_outs=2),
    'PAFPN': dict(type='PAFPN', in_channels=[4, 8], out_channels=4, num_outs=2),
    'CSPNeXtPAFPN': dict(
        type='CSPNeXtPAFPN', in_channels=[4, 8, 16], out_channels=4, num_csp_blocks=1
    ),
    'RTMDetHead': dict(type='RTMDetHead', num_classes=2, in_channels=4, feat_channels=4),
    'RTMDetSepBNHead': dict(type='RTMDetSepBNHead', num_classes=2, in_channels=4, feat_channels=4),
    'YOLOV3Head': dict(
        type='YOLOV3Head', num_classes=2, in_channels=[8, 4, 4], out_channels=[8, 4, 4]
    ),
    'RetinaHead': dict(type='RetinaHead', num_classes=2, in_channels=4, feat_channels=4),
    'FCNMaskHead': dict(
        type='FCNMaskHead', num_convs=2, in_channels=4, conv_out_channels=4, num_classes=2
    ),
}


@pytest.mark.parametrize('name', NECKS_AND_HEADS)
def test_init_weights_of_necks_and_heads_keeps_the_identity(name, mmdet_scope):
    model = mmdet.registry.MODELS.build(
        dict(NECKS_AND_HEADS[name], norm_cfg=dict(type='UBN', affine_kernel=3))
    )
    model.init_weights()
    extras = extras_of(model)
    assert len(extras) >= 4
    assert all(not value.any() for value in extras.values())
    for layer in model.modules():
        if isinstance(layer, UBN):
            assert {*layer.weight.tolist()} == {1.0}


def test_init_weights_of_conv_module_keeps_the_identity():
    module = ConvModule(3, 4, 1, norm_cfg=dict(type='UBN', affine_kernel=3))
    assert module.conv.bias is None
    module.init_weights()
    assert all(not value.any() for value in extras_of(module).values())
    assert {*module.norm.weight.tolist()} == {1.0}
    with pytest.warns(UserWarning, match='Unnecessary conv bias before batch'):
        ConvModule(3, 4, 1, norm_cfg=dict(type='UBN'), bias=True)

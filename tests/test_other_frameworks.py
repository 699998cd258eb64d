"""Conversion of models that are not mmdet's: Detectron2's style, timm, torchvision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import UBN, SyncUBN, UBN2d, convert


def randomize(model):
    """Give all norms random parameters and statistics, as after some training."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 1, 0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def check_conversion(model, x):
    """Convert a model of BN, compare, train a step, convert back and compare.

    Returns the names and classes of the norms that were converted.
    """
    randomize(model).eval()
    state = copy.deepcopy(model.state_dict())
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        expected = model(x)
        converted = convert(model, dict(condensation_threshold=None))
        assert converted is model
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    classes = {name: type(model.get_submodule(name)) for name in norms}
    assert all(issubclass(cls, UBN) for cls in classes.values())

    # An old checkpoint goes on to load.
    model.load_state_dict(state)
    back = convert(copy.deepcopy(model), dict(type='BN'))
    with torch.no_grad():
        torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-4)
    assert list(back.state_dict()) == list(state)

    model.train()
    model(x).square().mean().backward()
    extras = [p for n, p in model.named_parameters() if n.endswith('center_weight')]
    assert len(extras) == len(norms)
    assert all(p.grad is not None for p in extras)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match='is not 0, so that no BN is equal to it'):
        convert(model, dict(type='BN'))
    return classes


# Detectron2's style, written by hand: a convolution that holds its norm and activation, and norms
# that a function or its name makes of a number of channels.


def get_norm(norm, out_channels):
    if not norm:
        return None
    if isinstance(norm, str):
        norm = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm, 'FrozenBN': Frozen}[norm]
    return norm(out_channels)


class Frozen(nn.Module):
    """A norm whose statistics and affine step are constants."""

    def __init__(self, num_features):
        super().__init__()
        for name, value in dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0).items():
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Residual(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.shortcut = Conv2d(3, channels, 1, bias=False, norm=get_norm(norm, channels))
        self.conv1 = Conv2d(
            3, channels, 3, padding=1, bias=False, norm=get_norm(norm, channels), activation=F.relu
        )
        self.conv2 = Conv2d(
            channels, channels, 3, padding=1, bias=False, norm=get_norm(norm, channels)
        )

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


def test_detectron2_style_takes_ubn_as_a_function():
    model = Residual(4, lambda channels: UBN2d(channels, condensation_threshold=None))
    reference = Residual(4, 'BN')
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_detectron2_style_is_converted():
    classes = check_conversion(Residual(4, 'BN'), torch.randn(2, 3, 6, 6))
    assert classes == {f'{name}.norm': UBN2d for name in ('shortcut', 'conv1', 'conv2')}


def test_detectron2_style_with_sync_bn_and_frozen_bn():
    model = convert(Residual(4, 'SyncBN'))
    assert [type(model.conv1.norm), type(model.conv2.norm)] == [SyncUBN] * 2
    model = convert(Residual(4, 'FrozenBN'))
    assert type(model.conv1.norm) is Frozen


# torchvision


@pytest.mark.parametrize(
    ('name', 'num_norms'),
    [('resnet18', 20), ('mobilenet_v3_small', 34), ('densenet', 9), ('video.r3d_18', 20)],
)
def test_torchvision_model(extra_packages, name, num_norms):
    import torchvision.models as models

    x = torch.randn(2, 3, 32, 32)
    if name == 'densenet':
        model = models.DenseNet(4, (1, 2), 4, num_classes=4)
    elif name == 'video.r3d_18':
        model, x = models.video.r3d_18(num_classes=4), torch.randn(2, 3, 2, 16, 16)
    else:
        model = getattr(models, name)(num_classes=4)
    assert len(check_conversion(model, x)) == num_norms


def test_torchvision_detector_keeps_its_frozen_bn(extra_packages):
    from torchvision.models import resnet18
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = resnet18(norm_layer=FrozenBatchNorm2d, num_classes=4)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in convert(model).modules()] == before


def test_torchvision_takes_ubn_as_norm_layer(extra_packages):
    from torchvision.models import resnet18

    model = resnet18(norm_layer=UBN2d, num_classes=4)
    model.load_state_dict(resnet18(num_classes=4).state_dict())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


# timm


@pytest.mark.parametrize(
    ('name', 'cls', 'num_norms'),
    [
        ('resnet18', 'UBN2d', 20),
        ('mobilenetv2_035', 'UBNAct2d', 52),
        ('efficientnet_lite0', 'UBNAct2d', 49),
        ('regnetx_002', 'UBNAct2d', 44),
    ],
)
def test_timm_model(extra_packages, name, cls, num_norms):
    import timm

    model = timm.create_model(name, num_classes=4)
    classes = check_conversion(model, torch.randn(2, 3, 32, 32))
    assert {c.__name__ for c in classes.values()} == {cls}
    assert len(classes) == num_norms


def test_timm_model_without_bn_is_passed_through(extra_packages):
    import timm

    model = timm.create_model('convnext_atto', num_classes=4)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in convert(model).modules()] == before
    with pytest.raises(ValueError, match='chooses none of the 0 layers'):
        convert(model, select='*')


@pytest.mark.parametrize('target', ['UBN', 'SyncUBN'])
@pytest.mark.parametrize('training', [True, False])
def test_norm_with_activation_of_timm(extra_packages, target, training):
    from timm.layers import norm_act

    old = norm_act.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    randomize(old).train(training)
    norm_cfg = dict(type=target, condensation_threshold=None)
    new = convert(copy.deepcopy(old), norm_cfg)
    assert [type(new.act), type(new.drop)] == [nn.SiLU, nn.Dropout2d]
    x = torch.randn(3, 4, 5, 5)
    ys = []
    for layer in (old, new):
        torch.manual_seed(3)
        ys.append(layer(x))
    torch.testing.assert_close(*ys)
    back = convert(new, dict(type='BN'))
    assert type(back) is norm_act.BatchNormAct2d
    assert list(back.state_dict()) == list(old.state_dict())
    torch.testing.assert_close(back.eval()(x), old.eval()(x))


def test_synchronized_norm_with_activation_of_timm(extra_packages):
    from timm.layers import norm_act

    model = nn.Sequential(norm_act.BatchNormAct2d(4), nn.BatchNorm2d(4))
    model = norm_act.convert_sync_batchnorm(randomize(model)).eval()
    x = torch.randn(3, 4, 5, 5)
    expected = model(x)
    model = convert(model)
    assert [type(layer).__name__ for layer in model] == ['SyncUBNAct', 'SyncUBN']
    torch.testing.assert_close(model(x), expected)
    model = convert(model, dict(type='SyncBN'))
    assert type(model[0]) is norm_act.SyncBatchNormAct
    torch.testing.assert_close(model(x), expected)


def test_norm_of_timm_that_does_more_is_named(extra_packages):
    from timm.layers import SplitBatchNorm2d

    with pytest.raises(TypeError, match='0: SplitBatchNorm2d is a BatchNorm2d with a forward of'):
        convert(nn.Sequential(SplitBatchNorm2d(4)))

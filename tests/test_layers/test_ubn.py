"""Tests of UBN on one process, its gate aside: values, gradients, inputs, states."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from kernels import needs_kernels
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn

import ubn_det
from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d
from ubn_det.layers.ubn import RECTIFIER_GAIN

EPS = 1e-3

# float64: two orders of summation of at most some ten thousand terms of size 1 to 10.
CLOSE = dict(rtol=1e-10, atol=1e-10)

PLAIN = dict(centering=False, scaling=False, condensation_threshold=None, affine_kernel=1)
CONFIGS = {
    'BN': PLAIN,
    'centering': dict(scaling=False, affine_kernel=1),
    'scaling': dict(centering=False, affine_kernel=1),
    'rectifiers': dict(affine_kernel=1),
    'rectifiers, no affine': dict(affine=False),
    'no affine': dict(affine=False, **PLAIN),
    'neighbourhood': {**PLAIN, 'affine_kernel': 3},
    'all': dict(affine_kernel=3),
}
DETECTOR_SHAPES = [(2, 16, 25, 38), (2, 64, 7, 10), (64, 32, 7, 7), (300, 8, 7, 7), (128, 16)]
ODD_SHAPES = [
    *((5, 4), (3, 4, 7), (2, 3, 2, 3, 4)),
    # One sample; one pixel; one channel; one row; two values per channel.
    *((1, 4, 5, 6), (5, 4, 1, 1), (3, 1, 4, 4), (2, 4, 1, 9), (2, 1, 1, 1), (1, 3, 1, 2)),
]

configs = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
half_types = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)


def layer_class(shape):
    return {2: UBN1d, 3: UBN1d, 4: UBN2d, 5: UBN3d}[len(shape)]


def bn_class(shape):
    return {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]


def build(shape, dtype=torch.float64, **kwargs):
    """Return a layer for inputs of this shape, nothing of it at its initial value."""
    options = {'eps': EPS, 'dtype': dtype, 'condensation_threshold': 0.6, **kwargs}
    layer = layer_class(shape)(shape[1], **options)
    dims = layer.neighbour_weight.dim() - 2 if layer.affine_kernel > 1 else 0
    params = reference.random_params(shape[1], dims, layer.affine_kernel)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name])
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer


def constants(layer):
    """Return what normalizes in evaluation, as float64, or nothing without running statistics."""
    if layer.running_mean is None:
        return ()
    return layer.running_mean.double().clone(), layer.running_var.double().clone()


def expect(layer, x, dy, *statistics):
    """Return the reference output and gradients in float64, of x under the name 'x'."""
    leaves = {'x': x, **dict(layer.named_parameters())}
    leaves = {n: t.detach().double().cpu().requires_grad_() for n, t in leaves.items()}
    y, *_ = reference.ubn(leaves['x'], {**leaves, 'x': None}, layer.eps, *statistics)
    gradients = torch.autograd.grad(y, leaves.values(), dy.double().cpu())
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def gradients_of(y, x, layer, dy):
    leaves = {'x': x, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))


def check(layer, x, *statistics, **close):
    """Compare output and all gradients of one call with the reference."""
    close = close or CLOSE
    x = x.detach().requires_grad_()
    dy = torch.randn_like(x)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    expected, gradients = expect(layer, x, dy, *statistics)
    torch.testing.assert_close(y.detach().double().cpu(), expected, **close)
    for name, actual in gradients_of(y, x, layer, dy).items():
        torch.testing.assert_close(
            actual.double().cpu(), gradients[name], **close, msg=lambda m, n=name: f'{n}: {m}'
        )


def snapshot(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def check_unmoved(module, before):
    torch.testing.assert_close(snapshot(module), before, rtol=0, atol=0)


# Values and gradients


@configs
@pytest.mark.parametrize('shape', ODD_SHAPES + DETECTOR_SHAPES, ids=str)
def test_training(shape, config):
    layer = build(shape, **config)
    # More than one batch: the second meets running statistics that the first has moved.
    for _ in range(2):
        check(layer, torch.randn(shape).double() * 2 + 1)


@configs
@pytest.mark.parametrize('shape', ODD_SHAPES + DETECTOR_SHAPES[-2:], ids=str)
def test_evaluation(shape, config):
    layer = build(shape, **config).eval()
    before = snapshot(layer)
    check(layer, torch.randn(shape).double() * 2 + 1, *constants(layer))
    check_unmoved(layer, before)


@pytest.mark.parametrize('shape', [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1)], ids=str)
@configs
def test_evaluation_of_a_single_value_per_channel(shape, config):
    layer = build(shape, **config).eval()
    check(layer, torch.randn(shape).double(), *constants(layer))


@configs
@pytest.mark.parametrize('training', [True, False])
def test_without_running_statistics_the_batch_normalizes_itself(config, training):
    shape = (3, 4, 5, 6)
    layer = build(shape, track_running_stats=False, **config).train(training)
    assert not list(layer.buffers())
    for _ in range(2):
        check(layer, torch.randn(shape).double() * 2 + 1)


@configs
def test_gradcheck(config, monkeypatch):
    # With another gain what flows to the parameters is no derivative.
    monkeypatch.setattr(ubn_det.layers.ubn, 'RECTIFIER_GAIN', 1)
    shape = (2, 2, 2, 3)
    layer = build(shape, **config)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        params = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, params, (x,))

    x = torch.randn(shape).double().requires_grad_()
    for training in (True, False):
        layer.train(training)
        assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize('config', [CONFIGS['all'], CONFIGS['rectifiers'], PLAIN], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_float32(config, training, device):
    shape = (4, 8, 13, 11)
    layer = build(shape, dtype=torch.float32, **config).to(device).train(training)
    x = torch.randn(shape, device=device) * 2 + 1
    # 2^-24 times the 572 terms of a sum, of size up to about 20.
    check(layer, x, *(() if training else constants(layer)), rtol=1e-4, atol=1e-3)


def test_weight_of_zero_lets_only_its_own_gradient_through():
    shape = (3, 4, 5, 6)
    layer = build(shape, affine_kernel=1)
    nn.init.zeros_(layer.weight)
    x = torch.randn(shape).double().requires_grad_()
    y = layer(x)
    gradients = gradients_of(y, x, layer, torch.randn_like(y))
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all()
        assert bool((gradient != 0).any()) == (name in ('weight', 'bias')), name


def test_two_calls_before_the_backward_pass():
    # As heads do that several feature levels share.
    layer = build((3, 4, 5, 6), affine_kernel=3)
    xs = [torch.randn(3, 4, 5 + i, 6).double().requires_grad_() for i in range(2)]
    ys = [layer(x) for x in xs]
    dys = [torch.randn_like(y) for y in ys]
    actual = torch.autograd.grad(ys, [*xs, *layer.parameters()], dys)
    singles = [expect(layer, x, dy)[1] for x, dy in zip(xs, dys, strict=True)]
    expected = [single.pop('x') for single in singles]
    expected += [sum(single[name] for single in singles) for name in singles[0]]
    torch.testing.assert_close(actual, tuple(expected), **CLOSE)


@pytest.mark.parametrize('config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_an_activation_may_work_in_place(config, training):
    layer = build((3, 4, 5, 6), **config).train(training)
    x = torch.randn(3, 4, 5, 6).double().requires_grad_()
    expected = torch.autograd.grad(F.relu(layer(x)).sum(), x)
    actual = torch.autograd.grad(F.relu_(layer(x)).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Special cases


@pytest.mark.parametrize('shape', [(6, 4), (3, 4, 7), (3, 4, 5, 6), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
def test_bn_is_a_special_case(shape, affine, momentum):
    layer = build(shape, affine=affine, momentum=momentum, **PLAIN)
    bn = bn_class(shape)(shape[1], eps=EPS, momentum=momentum, affine=affine, dtype=torch.float64)
    bn.load_state_dict(layer.state_dict(), strict=False)
    compare_with_bn(layer, bn, shape, **CLOSE)


def compare_with_bn(layer, bn, shape, **close):
    """Compare outputs, gradients and running statistics over batches, then in evaluation."""
    dtype = bn.running_mean.dtype
    for training in (True, True, True, False):
        layer.train(training)
        bn.train(training)
        x = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
        dy = torch.randn_like(x)
        y, y_bn = layer(x), bn(x)
        torch.testing.assert_close(y, y_bn, **close)
        actual, expected = gradients_of(y, x, layer, dy), gradients_of(y_bn, x, bn, dy)
        torch.testing.assert_close({n: actual[n] for n in expected}, expected, **close)
        state, state_bn = layer.state_dict(), bn.state_dict()
        torch.testing.assert_close({n: state[n] for n in state_bn}, state_bn, **close)


@configs
@pytest.mark.parametrize('shape', [(6, 4), (3, 4, 5, 6), (2, 3, 2, 3, 4)], ids=str)
def test_a_new_layer_is_bn(shape, config):
    layer = layer_class(shape)(shape[1], dtype=torch.float64, **config)
    bn = bn_class(shape)(shape[1], affine=layer.affine, dtype=torch.float64)
    compare_with_bn(layer, bn, shape, **CLOSE)


def test_a_new_layer_is_bn_by_default():
    # float32 rounding of values of size up to about 5, and of sums of 960 of them.
    compare_with_bn(UBN(4), nn.BatchNorm2d(4), (8, 4, 10, 12), rtol=1e-5, atol=2e-5)


def test_rbn_is_a_special_case():
    shape = (3, 4, 5, 6)
    layer = build(shape, condensation_threshold=None, affine_kernel=1)
    x = torch.randn(shape).double().requires_grad_()
    params = {
        n: (reference.gain_of(n) * p.detach()).requires_grad_()
        for n, p in layer.named_parameters()
    }
    with torch.no_grad():
        layer.weight /= 2
    y, expected = layer(x), reference.rbn(x, **params, eps=EPS)
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    actual = gradients_of(y, x, layer, dy)
    actual = {n: reference.gain_of(n) * gradient for n, gradient in actual.items()}
    actual['weight'] = actual['weight'] / 2
    leaves = [x, *params.values()]
    expected = dict(zip(actual, torch.autograd.grad(expected, leaves, dy), strict=True))
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_rbn_gate_of_its_own_initial_bias():
    # RBN starts with scale_bias 1: far from this layer's identity, but within its reach.
    x = torch.randn(2, 3, 4, 4).double()
    layer = UBN(3, dtype=torch.float64)
    nn.init.constant_(layer.scale_bias, 1 / RECTIFIER_GAIN)
    nn.init.constant_(layer.weight, 0.5)
    zeros, ones = torch.zeros(3).double(), torch.ones(3).double()
    expected = reference.rbn(x, zeros, zeros, ones, ones, zeros, layer.eps)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize('size', [3, 5])
def test_bnet_is_a_special_case(size):
    shape = (3, 4, 5, 6)
    layer = build(shape, **{**PLAIN, 'affine_kernel': size})
    x = torch.randn(shape).double().requires_grad_()
    kernel = reference.GAIN * layer.neighbour_weight.detach()
    centre = (slice(None), 0, size // 2, size // 2)
    kernel[centre] += layer.weight.detach()
    kernel.requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    y, expected = layer(x), reference.bnet(x, kernel, bias, EPS)
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    d_x, d_kernel, d_bias = torch.autograd.grad(expected, [x, kernel, bias], dy)
    expected = {'x': d_x, 'weight': d_kernel[centre], 'bias': d_bias}
    expected['neighbour_weight'] = d_kernel / reference.GAIN
    torch.testing.assert_close(gradients_of(y, x, layer, dy), expected, **CLOSE)


def test_gain_is_a_step_size(monkeypatch):
    """SGD moves what counts as without a gain, Adam the gain times as far."""
    shape = (3, 4, 5, 6)
    x, dy = torch.randn(shape).double(), torch.randn(shape).double()
    moved = {}
    for optimizer, gain in itertools.product((torch.optim.SGD, torch.optim.Adam), (1, 10)):
        monkeypatch.setattr(ubn_det.layers.ubn, 'RECTIFIER_GAIN', gain)
        layer = UBN2d(shape[1], dtype=torch.float64)
        optimizer(layer.parameters(), lr=1e-3).step(
            lambda layer=layer: (layer(x) * dy).sum().backward()
        )
        moved[optimizer, gain] = [gain * getattr(layer, name) for name in reference.RECTIFIERS]
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    torch.testing.assert_close(moved[sgd, 10], moved[sgd, 1])
    torch.testing.assert_close(moved[adam, 10], [10 * m for m in moved[adam, 1]])


@pytest.mark.parametrize('shape', [(5, 4), (3, 4, 7)], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_neighbourhood_takes_fewer_dimensions_as_a_map_of_height_1(shape, training):
    layer = UBN(4, dtype=torch.float64)
    flat = build((1, 4, 1, 1))
    layer.load_state_dict(flat.state_dict())
    check(
        layer.train(training), torch.randn(shape).double(), *(() if training else constants(layer))
    )


@pytest.mark.parametrize(
    ('kind', 'affine', 'size'),
    [(UBN, True, 3), (UBN2d, True, 3), (SyncUBN, True, 3), (UBN, False, 1), (UBN1d, True, 1)]
    + [(UBN3d, True, 1)],
)
def test_default_neighbourhood(kind, affine, size):
    assert kind(4, affine=affine).affine_kernel == size


# Running statistics


@configs
@pytest.mark.parametrize('momentum', [0.1, 0.7, 1, 0.0, None])
def test_running_statistics(config, momentum):
    shape = (3, 4, 5, 6)
    layer = build(shape, momentum=momentum, **config)
    layer.reset_running_stats()
    gate = reference.GateReference(4, momentum)
    params = dict(layer.named_parameters())
    for i in range(3):
        x = torch.randn(shape).double() * (i + 1) + i
        layer(x)
        gate.step(*reference.statistics(x, params))
        torch.testing.assert_close(layer.running_mean, gate.running_mean, **CLOSE)
        torch.testing.assert_close(layer.running_var, gate.running_var, **CLOSE)
        assert layer.num_batches_tracked == i + 1
    assert layer.num_batches_condensed == 0


def test_momentum_is_the_weight_of_the_batch():
    layer = UBN(1, momentum=0.25, dtype=torch.float64)
    # Mean 3, unbiased variance 8, against 0 and 1 before.
    layer(torch.tensor([[1.0], [5.0]]).double())
    torch.testing.assert_close(layer.running_mean.item(), 0.25 * 3)
    torch.testing.assert_close(layer.running_var.item(), 0.75 + 0.25 * 8)


def test_running_statistics_of_the_centered_input():
    layer = UBN(1, momentum=1.0, dtype=torch.float64)
    nn.init.constant_(layer.center_weight, 0.5 / RECTIFIER_GAIN)
    # Instance means 2 and 4 become 3 and 6; deviations of 1 within each.
    layer(torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]]).double())
    torch.testing.assert_close(layer.running_mean.item(), 4.5)
    torch.testing.assert_close(layer.running_var.item(), (2.5**2 + 0.5**2) * 2 / 3)


# Inputs


@pytest.mark.parametrize('mean', [100, 1000])
def test_accuracy_for_a_large_mean_is_that_of_bn(mean):
    x = torch.randn(4, 8, 32, 32) + mean
    dy = torch.randn_like(x)
    exact, exact_gradients = expect(UBN(8), x, dy)
    error = {}
    for layer in (UBN(8), nn.BatchNorm2d(8)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        error[type(layer)] = [
            (actual.detach() - expected).abs().max().item()
            for actual, expected in ((y, exact), (dx, exact_gradients['x']))
        ]
    for ours, bn in zip(error[UBN], error[nn.BatchNorm2d], strict=True):
        # The rounding of the mean, 2^-24 times it, is in both; the rest is luck.
        assert ours <= 2 * bn + mean * 2**-24


def test_accuracy_of_rectifiers_for_a_large_mean():
    layer = build((4, 8, 32, 32), dtype=torch.float32, affine_kernel=3)
    x = torch.randn(4, 8, 32, 32) + 100
    dy = torch.randn_like(x)
    exact, gradients = expect(layer, x, dy)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    # Centering lifts the mean of instances to about 100 (1 + w_c), of which the rounding is
    # 2^-24; E[x^2] - mean^2 would be off by 1e-3 of the variance.
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(dx.double(), gradients['x'], rtol=1e-4, atol=1e-3)


def doubles(*shape, channels_last=False):
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    return x


LAYOUTS = {
    'channels_last': lambda: doubles(2, 4, 5, 6, channels_last=True),
    'channels_last_3d': lambda: doubles(2, 4, 3, 5, 6, channels_last=True),
    'one pixel, channels_last': lambda: doubles(2, 4, 1, 1, channels_last=True),
    'one channel, channels_last': lambda: doubles(2, 1, 5, 6, channels_last=True),
    'sliced channels, channels_last': lambda: doubles(2, 8, 5, 6, channels_last=True)[:, :4],
    'sliced map, channels_last': lambda: doubles(2, 4, 5, 8, channels_last=True)[..., 1:7],
    'sliced channels': lambda: doubles(2, 8, 5, 6)[:, ::2],
    'sliced map': lambda: doubles(2, 4, 7, 8)[:, :, 1:-1, 2:],
    'transposed map': lambda: doubles(2, 4, 6, 5).transpose(2, 3),
    'transposed batch': lambda: doubles(4, 2, 5, 6).transpose(0, 1),
    'expanded batch': lambda: doubles(1, 4, 5, 6).expand(3, -1, -1, -1),
    'expanded map': lambda: doubles(2, 4, 1, 6).expand(-1, -1, 5, -1),
    'sequence': lambda: doubles(2, 7, 4).transpose(1, 2),
    'vectors': lambda: doubles(4, 6).t(),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=str)
def test_memory_layouts(layout, training, config):
    x = LAYOUTS[layout]()
    layer = build(x.shape, **config).train(training)
    check(layer, x, *(() if training else constants(layer)))
    bn = bn_class(x.shape)(x.shape[1], dtype=torch.float64).train(training)
    assert layer(x).stride() == bn(x).stride()


@pytest.mark.parametrize('config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=str)
@pytest.mark.parametrize('channels_last', [True, False])
def test_memory_layouts_of_the_gradient(config, channels_last):
    x = torch.randn(2, 4, 5, 6).double().requires_grad_()
    layer = build(x.shape, **config)
    # As a sum sends it back, and as a channels_last successor does.
    dy = torch.randn(2, 4, 1, 1).double().expand_as(x)
    if channels_last:
        dy = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
    _, expected = expect(layer, x, dy)
    torch.testing.assert_close(gradients_of(layer(x), x, layer, dy), expected, **CLOSE)


# Half of the distance between neighbours, relative: what one rounding may add.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def check_half(layer, x, exact=None):
    """Check a layer on half-precision input: all is float32, and rounded once where it is kept.

    Args:
        layer (UBN): The layer.
        x (Tensor): Its input.
        exact (UBN, optional): What it should be, for the reference; the layer itself.
    """
    exact = exact or layer
    x = x.detach().requires_grad_()
    dy = torch.randn_like(x)
    y = layer(x)
    expected, gradients = expect(exact, x, dy, *(() if layer.training else constants(exact)))
    found = {'y': y.detach(), **gradients_of(y, x, layer, dy)}
    for name, true in {'y': expected, **gradients}.items():
        kept_in = x.dtype if name in ('x', 'y') else getattr(layer, name).dtype
        assert found[name].dtype == kept_in, name
        # float32 adds its own: 2^-24 times the root of 144 terms, and some for what they are made
        # of, relative to the largest of the channel's terms.
        size = max(true.abs().max().item(), 1)
        torch.testing.assert_close(
            found[name].double(),
            true,
            rtol=ROUNDING[kept_in],
            atol=size * 2**-24 * 64,
            msg=lambda m, n=name: f'{n}: {m}',
        )


HALF_CONFIGS = pytest.mark.parametrize(
    'config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=['BN', 'rectifiers', 'all']
)
HALF_SHAPE = (4, 8, 6, 6)


@half_types
@HALF_CONFIGS
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('of_layer', ['float32', 'half'])
def test_half_precision(dtype, config, training, of_layer, implementation):
    kind = torch.float32 if of_layer == 'float32' else dtype
    layer = build(HALF_SHAPE, dtype=kind, **config).train(training)
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean)} == {kind}
    check_half(layer, torch.randn(HALF_SHAPE).to(dtype))


def damage(name, change):
    def apply(layer):
        with torch.no_grad():
            parameter = getattr(layer, name)
            parameter.copy_(change(parameter))

    return apply


DAMAGES = {
    'weight + 5 %': damage('weight', lambda p: 1.05 * p),
    'scale bias + 0.1': damage('scale_bias', lambda p: p + 0.1 / RECTIFIER_GAIN),
    'centering + 10 %': damage('center_weight', lambda p: 1.1 * p),
    'eps x 50': lambda layer: setattr(layer, 'eps', 50 * layer.eps),
    'bias - 20 %': damage('bias', lambda p: 0.8 * p),
    'no scale weight': damage('scale_weight', torch.zeros_like),
}


@half_types
@pytest.mark.parametrize('affine_kernel', [1, 3])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('harm', DAMAGES.values(), ids=DAMAGES)
def test_half_precision_shows_small_errors(dtype, affine_kernel, training, harm):
    """The check of the test before is as sharp as it looks."""
    exact = build(HALF_SHAPE, dtype=torch.float32, affine_kernel=affine_kernel).train(training)
    layer = copy.deepcopy(exact)
    harm(layer)
    with pytest.raises(AssertionError, match='^y: '):
        check_half(layer, torch.randn(HALF_SHAPE).to(dtype), exact)


@half_types
def test_statistics_of_half_precision_input_are_float32(dtype):
    layer = build((8, 4, 16, 16), dtype=torch.float32, momentum=1.0)
    x = (torch.randn(8, 4, 16, 16) * 300 + 1000).to(dtype)
    layer(x)
    mean, var, count = reference.statistics(
        x.double(), {n: p.double() for n, p in layer.named_parameters()}
    )
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    # float32 and its sums of 2048 terms; half precision would be off by 1e-3 at least, and its
    # squares beyond float16.
    close = dict(rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(layer.running_mean.double(), mean, **close)
    torch.testing.assert_close(layer.running_var.double(), var * count / (count - 1), **close)


@configs
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('wider', ['input', 'layer'])
def test_input_and_parameters_of_different_width(config, training, wider):
    shape = (4, 8, 6, 6)
    types = torch.float32, torch.float64
    layer_type, input_type = types if wider == 'input' else reversed(types)
    layer = build(shape, dtype=layer_type, **config).train(training)
    x = torch.randn(shape, dtype=input_type)
    # The narrower type decides: rounding of sums of 144 values of size up to about 20.
    check(layer, x, *(() if training else constants(layer)), rtol=1e-4, atol=1e-3)


@half_types
@pytest.mark.parametrize('config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_autocast_changes_nothing(dtype, config, training):
    # What the layer is given decides, as with BN: float32 stays float32, half precision stays so.
    layers = [build((6, 8, 6, 6), dtype=torch.float32, **config).train(training)]
    layers.append(copy.deepcopy(layers[0]))
    for input_type in (torch.float32, dtype):
        x = torch.randn(6, 8, 6, 6).to(input_type).requires_grad_()
        dy = torch.randn_like(x)
        results = []
        for layer, enabled in zip(layers, (False, True), strict=True):
            with torch.autocast('cpu', dtype, enabled=enabled):
                y = layer(x)
            results.append((y, gradients_of(y, x, layer, dy), snapshot(layer)))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@half_types
def test_autocast_after_a_convolution(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), UBN(8, affine_kernel=3), nn.Conv2d(8, 4, 1))
    with torch.autocast('cpu', dtype):
        between = model[1](model[0](torch.randn(4, 3, 8, 8)))
        y = model[2](between)
    assert between.dtype == y.dtype == dtype
    y.float().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
    assert model[1].running_var.dtype == torch.float32


# Memory and frozen parameters


@needs_kernels
@pytest.mark.parametrize('config', [PLAIN, CONFIGS['rectifiers'], CONFIGS['all']], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [(2, 64, 50, 76), (64, 64, 14, 14), (64, 64, 7, 7)], ids=str)
def test_the_input_is_the_only_activation_kept(config, dtype, shape):
    layer = UBN(64, **config)
    x = torch.randn(shape).to(dtype).requires_grad_()
    sizes = []
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(t):
        # Parameters are there in any case.
        sizes.append(0 if t.data_ptr() in parameters else t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert x.nbytes <= sum(sizes) <= 1.01 * x.nbytes


NAMES = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
SUBSETS = [s for n in range(1, 7) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize('frozen', SUBSETS, ids='+'.join)
@pytest.mark.parametrize('input_has_gradient', [True, False])
def test_frozen_parameters(frozen, input_has_gradient):
    layer = build((3, 2, 4, 4), affine_kernel=3)
    x = torch.randn(3, 2, 4, 4).double()
    dy = torch.randn_like(x)
    expected, gradients = expect(layer, x, dy)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x.requires_grad_(input_has_gradient)
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    leaves = {n: t for n, t in {'x': x, **dict(layer.named_parameters())}.items()}
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, gradients[name], **CLOSE)
        else:
            assert leaf.grad is None


@configs
@pytest.mark.parametrize('training', [True, False])
def test_no_grad(config, training):
    layer = build((3, 4, 5, 6), **config).train(training)
    x = torch.randn(3, 4, 5, 6).double().requires_grad_()
    expected, _ = expect(layer, x, x, *(() if training else constants(layer)))
    with torch.no_grad():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected, **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, **CLOSE)


# Nothing to normalize


EMPTY_SHAPES = [
    *((0, 4), (0, 4, 7), (2, 4, 0), (0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (0, 4, 0, 0)),
    *((0, 3, 2, 3, 4), (2, 3, 2, 0, 4)),
]


@configs
@pytest.mark.parametrize('shape', EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_empty_input(shape, config, training):
    layer = build(shape, **config).train(training)
    before = snapshot(layer)
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    # Tied to the graph: DistributedDataParallel waits for every parameter.
    for gradient in torch.autograd.grad(y.sum(), [x, *layer.parameters()]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
    check_unmoved(layer, before)


def test_empty_input_without_running_statistics():
    layer = UBN(4, track_running_stats=False)
    y = layer(torch.empty(0, 4, 5, 6))
    assert y.shape == (0, 4, 5, 6)


@configs
@pytest.mark.parametrize('shape', [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize('track, training', [(True, True), (False, True), (False, False)])
def test_a_single_value_cannot_normalize_itself(shape, config, track, training):
    layer = build(shape, track_running_stats=track, **config).train(training)
    before = snapshot(layer)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        layer(torch.randn(shape).double())
    check_unmoved(layer, before)


# Arguments and inputs that are refused


@pytest.mark.parametrize(
    'name, value, error',
    [
        *[('num_features', v, ValueError) for v in (0, -1)],
        *[('num_features', v, TypeError) for v in (2.0, '2', None, True)],
        *[('eps', v, ValueError) for v in (0, 0.0, -1e-5, float('nan'), float('inf'))],
        *[('eps', v, TypeError) for v in (None, '1e-5', True)],
        *[('momentum', v, ValueError) for v in (-0.1, 1.1, float('nan'))],
        *[('momentum', v, TypeError) for v in ('0.1', True)],
        *[('condensation_threshold', v, ValueError) for v in (-1.01, 1.01, float('nan'), 60)],
        *[('condensation_threshold', v, TypeError) for v in ('0.5', 'Auto', False)],
        *[('condensation_z', v, ValueError) for v in (-1, float('nan'), float('inf'))],
        *[('condensation_z', v, TypeError) for v in ('3', None, True)],
        *[('condensation_margin', v, ValueError) for v in (-0.01, 2.1, float('nan'))],
        *[('condensation_margin', v, TypeError) for v in ('0', None, False)],
        *[('on_condensed', v, ValueError) for v in ('running', '', True, 'Freeze')],
        *[('warmup', v, ValueError) for v in (-1,)],
        *[('warmup', v, TypeError) for v in (1.5, None, True, '3')],
        *[('patience', v, ValueError) for v in (0, -1)],
        *[('patience', v, TypeError) for v in (1.5, None, False, float('inf'))],
        *[
            (name, v, TypeError)
            for name in ('affine', 'track_running_stats', 'centering', 'scaling')
            for v in (0, 1, None, 'yes')
        ],
        *[('affine_kernel', v, ValueError) for v in (0, -3, 2, 4)],
        *[('affine_kernel', v, TypeError) for v in (3.0, (3, 3), True)],
    ],
)
def test_bad_arguments(name, value, error):
    with pytest.raises(error, match=name):
        UBN(**{'num_features': 4, name: value})


def test_a_threshold_from_the_scores_needs_a_warmup():
    for warmup in (0, 1):
        with pytest.raises(ValueError, match="warmup=.*'auto'.*Set warmup=2"):
            UBN(4, condensation_threshold='auto', warmup=warmup)


def test_a_neighbourhood_needs_affine():
    with pytest.raises(ValueError, match='affine_kernel.*affine=True'):
        UBN(4, affine=False, affine_kernel=3)


def test_arguments_at_their_limits():
    for kwargs in (
        dict(num_features=1, eps=1e-12, momentum=0, condensation_threshold=-1, warmup=0),
        dict(num_features=np.int64(3), eps=np.float32(1e-5), momentum=np.float64(0.5)),
        dict(num_features=2, momentum=1, condensation_threshold=1, patience=1, affine_kernel=7),
        dict(num_features=2, momentum=None, condensation_threshold=None),
        dict(num_features=2, condensation_threshold='auto', warmup=2, condensation_z=0),
        dict(num_features=2, condensation_threshold=np.str_('auto'), condensation_margin=2),
    ):
        UBN(**kwargs)(torch.randn(3, int(kwargs['num_features']), 4, 4))


def test_options_are_keywords():
    with pytest.raises(TypeError, match='positional'):
        UBN(4, 1e-5, 0.1, True, True, 0.5)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'cls, kwargs, x, error, message',
    [
        (UBN, {}, torch.randn(4), ValueError, 'UBN expects 2-D, 3-D, 4-D, 5-D input.*1-D'),
        (UBN, {}, torch.randn(1, 4, 1, 1, 1, 2), ValueError, 'got 6-D'),
        (UBN1d, {}, torch.randn(2, 4, 3, 3), ValueError, 'UBN1d expects 2-D, 3-D input.*4-D'),
        (UBN2d, {}, torch.randn(2, 4), ValueError, 'UBN2d expects 4-D input.*2-D'),
        (UBN2d, {}, torch.randn(2, 4, 3), ValueError, 'UBN2d expects 4-D input.*3-D'),
        (UBN2d, {}, torch.randn(4, 3, 3), ValueError, 'UBN2d expects 4-D input.*3-D'),
        (UBN3d, {}, torch.randn(2, 4, 3, 3), ValueError, 'UBN3d expects 5-D input.*4-D'),
        (UBN, {}, torch.randn(2, 3, 4, 4), ValueError, 'num_features=4.*3 channels'),
        (UBN, {}, torch.randn(2, 8), ValueError, 'num_features=4.*8 channels'),
        (UBN, {}, torch.randn(0, 3, 4, 4), ValueError, 'num_features=4.*3 channels'),
        (UBN, {}, torch.ones(2, 4, 3, 3, dtype=torch.long), TypeError, 'floating.*int64'),
        (UBN, {}, torch.ones(2, 4, 3, 3, dtype=torch.bool), TypeError, 'floating.*bool'),
        (UBN, {}, torch.ones(2, 4, 3, 3, dtype=torch.cfloat), TypeError, 'floating.*complex'),
        (UBN, {}, torch.ones(2, 4, 3, 3, device='meta'), RuntimeError, 'meta'),
        *[
            (UBN, options, torch.randn(2, 4, 3, 3, 3), ValueError, 'affine_kernel=3 of UBN is a 2')
            for options in ({}, dict(affine_kernel=3))
        ],
    ],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else None,
)
def test_bad_inputs(cls, kwargs, x, error, message, training):
    layer = cls(4, **kwargs).train(training)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer(x)
    check_unmoved(layer, before)


# State


def trained(shape=(3, 4, 5, 6), **kwargs):
    """Return a layer whose parameters, statistics, score and counters all differ from 0."""
    layer = build(shape, **{'warmup': 2, 'patience': 2, 'condensation_threshold': 0.5, **kwargs})
    for i in range(7):
        # Two samples that differ, then three closed batches, of which the third is let through.
        x = torch.randn(2, 1, *shape[2:]).double().expand(2, *shape[1:])
        layer(x if i < 2 else x[:1].expand(2, *shape[1:]))
    # Those of another threshold.
    for name in ('condensation_mean', 'condensation_var', 'num_batches_scored'):
        getattr(layer, name).fill_(3)
    return layer


def test_state_dict_round_trip():
    layer = trained(affine_kernel=3)
    state = layer.state_dict()
    assert list(state) == [
        *('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'),
        *('running_mean', 'running_var', 'num_batches_tracked', 'condensation'),
        *('condensation_mean', 'condensation_var', 'num_batches_condensed'),
        *('num_batches_readmitted', 'consecutive_condensed', 'num_batches_scored'),
    ]
    assert all(bool((t != 0).any()) for t in state.values())
    other = UBN2d(4, eps=EPS, affine_kernel=3, dtype=torch.float64)
    other.load_state_dict(state)
    check_unmoved(other, snapshot(layer))
    x = torch.randn(3, 4, 5, 6).double()
    torch.testing.assert_close(other.eval()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('track', [True, False])
@pytest.mark.parametrize('option', ['centering', 'scaling', 'affine_kernel'])
def test_what_is_off_is_none(affine, track, option):
    off = {'affine_kernel': 1} if option == 'affine_kernel' else {option: False}
    layer = UBN(4, affine=affine, track_running_stats=track, **off)
    expected = dict(
        weight=affine,
        bias=affine,
        center_weight=option != 'centering',
        scale_weight=option != 'scaling',
        scale_bias=option != 'scaling',
        neighbour_weight=affine and option != 'affine_kernel',
    )
    for name in (
        *('running_mean', 'running_var', 'num_batches_tracked', 'condensation'),
        *('num_batches_condensed', 'num_batches_readmitted', 'consecutive_condensed'),
        *('condensation_mean', 'condensation_var', 'num_batches_scored'),
    ):
        expected[name] = track
    for name, there in expected.items():
        assert (getattr(layer, name) is not None) == there, name
        assert (name in layer.state_dict()) == there, name


def test_types_of_parameters_and_buffers():
    layer = UBN3d(4, affine_kernel=5, dtype=torch.float64)
    assert layer.neighbour_weight.shape == (4, 1, 5, 5, 5)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float64
    assert layer.condensation.dtype == torch.float32
    for name, buffer in layer.named_buffers():
        assert (buffer.dtype == torch.long) == (name.startswith(('num_', 'consecutive_')))


@pytest.mark.parametrize(
    'layer',
    [
        UBN(8),
        UBN1d(8, affine=False, track_running_stats=False, condensation_threshold=None),
        UBN2d(3, 1e-3, None, warmup=7, patience=5, centering=False),
        UBN3d(3, scaling=False, affine_kernel=3, condensation_threshold=0.25, momentum=0.5),
        UBN(3, condensation_threshold='auto', condensation_z=2.5, condensation_margin=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_repr_is_the_call_that_makes_the_layer(layer):
    namespace = dict(UBN=UBN, UBN1d=UBN1d, UBN2d=UBN2d, UBN3d=UBN3d)
    again = eval(repr(layer), namespace)
    assert type(again) is type(layer)
    for name, value in vars(layer).items():
        if not name.startswith('_'):
            assert getattr(again, name) == value, name
    assert repr(again) == repr(layer)


def bn_state(affine=True, track=True):
    bn = nn.BatchNorm2d(4, eps=EPS, affine=affine, track_running_stats=track, dtype=torch.float64)
    for parameter in bn.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        bn(torch.randn(3, 4, 5, 6).double() * 2 + 1)
    return bn, bn.state_dict()


def without_metadata(state):
    return dict(state)


def of_an_old_torch(state):
    return {name: t for name, t in state.items() if 'num_batches_tracked' not in name}


@pytest.mark.parametrize('change', [lambda s: s, without_metadata, of_an_old_torch])
@pytest.mark.parametrize('load', ['torch', 'mmengine'])
@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('kwargs', [{}, dict(affine_kernel=3), PLAIN], ids=str)
def test_loading_bn_makes_bn(change, load, new, kwargs):
    bn, _ = bn_state()
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.float64), bn)
    layer = (
        UBN2d(4, eps=EPS, dtype=torch.float64, **kwargs)
        if new
        else trained(**{**kwargs, 'condensation_threshold': 0.5})
    )
    ours = nn.Sequential(copy.deepcopy(model[0]), layer)
    nn.init.zeros_(ours[0].weight)
    state = change(model.state_dict())
    names = list(state)
    if load == 'torch':
        assert str(ours.load_state_dict(state, strict=True)) == '<All keys matched successfully>'
    else:
        mmengine_load_state_dict(ours, state, strict=True)
    # The dictionary is the caller's.
    assert list(state) == names
    for name in ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'):
        parameter = getattr(layer, name)
        assert parameter is None or not parameter.any(), name
    for name in (
        *('condensation', 'condensation_mean', 'condensation_var', 'num_batches_condensed'),
        *('num_batches_readmitted', 'consecutive_condensed', 'num_batches_scored'),
    ):
        assert getattr(layer, name) == 0, name
    if change is not of_an_old_torch:
        assert layer.num_batches_tracked == bn.num_batches_tracked
    x = torch.randn(3, 3, 5, 6).double()
    torch.testing.assert_close(ours.eval()(x), model.eval()(x), **CLOSE)
    torch.testing.assert_close(ours.train()(x), model.train()(x), **CLOSE)
    torch.testing.assert_close(layer.running_var, bn.running_var, **CLOSE)


@pytest.mark.parametrize('affine, track', [(True, False), (False, True)])
def test_loading_bn_without_affine_or_running_statistics(affine, track):
    bn, state = bn_state(affine, track)
    layer = UBN2d(4, EPS, affine=affine, track_running_stats=track, dtype=torch.float64)
    layer.load_state_dict(state, strict=True)
    x = torch.randn(3, 4, 5, 6).double()
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x), **CLOSE)


@pytest.mark.parametrize('missing', ['weight', 'bias', 'running_mean', 'running_var'])
def test_an_incomplete_state_dict_is_refused(missing):
    _, state = bn_state()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        UBN2d(4, dtype=torch.float64).load_state_dict(state)


def test_an_unknown_key_is_refused():
    _, state = bn_state()
    state['centre_weight'] = torch.zeros(4)
    with pytest.raises(RuntimeError, match='Unexpected key.*"centre_weight"'):
        UBN2d(4, dtype=torch.float64).load_state_dict(state)


@pytest.mark.parametrize('kwargs', [{}, PLAIN], ids=str)
def test_bn_does_not_load_ubn(kwargs):
    state = UBN2d(4, **kwargs).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key.*"condensation"'):
        nn.BatchNorm2d(4).load_state_dict(state)


def test_reset_parameters():
    layer = trained(affine_kernel=3)
    layer.reset_parameters()
    check_unmoved(layer, snapshot(UBN2d(4, affine_kernel=3, dtype=torch.float64)))


def test_reset_running_stats():
    layer = trained(affine_kernel=3)
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_running_stats()
    fresh = snapshot(UBN2d(4, affine_kernel=3, dtype=torch.float64))
    check_unmoved(layer, {**fresh, **parameters})


def test_meta_device():
    layer = UBN2d(4, affine_kernel=3, device='meta')
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device='cpu')
    with torch.no_grad():
        # What memory happened to hold.
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(7)
    layer.reset_parameters()
    check_unmoved(layer, snapshot(UBN2d(4, affine_kernel=3)))
    layer(torch.randn(2, 4, 5, 6)).sum().backward()


def test_meta_device_loads_bn():
    _, state = bn_state()
    layer = UBN2d(4, affine_kernel=3, device='meta', dtype=torch.float64)
    layer.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    expected = UBN2d(4, affine_kernel=3, dtype=torch.float64)
    expected.load_state_dict(state)
    check_unmoved(layer, snapshot(expected))


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=['deepcopy', 'pickle', 'save'],
)
def test_copies_after_a_forward(duplicate):
    layer = trained(affine_kernel=3)
    layer(torch.randn(3, 4, 5, 6).double()).sum().backward()
    other = duplicate(layer)
    assert repr(other) == repr(layer)
    before = snapshot(layer)
    check_unmoved(other, before)
    x = torch.randn(3, 4, 5, 6).double()
    y = other(x)
    # The copy has moved, the original has not.
    check_unmoved(layer, before)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    check_unmoved(layer, snapshot(other))


def test_copies_keep_nothing_of_a_forward():
    layer = UBN(64)
    size = len(pickle.dumps(layer))
    layer(torch.randn(4, 64, 8, 8, requires_grad=True))
    assert len(pickle.dumps(layer)) == size

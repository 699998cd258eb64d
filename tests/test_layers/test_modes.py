"""Tests of the layer in every mode: compiled, checkpointed, transformed, odd in memory."""

import copy
import inspect
import pickle

import pytest
import reference
import torch
import torch.utils.checkpoint
from kernels import needs_kernels
from torch import nn
from torch.utils.checkpoint import checkpoint

from ubn_det import UBN, UBN2d
from ubn_det.ops import checkpointing

SHAPE = (3, 4, 5, 6)
# float64: two orders of summation of at most some hundred terms of size 1 to 10.
CLOSE = dict(rtol=1e-10, atol=1e-10)

reentrant = pytest.mark.parametrize('use_reentrant', [True, False])
both = pytest.mark.usefixtures('implementation')


def build(num_features=SHAPE[1], dtype=torch.float64, **kwargs):
    """Return a layer that closes and opens its gate; nothing of it at its initial value."""
    options = dict(condensation_threshold=0.5, warmup=2, patience=2, dtype=dtype)
    layer = UBN(num_features, **{**options, **kwargs})
    params = reference.random_params(num_features, 2, layer.affine_kernel)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name])
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer


def features(shape=SHAPE, alike=0.0, dtype=torch.float64):
    """Return a batch; with ``alike`` near 1 its samples are nearly the same."""
    common = 3 * torch.randn(shape[1:], dtype=dtype)
    return (1 - alike) * torch.randn(shape, dtype=dtype) + alike * common


def expect(layer, x, dy):
    """Return output and gradients of the reference in float64, of x under the name 'x'."""
    leaves = {'x': x, **dict(layer.named_parameters())}
    leaves = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    statistics = ()
    if not layer.training and layer.running_mean is not None:
        statistics = layer.running_mean.double().clone(), layer.running_var.double().clone()
    y, *_ = reference.ubn(leaves['x'], {**leaves, 'x': None}, layer.eps, *statistics)
    gradients = torch.autograd.grad(y, leaves.values(), dy.double())
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def check(layer, x, dy=None, call=None, **close):
    """Compare output and all gradients of one call with the reference."""
    close = close or CLOSE
    x = x.detach().requires_grad_()
    dy = torch.randn_like(x) if dy is None else dy
    expected, gradients = expect(layer, x, dy)
    y = (layer if call is None else call)(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(y.detach().double(), expected, **close)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    for (name, exact), actual in zip(gradients.items(), found, strict=True):
        torch.testing.assert_close(
            actual.double(), exact, **close, msg=lambda m, n=name: f'{n}: {m}'
        )


def snapshot(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def check_unmoved(module, before):
    torch.testing.assert_close(snapshot(module), before, rtol=0, atol=0)


def largest_error(found, exact):
    return (found.detach().double() - exact).abs().max().item()


# Types: as BN


@both
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_sums_of_half_precision_gradients_do_not_overflow(memory_format):
    x = torch.randn(4, 8, 64, 64).half().contiguous(memory_format=memory_format)
    # As BN has it, 65,702 and more: beyond float16.
    dy = (8 * torch.rand(x.shape)).half().contiguous(memory_format=memory_format)
    layer = UBN(8)
    layer(x.requires_grad_()).backward(dy)
    _, gradients = expect(layer, x, dy)
    assert gradients['bias'].max() > torch.finfo(torch.float16).max
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        # Sums of 16384 terms in float32.
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=1e-5, atol=0.01)


@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('autocast', [True, False])
def test_a_new_layer_is_no_less_exact_than_bn(dtype, training, autocast):
    layers = UBN(8), nn.BatchNorm2d(8)
    x = torch.randn(4, 8, 16, 16).to(dtype)
    dy = torch.randn_like(x)
    errors = []
    for layer in layers:
        # In half precision neither of them is what it is in float32.
        nn.init.constant_(layer.weight, 1.003)
        nn.init.constant_(layer.bias, 0.5015)
        layer.train(training)
        leaf = x.clone().requires_grad_()
        expected, gradients = expect(layers[0], x, dy)
        with torch.autocast('cpu', dtype, enabled=autocast):
            y = layer(leaf)
        assert y.dtype == dtype
        y.backward(dy)
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
        pairs = [(y, expected), (leaf.grad, gradients['x'])]
        pairs += [(getattr(layer, n).grad, gradients[n]) for n in ('weight', 'bias')]
        errors.append([largest_error(*pair) for pair in pairs])
    for ours, bn in zip(*errors, strict=True):
        # Float32's share is luck.
        assert ours <= bn * (1 + 1e-3) + 1e-4


@both
def test_default_dtype_of_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = UBN(4, condensation_threshold=0.5, warmup=0)
        assert layer.weight.dtype == torch.float64
        check(layer, features())
        layer(features(alike=1.0))
        assert (layer.num_batches_tracked, layer.num_batches_condensed) == (1, 1)
        # As in a model that was made before.
        narrow = build(dtype=torch.float32)
        check(narrow, features(dtype=torch.float32), rtol=1e-4, atol=1e-3)
    finally:
        torch.set_default_dtype(before)


@both
@pytest.mark.parametrize('training', [True, False])
def test_wide_layer_takes_a_narrow_input(training):
    check(build().train(training), features(dtype=torch.float32), rtol=1e-4, atol=1e-3)


# Sizes


@both
@pytest.mark.parametrize(
    'shape',
    [
        # One value in a plane, one row, one column, maps smaller than the neighbourhood.
        *((5, 4, 1, 1), (2, 4, 1, 9), (2, 4, 1, 33), (2, 4, 9, 1), (2, 4, 2, 2), (2, 4, 7, 2)),
        # About the width of a vector, and past it.
        *((2, 2, 3, w) for w in (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)),
    ],
    ids=str,
)
@pytest.mark.parametrize('affine_kernel', [1, 3, 5])
@pytest.mark.parametrize('training', [True, False])
def test_small_maps(shape, affine_kernel, training):
    layer = build(shape[1], affine_kernel=affine_kernel).train(training)
    check(layer, features(shape))


@both
@pytest.mark.parametrize('shape', [(50000, 4, 1, 1), (50000, 4, 3, 3), (2, 100000, 1, 1)], ids=str)
def test_very_many_planes(shape):
    # Two values of a channel may be nearly the same: eps bounds what that makes of rounding.
    layer = build(shape[1], dtype=torch.float32, eps=0.1)
    x = features(shape, dtype=torch.float32)
    # Sums of up to 450,000 terms of size 10 in float32; those of gradients grow by their root.
    check(layer, x, rtol=1e-4, atol=0.05 if shape[0] > 2 else 1e-2)


@both
@pytest.mark.parametrize(
    'shape', [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (0, 4, 0, 0)], ids=str
)
@pytest.mark.parametrize('training', [True, False])
def test_empty_batches(shape, training):
    layer = build().train(training)
    before = snapshot(layer)
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    # Tied to the graph: DistributedDataParallel waits for every parameter.
    for gradient in torch.autograd.grad(y.sum(), [x, *layer.parameters()]):
        assert not gradient.any()
    check_unmoved(layer, before)


# Values


@both
@pytest.mark.parametrize('offset', [1e4, 1e6])
@pytest.mark.parametrize('shape', [(4, 8, 32, 32), (2, 8, 7, 9)], ids=str)
def test_large_offset_is_no_worse_than_in_bn(offset, shape):
    x = torch.randn(shape) + offset
    dy = torch.randn_like(x)
    layers = UBN(8, momentum=1.0), nn.BatchNorm2d(8, momentum=1.0)
    exact, gradients = expect(layers[0], x, dy)
    var = x.double().transpose(0, 1).flatten(1).var(1)
    errors = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        pairs = [(y, exact), (dx, gradients['x']), (layer.running_var, var)]
        errors.append([largest_error(*pair) for pair in pairs])
    # float32 has steps of 2^-24 of the offset about it: those of the mean are in both, the rest is
    # luck.
    for ours, bn in zip(*errors, strict=True):
        assert ours <= 2 * bn + offset * 2**-24


@both
@pytest.mark.parametrize('scale', [1e-40, 1e-30, 1e-10])
def test_tiny_values(scale):
    # With all of them far under eps the output is a multiple of the input, about 316 times it, for
    # denormals too, whose steps are 1.4e-45.
    close = dict(rtol=1e-5, atol=5e-43)
    x = (torch.randn(SHAPE) * scale).requires_grad_()
    layer, bn = UBN(4), nn.BatchNorm2d(4)
    y, dy = layer(x), torch.randn(SHAPE)
    expected, gradients = expect(layer, x, dy)
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(y, bn(x), **close)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.double(), gradients['x'], rtol=1e-5, atol=1e-3)
    assert layer.num_batches_tracked == 1


@both
@pytest.mark.parametrize('affine_kernel', [1, 3])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_stays_in_its_channel(value, affine_kernel):
    layer = build(affine_kernel=affine_kernel)
    x = features()
    clean = x.clone()
    x[1, 2, 3, 3] = value
    running = layer.running_mean.clone()
    leaves = [t.requires_grad_() for t in (x, clean)]
    dy = torch.randn_like(x)
    found, expected = (
        (layer(t), *torch.autograd.grad(layer(t), [t, layer.bias, layer.weight], dy))
        for t in leaves
    )
    assert not found[0][:, 2].isfinite().any()
    assert not found[1][:, 2].isfinite().any()
    good = [0, 1, 3]
    for a, b in zip(found, expected, strict=True):
        dim = 1 if a.dim() > 1 else 0
        index = torch.tensor(good)
        torch.testing.assert_close(a.index_select(dim, index), b.index_select(dim, index), **CLOSE)
    assert layer.running_mean.isfinite().all()
    assert not torch.equal(layer.running_mean, running)


@both
def test_value_that_is_not_finite_in_evaluation_stays_in_its_neighbourhood():
    layer = build(affine_kernel=3, centering=False, scaling=False).eval()
    x = features((1, 4, 7, 8))
    x[0, 2, 3, 4] = float('nan')
    bad = ~layer(x).isfinite()
    expected = torch.zeros_like(bad)
    expected[0, 2, 2:5, 3:6] = True
    assert torch.equal(bad, expected)


# Memory


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


# Each with an odd storage offset, of what is larger than the features.
VIEWS = {
    'offset': lambda: torch.randn(1 + 360).double()[1:].view(SHAPE),
    'sliced batch': lambda: features((5, 4, 5, 6))[1:4],
    'sliced channels': lambda: features((3, 9, 5, 6))[:, 1::2],
    'sliced map': lambda: features((3, 4, 7, 9))[:, :, 1:6, 3:],
    'transposed map': lambda: features((3, 4, 6, 7)).transpose(2, 3)[:, :, 2:],
    'transposed batch': lambda: features((4, 5, 5, 6)).transpose(0, 1)[1:4],
    'expanded batch': lambda: features((2, 4, 5, 6))[1:].expand(3, -1, -1, -1),
    'expanded map': lambda: features((3, 4, 1, 7))[..., 1:].expand(-1, -1, 5, -1),
    'expanded channels': lambda: features((3, 2, 5, 6))[:, 1:].expand(-1, 4, -1, -1),
    'negated': lambda: torch._neg_view(features()),
    'channels_last': lambda: last(features()),
    'channels_last, sliced batch': lambda: last(features((5, 4, 5, 6)))[1:4],
    'channels_last, sliced channels': lambda: last(features((3, 9, 5, 6)))[:, 1:5],
    'channels_last, sliced map': lambda: last(features((3, 4, 7, 9)))[:, :, 1:6, 3:],
}


@both
@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize('training', [True, False])
def test_views(view, training):
    x = view()
    assert x.shape == SHAPE
    kept = x.clone()
    check(build().train(training), x)
    assert torch.equal(x, kept)


GRADIENTS = {
    # As .sum() sends it back.
    'expanded': lambda: torch.randn(()).double().expand(SHAPE),
    'expanded map': lambda: torch.randn(3, 4, 1, 1).double().expand(SHAPE),
    'transposed': lambda: torch.randn(3, 4, 6, 5).double().transpose(2, 3),
    'contiguous': lambda: torch.randn(SHAPE).double(),
    'channels_last': lambda: last(torch.randn(SHAPE).double()),
    'negated': lambda: torch._neg_view(torch.randn(SHAPE).double()),
}


@both
@pytest.mark.parametrize('gradient', GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize('is_last', [False, True], ids=['contiguous', 'channels_last'])
def test_gradients_in_another_order_than_the_input(gradient, is_last):
    x = last(features()) if is_last else features()
    dy = gradient()
    check(build(), x, dy)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(build()(leaf), leaf, dy)
    assert dx.stride() == x.stride()


@both
def test_activation_in_place_after_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.float64), build())
    x = features((3, 3, 5, 6))
    expected = torch.autograd.grad(model(x).relu().sum(), model.parameters())
    found = torch.autograd.grad(model(x).relu_().sum(), model.parameters())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_kernels
def test_input_changed_in_place_before_the_backward_pass_is_noticed():
    layer, x = build(), features().requires_grad_()
    inner = 2 * x
    y = layer(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


@both
@pytest.mark.parametrize('training', [True, False])
def test_inference_mode(training):
    layer = build().train(training)
    x = features()
    expected, _ = expect(layer, x, torch.zeros_like(x))
    with torch.inference_mode():
        found = layer(x.clone())
    torch.testing.assert_close(found, expected, **CLOSE)
    assert layer.num_batches_tracked == training


NAMES = ('weight', 'bias', *reference.RECTIFIERS)


@both
@pytest.mark.parametrize('frozen', [*NAMES, None, 'all'])
@pytest.mark.parametrize('input_has_gradient', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_each_parameter_frozen_alone(frozen, input_has_gradient, training):
    layer = build().train(training)
    x, dy = features(), torch.randn(SHAPE).double()
    expected, gradients = expect(layer, x, dy)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, 'all'))
    x.requires_grad_(input_has_gradient)
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    leaves = {'x': x, **dict(layer.named_parameters())}
    assert y.requires_grad == any(leaf.requires_grad for leaf in leaves.values())
    if y.requires_grad:
        y.backward(dy)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradients[name], **CLOSE)
        else:
            assert leaf.grad is None


# The graph


@both
def test_second_backward_pass_of_a_graph_that_is_kept():
    layer = build()
    x = features().requires_grad_()
    y, dy = layer(x), torch.randn(SHAPE).double()
    state = snapshot(layer)
    first, second = (
        torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first[0], expect(layer, x, dy)[1]['x'], **CLOSE)
    check_unmoved(layer, state)


def test_second_derivatives_are_refused_by_kernels_and_right_without(implementation):
    layer = build()
    x = features((2, 4, 3, 3)).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    if implementation == 'kernels':
        with pytest.raises(RuntimeError, match='once_differentiable'):
            dx.square().sum().backward()
        return
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    params = {n: p.detach() for n, p in layer.named_parameters()}
    y, *_ = reference.ubn(x, params, layer.eps)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@both
@pytest.mark.parametrize('training', [True, False])
def test_transforms_of_torch_func(training):
    layer = build(condensation_threshold=None, track_running_stats=not training)
    layer.train(training)
    params = {n: p.detach() for n, p in layer.named_parameters()}
    x, dy = features(), torch.randn(SHAPE).double()
    y, gradients = expect(layer, x, dy)

    def loss(params, x):
        return (torch.func.functional_call(layer, params, (x,)) * dy).sum()

    found, d_x = torch.func.grad(loss, argnums=(0, 1))(params, x)
    torch.testing.assert_close({'x': d_x, **found}, gradients, **CLOSE)
    # Forward mode: along one direction, the product with the gradient.
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: loss(params, x), (x,), (direction,))
    torch.testing.assert_close(slope, (gradients['x'] * direction).sum(), **CLOSE)
    # The second derivative.
    (found,) = (torch.func.grad(lambda x: torch.func.grad(loss, 1)(params, x).square().sum())(x),)
    leaf = x.clone().requires_grad_()
    statistics = () if training else (layer.running_mean, layer.running_var)
    expected, *_ = reference.ubn(leaf, params, layer.eps, *statistics)
    (dx,) = torch.autograd.grad(expected, leaf, dy, create_graph=True)
    (expected,) = torch.autograd.grad(dx.square().sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@both
def test_functional_call_equals_autograd():
    layer = build()
    params = {n: torch.randn_like(p).requires_grad_() for n, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict({**layer.state_dict(), **params})
    before = snapshot(layer)
    buffers = {n: b.clone() for n, b in layer.named_buffers()}
    x, dy = features(), torch.randn(SHAPE).double()
    y = torch.func.functional_call(layer, {**params, **buffers}, (x,))
    found = torch.autograd.grad(y, params.values(), dy)
    expected, gradients = expect(other, x, dy)
    torch.testing.assert_close(y, expected, **CLOSE)
    for name, actual in zip(params, found, strict=True):
        torch.testing.assert_close(actual, gradients[name], **CLOSE)
    # It is the buffers given that move.
    check_unmoved(layer, before)
    assert buffers['num_batches_tracked'] == 1


# Copies


@both
@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deep', 'pickle']
)
def test_copies_in_the_middle_of_a_step(duplicate):
    layer = build()
    x = features().requires_grad_()
    y = layer(x)
    other = duplicate(layer)
    check_unmoved(other, snapshot(layer))
    check(other, features())
    # What the layer itself goes back through is its own.
    dy = torch.randn(SHAPE).double()
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy)[0], expect(layer, x, dy)[1]['x'], **CLOSE
    )


# Checkpointing: as without it, and statistics moved once


def blocks():
    """Return layers whose gates begin to watch, and let a batch in, in the middle of training."""
    torch.manual_seed(1)
    convolution = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    return nn.Sequential(convolution, build(), nn.ReLU(), build())


def whole(model, x, use_reentrant):
    return checkpoint(model, x, use_reentrant=use_reentrant)


def layer_by_layer(model, x, use_reentrant):
    for module in model:
        x = checkpoint(module, x, use_reentrant=use_reentrant)
    return x


def nested(model, x, use_reentrant):
    return checkpoint(layer_by_layer, model, x, use_reentrant, use_reentrant=use_reentrant)


def mixed(model, x, use_reentrant):
    return checkpoint(layer_by_layer, model, x, not use_reentrant, use_reentrant=use_reentrant)


def train_both(plain, other, call, num_batches=10):
    """Train two copies on the same batches, the second by ``call``, and compare all they have."""
    for i in range(num_batches):
        x = features(alike=(0, 0, 0, 0.95, 0.95, 0.95, 0.95, 0.2)[i % 8])
        if i == 6:
            x[1, 2, 3, 3] = float('nan')
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        dy = torch.randn_like(x)
        for model, leaf, forward in ((plain, leaves[0], plain), (other, leaves[1], call)):
            model.zero_grad()
            forward(leaf).backward(dy)
        close = dict(**CLOSE, equal_nan=True)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **close)
        for a, b in zip(other.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **close)
        torch.testing.assert_close(snapshot(other), snapshot(plain), **CLOSE)
    layer = next(m for m in plain.modules() if isinstance(m, UBN))
    assert min(layer.num_batches_tracked, layer.num_batches_condensed) > 2


@both
@reentrant
@pytest.mark.parametrize('call', [whole, layer_by_layer, nested, mixed])
def test_checkpointing(call, use_reentrant):
    plain, saving = blocks(), blocks()
    train_both(plain, saving, lambda x: call(saving, x, use_reentrant))


@both
@reentrant
def test_several_calls_in_and_beside_checkpoints(use_reentrant):
    """As heads have it that are shared by several levels."""
    plain, saving = build(warmup=0), build(warmup=0)
    saving.load_state_dict(plain.state_dict())
    xs = [features(alike=a) for a in (0, 0.95, 0.3, 0.9)]
    dys = [torch.randn_like(x) for x in xs]
    found = []
    for layer, call in ((plain, plain), (saving, lambda x: whole(saving, x, use_reentrant))):
        leaves = [x.clone().requires_grad_() for x in xs]
        ys = [call(leaves[0]), call(leaves[1]), layer(leaves[2]), call(call(leaves[3]))]
        torch.autograd.backward(ys, dys)
        found.append(([x.grad for x in leaves], [p.grad for p in layer.parameters()]))
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    check_unmoved(saving, snapshot(plain))
    assert plain.num_batches_tracked + plain.num_batches_condensed == 5


@both
@reentrant
def test_checkpointed_evaluation(use_reentrant):
    layer = build().eval()
    before = snapshot(layer)
    x = features().requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    check_unmoved(layer, before)


@both
def test_second_backward_pass_through_a_checkpoint():
    layer = build()
    x = features().requires_grad_()
    y, dy = checkpoint(layer, x, use_reentrant=False), torch.randn(SHAPE).double()
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert layer.num_batches_tracked == 1


@both
@pytest.mark.parametrize('inner', [None, True, False], ids=['plain', 'reentrant', 'other'])
@pytest.mark.parametrize('outer', [None, True, False], ids=['plain', 'reentrant', 'other'])
def test_training_forward_inside_a_backward_hook_counts(inner, outer):
    """As of a model that is trained from another one's gradient; with a checkpoint in either."""
    layers = build(), nn.BatchNorm2d(4, dtype=torch.float64)
    for layer in layers:
        x = features().requires_grad_()

        def call(x, use_reentrant, layer=layer):
            if use_reentrant is None:
                return layer(x)
            return checkpoint(layer, x, use_reentrant=use_reentrant)

        def hook(gradient, call=call):
            with torch.enable_grad():
                other = features().requires_grad_()
                call(other, inner).sum().backward()
            assert other.grad is not None

        y = call(x, outer)
        y.register_hook(hook)
        y.sum().backward()
    # One forward and that of the hook: BN counts those that are run again, too.
    ours, bn = (layer.num_batches_tracked for layer in layers)
    assert ours == 2
    assert bn == 2 + (inner is not None) + (outer is not None)


@both
@reentrant
def test_hook_inside_a_checkpoint_counts(use_reentrant):
    layer, other = build(), build()

    def function(x):
        y = layer(x)
        if y.requires_grad:
            # In the second run of a reentrant checkpoint; in both of the other kind.
            y.register_hook(lambda gradient: other(features()) * 0 + gradient)
        return 2 * y

    checkpoint(function, features().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert layer.num_batches_tracked == 1
    assert other.num_batches_tracked == 1


def test_what_is_looked_for_is_in_torch():
    """The names in torch by which a second run, and the pass that starts it, are known."""
    module = torch.utils.checkpoint
    assert inspect.getsourcefile(module) == module.__file__
    source = inspect.getsource(module)
    for name in checkpointing._SECOND_RUN:
        assert f'def {name}(' in source
    assert callable(torch.autograd.graph._engine_run_backward)
    assert list(inspect.signature(module.CheckpointFunction.forward).parameters)[0] == 'ctx'
    assert torch._C._current_graph_task_id() == -1


# Compiled


compiled = pytest.mark.parametrize(
    'options',
    [dict(backend=backend, fullgraph=True) for backend in ('eager', 'aot_eager', 'inductor')],
    ids=lambda options: options['backend'],
)


@compiled
def test_compiled(options):
    torch.compiler.reset()
    plain = nn.Sequential(build(), nn.ReLU(), build())
    other = copy.deepcopy(plain)
    train_both(plain, other, torch.compile(other, **options), num_batches=8)


@compiled
@pytest.mark.parametrize('affine_kernel', [1, 3])
@pytest.mark.parametrize('is_last', [False, True], ids=['contiguous', 'channels_last'])
def test_compiled_evaluation(options, affine_kernel, is_last):
    torch.compiler.reset()
    layer = build(affine_kernel=affine_kernel).eval()
    x = last(features()) if is_last else features()
    function = torch.compile(layer, **options)
    check(layer, x, call=function)
    assert function(x).stride() == x.stride()


@compiled
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, nn.Module.requires_grad_])
def test_compiled_without_gradient(options, training, mode):
    torch.compiler.reset()
    layer = build().train(training)
    x = features()
    expected, _ = expect(layer, x, x)
    function = torch.compile(layer, **options)
    if mode is nn.Module.requires_grad_:
        layer.requires_grad_(False)
        y = function(x)
    else:
        with mode():
            y = function(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert not y.requires_grad
    assert layer.num_batches_tracked == training


@compiled
def test_checkpoint_inside_of_what_is_compiled(options):
    torch.compiler.reset()
    plain, saving = blocks(), blocks()
    function = torch.compile(lambda x: whole(saving, x, False), **options)
    train_both(plain, saving, function, num_batches=8)


@compiled
@reentrant
def test_checkpoint_around_what_is_compiled(options, use_reentrant):
    torch.compiler.reset()
    plain, saving = blocks(), blocks()
    function = torch.compile(saving, **options)
    train_both(plain, saving, lambda x: whole(function, x, use_reentrant), num_batches=8)


@needs_kernels
def test_a_compiled_layer_is_one_operator_each_way_and_one_for_its_buffers():
    from torch._dynamo.backends.common import aot_autograd

    torch.compiler.reset()
    seen = {}

    def keep(name):
        def compiler(graph, inputs):
            # What changes its arguments is wrapped, and is the first argument then.
            targets = [(node.target, *node.args[:1]) for node in graph.graph.nodes]
            seen[name] = [t for t in map(str, sum(targets, ())) if t.startswith('ubn_det.')]
            return graph.forward

        return compiler

    backend = aot_autograd(fw_compiler=keep('forward'), bw_compiler=keep('backward'))
    layer = UBN2d(4, condensation_threshold=0.6)
    x = torch.randn(SHAPE, requires_grad=True)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    assert seen['forward'] == ['ubn_det.train.default', 'ubn_det.update.default']
    assert seen['backward'] == ['ubn_det.backward.default']


# ------------------------------------------------------------------------------------------
# Tensors that are not what the layer made
# ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    'name',
    ['weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'],
)
@pytest.mark.parametrize('is_training', [True, False])
def test_parameters_of_another_size_raise(name, is_training):
    layer = build(8).train(is_training)
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[:2].clone()))
    with pytest.raises(RuntimeError):
        layer(features((3, 8, 5, 6)))


@both
@pytest.mark.parametrize('name', ['running_mean', 'running_var'])
@pytest.mark.parametrize('is_training', [True, False])
def test_statistics_of_another_size_raise(name, is_training):
    layer = build(8).train(is_training)
    setattr(layer, name, getattr(layer, name)[:2].clone())
    with pytest.raises(RuntimeError):
        layer(features((3, 8, 5, 6)))


@both
def test_statistics_that_are_a_column_of_a_larger_tensor():
    layer, dense = build(condensation_threshold=None), build(condensation_threshold=None)
    dense.load_state_dict(layer.state_dict())
    store = torch.full((4, 3), 77.0, dtype=torch.float64)
    store[:, 0] = layer.running_mean
    layer.running_mean = store[:, 0]
    x = features()
    layer(x), dense(x)
    assert torch.equal(layer.running_mean, dense.running_mean)
    assert torch.equal(store[:, 1:], torch.full((4, 2), 77.0, dtype=torch.float64))
    assert torch.equal(layer.eval()(x), dense.eval()(x))


@both
def test_a_tangent_outlives_no_grad():
    layer = build().eval()
    x, tangent = features(), features()
    _, expected = torch.func.jvp(layer, (x,), (tangent,))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        actual = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(actual, expected, **CLOSE)


@both
def test_saved_tensors_that_come_back_in_another_layout():
    layer = build()
    x = features().to(memory_format=torch.channels_last).requires_grad_()
    dy = features().to(memory_format=torch.channels_last)
    _, gradients = expect(layer, x, dy)
    stored = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    )
    with stored:
        y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(x.grad, gradients['x'], **CLOSE)

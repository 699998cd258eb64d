"""Tests of the operators that torch sees, and of the gradient around them."""

import pytest
import reference
import torch
from kernels import needs_kernels
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ubn_det.ops import Parameters, Rule, operators, train

pytestmark = needs_kernels

EPS, GAIN = 1e-3, 10.0
CLOSE = dict(rtol=1e-10, atol=1e-10)
NAMES = {
    'none': (),
    'affine': ('weight', 'bias'),
    'rectifiers': ('center_weight', 'scale_weight', 'scale_bias'),
    'all': Parameters._fields,
}
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}

names = pytest.mark.parametrize('names', NAMES.values(), ids=NAMES)
formats = pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)


def make(names, shape=(3, 4, 5, 6), dtype=torch.float64, memory_format=torch.contiguous_format):
    """Return features and the parameters in the order of the operators."""
    wide = torch.promote_types(dtype, torch.float32)
    params = reference.random_params(shape[1], 2, 3, wide)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    return x, [params[n] if n in names else None for n in Parameters._fields]


def calls(names, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Yield each operator with arguments, which differ in what is optional."""
    x, parameters = make(names, dtype=dtype, memory_format=memory_format)
    ops = torch.ops.ubn_det
    options = dict(dtype=torch.promote_types(dtype, torch.float32))
    mean, var = torch.randn(4, **options), torch.rand(4, **options) + 0.5
    yield ops.train.default, (x, parameters, EPS, GAIN, True, None)
    yield ops.evaluate.default, (x, mean, var, parameters, EPS, GAIN)
    m, count = x.to(**options).mean((2, 3)), torch.tensor(90.0, **options)
    for kept, number, has_input_gradient in ((m, count, True), (None, None, False)):
        rest = (kept, mean, var, number, parameters, EPS, GAIN, has_input_gradient, None)
        yield ops.backward.default, (torch.randn_like(x), x, *rest)
    counters = [torch.zeros((), dtype=torch.long) for _ in range(4)]
    scores = [torch.zeros(()) for _ in range(3)]
    buffers = [mean.clone(), var.clone(), torch.tensor(9), scores.pop(), *counters[:3]]
    buffers += [*scores, counters[3]]
    summary = torch.cat([mean, var, torch.tensor([90.0, 1, 6], **options)])
    for rule in (Rule(0.1, 0.5, 0, 3), Rule(0.1, 0.5, 0, 3, z=3.0)):
        yield ops.update.default, ([b.clone() for b in buffers], summary, *rule)


@names
@formats
def test_operators_keep_torch_librarys_rules(names, memory_format):
    # Schema, fake results, autograd registration and AOT dispatch with symbolic shapes.
    for operator, args in calls(names, memory_format=memory_format):
        torch.library.opcheck(operator, args)


@formats
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('names', [NAMES['none'], NAMES['all']], ids=['none', 'all'])
def test_fakes_are_like_the_real_results(names, dtype, memory_format):
    for operator, args in calls(names, dtype, memory_format):
        real = operator(*args)
        with FakeTensorMode() as mode:
            fake = operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True):
            if a is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize('width', [16, 15])
def test_instance_means_are_kept_of_large_maps_alone(width):
    # They are 1/128 of 8 x 16 features; of smaller ones they are taken again in the backward pass.
    x, parameters = make(NAMES['all'], (3, 4, 8, width))
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = train(leaves[0], Parameters(*leaves[1:]), EPS, GAIN)
    assert any(t.shape == x.shape[:2] for t in kept) == (width == 16)
    expected, *_ = reference.ubn(leaves[0], dict(zip(Parameters._fields, leaves[1:])), EPS)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, dy), **CLOSE)


def test_undefined_gradient_is_zero(monkeypatch):
    # And ranks that share the statistics are not left waiting.
    sent = []
    monkeypatch.setattr(operators, 'resolve', lambda name: name)
    monkeypatch.setattr(operators, 'gather', lambda summary, group: summary[None])
    monkeypatch.setattr(operators.dist, 'all_reduce', lambda t, group: sent.append(t.clone()))
    x, parameters = make(NAMES['all'])
    x.requires_grad_()
    y, _ = train(x, Parameters(*parameters), EPS, GAIN, group='a group')

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    # Another path to the input, so that the backward pass has something to do.
    (dx,) = torch.autograd.grad(Undefined.apply(y).sum() + x.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))
    assert len(sent) == 1 and not sent[0].any()


def test_differentiable_once():
    x, parameters = make(NAMES['all'])
    x.requires_grad_()
    y, _ = train(x, Parameters(*parameters), EPS, GAIN)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.square().sum().backward()


def test_forward_mode():
    x, parameters = make(NAMES['all'])
    parameters = Parameters(*parameters)
    tangent = torch.randn_like(x)
    step = 1e-6
    ends = [train(x + s * step * tangent, parameters, EPS, GAIN)[0] for s in (1, -1)]
    with torch.autograd.forward_ad.dual_level():
        y, _ = train(torch.autograd.forward_ad.make_dual(x, tangent), parameters, EPS, GAIN)
        actual = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(actual, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)

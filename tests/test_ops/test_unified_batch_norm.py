"""Tests of the autograd function against the plain composition of operators in float64."""

import sys

import pytest
import reference
import torch

from ubn_det.ops import (
    Buffers,
    Parameters,
    Rule,
    Statistics,
    planes,
    unified_batch_norm,
    unified_batch_norm_training,
)

EPS = 1e-3

# Two orders of summation of a few hundred terms of size 1 to 10.
CLOSE = dict(rtol=1e-10, atol=1e-10)

# Which parameters there are.
RECTIFIERS = {
    'none': (),
    'affine': ('weight', 'bias'),
    'centering': ('center_weight',),
    'scaling': ('scale_weight', 'scale_bias'),
    'rectifiers': ('center_weight', 'scale_weight', 'scale_bias'),
    'rectifiers and affine': ('center_weight', 'scale_weight', 'scale_bias', 'weight', 'bias'),
    'neighbourhood': ('weight', 'bias', 'neighbour_weight'),
    'all': (
        *('center_weight', 'scale_weight', 'scale_bias'),
        *('weight', 'bias', 'neighbour_weight'),
    ),
}
SHAPES = [
    (6, 3),
    (3, 4, 7),
    (3, 4, 5, 6),
    (2, 3, 2, 3, 4),
    (1, 4, 5, 6),
    (5, 4, 1, 1),
    (3, 1, 4, 4),
]

names = pytest.mark.parametrize('names', RECTIFIERS.values(), ids=RECTIFIERS)


def reference_ubn(*args):
    """Take the values themselves, as the operators do."""
    return reference.ubn(*args, gain=1)


def make(shape, names, kernel=3):
    params = reference.random_params(shape[1], len(shape) - 2, kernel, gain=1)
    params = {name: params[name].requires_grad_() for name in names}
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), params


def apply(x, params, mean=None, var=None, opened=True, group=None):
    """Call the function under test as the layer does; return the output and the statistics.

    Given statistics are constants unless ``opened`` is False: then they stand in for the batch's.
    """
    share = None
    if mean is None:
        with torch.no_grad():
            mean, var, count = reference.statistics(x, params, gain=1)
        share = torch.tensor(opened / count, dtype=mean.dtype, device=mean.device)
    elif not opened:
        share = torch.zeros((), dtype=mean.dtype)
    statistics = Statistics(mean, var, share, group)
    m = planes.instance_mean(x.detach())
    return unified_batch_norm(x, Parameters(**params), EPS, statistics, m), mean, var


def grads(y, x, params, dy):
    leaves = {'x': x, **params}
    return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))


def running(num_features):
    return torch.randn(num_features).double(), torch.rand(num_features).double() + 0.5


@names
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['batch', 'given'])
def test_output_and_gradients(shape, names, training):
    if len(shape) == 2 and 'neighbour_weight' in names:
        pytest.skip('the layer gives vectors with a neighbourhood a dimension of their own')
    x, params = make(shape, names)
    given = () if training else running(shape[1])
    y, *_ = apply(x, params, *given)
    expected, *_ = reference_ubn(x, params, EPS, *given)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


@pytest.mark.parametrize('kernel', [3, 5, 7])
def test_kernels_larger_than_the_map(kernel):
    x, params = make((2, 3, 4, 3), RECTIFIERS['all'], kernel)
    y, *_ = apply(x, params)
    expected, *_ = reference_ubn(x, params, EPS)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


@names
def test_gradcheck(names):
    x, params = make((2, 2, 2, 3), names)
    mean, var = running(2)

    def function(x, *values):
        return apply(x, dict(zip(params, values, strict=True)), mean, var)[0]

    assert torch.autograd.gradcheck(function, (x, *params.values()))

    def function_of_batch(x, *values):
        return apply(x, dict(zip(params, values, strict=True)))[0]

    assert torch.autograd.gradcheck(function_of_batch, (x, *params.values()))


@names
@pytest.mark.parametrize('opened', [True, False])
def test_gate_decides_whether_statistics_have_a_gradient(names, opened):
    x, params = make((3, 4, 5, 6), names)
    y, mean, var = apply(x, params, opened=opened)
    given = () if opened else (mean, var)
    expected, *_ = reference_ubn(x, params, EPS, *given)
    dy = torch.randn_like(y)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


def test_a_closed_gate_keeps_a_gradient_that_is_not_finite_out():
    x, params = make((2, 3, 4, 4), RECTIFIERS['rectifiers and affine'])
    with torch.no_grad():
        x[1, 2, 3, 3] = float('nan')
    # Running statistics normalize, and no factor of 0 stands between them and the NaN.
    mean, var = running(3)
    y, *_ = apply(x, params, mean, var, opened=False)
    expected, *_ = reference_ubn(x, params, EPS, mean, var)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx_expected,) = torch.autograd.grad(expected, x, dy)
    assert torch.isfinite(dx_expected[0]).all()
    torch.testing.assert_close(dx, dx_expected, equal_nan=True, **CLOSE)


@names
def test_parts_with_all_reduce_equal_the_whole(names, monkeypatch):
    x, params = make((5, 4, 3, 6), names)
    expected, mean, var = reference_ubn(x, params, EPS)
    dy = torch.randn_like(expected)
    whole = grads(expected, x, params, dy)
    share = torch.tensor(1 / (5 * 3 * 6), dtype=torch.float64)
    statistics = Statistics(mean.detach(), var.detach(), share, 'a group')

    def run(part, all_reduce):
        def collective(t, group):
            assert group == 'a group'
            all_reduce(t)

        monkeypatch.setattr(
            sys.modules[unified_batch_norm.__module__], 'resolve', lambda name: name
        )
        monkeypatch.setattr(torch.distributed, 'all_reduce', collective)
        piece = x[part].detach().requires_grad_()
        m = planes.instance_mean(piece.detach())
        y = unified_batch_norm(piece, Parameters(**params), EPS, statistics, m)
        return y, grads(y, piece, params, dy[part])

    parts = [slice(0, 2), slice(2, 5), slice(5, 5)]
    local = []
    for part in parts:
        run(part, lambda t: local.append(t.clone()))
    assert len(local) == len(parts)
    outputs, gradients = zip(
        *[run(part, lambda t: t.copy_(sum(local))) for part in parts], strict=True
    )
    torch.testing.assert_close(torch.cat(outputs), expected, **CLOSE)
    torch.testing.assert_close(torch.cat([g['x'] for g in gradients]), whole['x'], **CLOSE)
    # That of center_weight too: each part's samples see all of the statistics' gradient.
    for name in params:
        torch.testing.assert_close(sum(g[name] for g in gradients), whole[name], **CLOSE)


@names
@pytest.mark.parametrize('shape', [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)], ids=str)
def test_empty_input_has_zero_gradients(shape, names):
    x, params = make(shape, names)
    y, *_ = apply(x, params, *running(4))
    assert y.shape == x.shape
    for gradient in torch.autograd.grad(y.sum(), [x, *params.values()]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)


def test_float32_accuracy(device):
    x, params = make((4, 8, 16, 16), RECTIFIERS['all'])
    expected, *_ = reference_ubn(x, params, EPS)
    dy = torch.randn_like(expected)
    exact = grads(expected, x, params, dy)
    x = x.detach().float().to(device).requires_grad_()
    params = {n: p.detach().float().to(device).requires_grad_() for n, p in params.items()}
    y, *_ = apply(x, params)
    dy = dy.float().to(device)
    # 2^-24 times the 2304 terms of the longest sum, of size up to about 100.
    close = dict(rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    for name, gradient in grads(y, x, params, dy).items():
        torch.testing.assert_close(gradient.cpu().double(), exact[name], **close)


@pytest.mark.parametrize('names', [RECTIFIERS['all'], RECTIFIERS['rectifiers']], ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features(dtype, names, device):
    x, params = make((4, 8, 6, 6), names)
    x = x.detach().to(dtype).requires_grad_()
    expected, *_ = reference_ubn(x.double(), params, EPS)
    dy = torch.randn_like(expected).to(dtype)
    exact = grads(expected, x, params, dy.double())
    params = {n: p.detach().float().to(device).requires_grad_() for n, p in params.items()}
    leaf = x.detach().to(device).requires_grad_()
    y, *_ = apply(leaf, params)
    assert y.dtype == dtype
    # The neighbourhood's input is rounded to half precision too: two steps of 2^-11 or 2^-8 on
    # values of up to about 10.
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    close = dict(rtol=2 * step, atol=16 * step)
    torch.testing.assert_close(y.cpu().double(), expected, **close)
    got = grads(y, leaf, params, dy.to(device))
    assert got.pop('x').dtype == dtype
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        # Sums of 1152 values, each rounded as above.
        torch.testing.assert_close(
            gradient.cpu().double(), exact[name], rtol=16 * step, atol=128 * step
        )


def test_no_gradient_for_an_input_that_wants_none():
    x, params = make((3, 4, 5, 6), RECTIFIERS['all'])
    y, *_ = apply(x.detach(), params)
    expected, *_ = reference_ubn(x.detach(), params, EPS)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, params.values(), dy),
        torch.autograd.grad(expected, params.values(), dy),
        **CLOSE,
    )


# Instance means of maps of 128 values are kept, those of smaller ones taken again.
@pytest.mark.parametrize('shape', [(3, 4, 8, 16), (3, 4, 127)], ids=str)
def test_small_instance_means_are_not_kept(shape):
    x, params = make(shape, RECTIFIERS['rectifiers and affine'])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, *_ = apply(x, params)
    assert any(t.shape == shape[:2] for t in kept) == (shape[2:] == (8, 16))
    expected, *_ = reference_ubn(x, params, EPS)
    dy = torch.randn_like(y)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


def training_operator(x, params, buffers, rule):
    """Call the training operator itself; return its arguments too, as torch.library checks it."""
    values = [params.get(name) for name in Parameters._fields]
    args = (x, *values, EPS, *(buffers or [None] * len(Buffers._fields)), *rule, None)
    return torch.ops.ubn_det.unified_batch_norm_training.default, args


def make_buffers(num_features):
    counters = [torch.zeros((), dtype=torch.long) for _ in range(3)]
    zero = torch.zeros((), dtype=torch.long)
    return Buffers(*running(num_features), zero, torch.zeros(()), *counters)


@names
@pytest.mark.parametrize('opened', [True, False])
def test_training_operator(names, opened):
    x, params = make((3, 4, 5, 6), names)
    buffers = make_buffers(4)
    before = Buffers(*(b.clone() for b in buffers))
    rule = Rule(0.1, 1.0 if opened else -1.0, 0, 100, False)
    y, m, statistics = unified_batch_norm_training(x, Parameters(**params), EPS, buffers, rule)
    given = () if opened else before[:2]
    expected, mean, var = reference_ubn(x, params, EPS, *given)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)
    torch.testing.assert_close(m, x.detach().mean((2, 3)), **CLOSE)
    torch.testing.assert_close(statistics.mean, mean.detach(), **CLOSE)
    torch.testing.assert_close(statistics.var, var.detach(), **CLOSE)
    assert statistics.share == pytest.approx(1 / 90 if opened else 0)
    assert buffers.num_batches_tracked == opened
    assert buffers.num_batches_condensed == (not opened)
    assert not any(t.requires_grad for t in (m, *statistics[:3]))


@pytest.mark.parametrize('names', RECTIFIERS.values(), ids=RECTIFIERS)
@pytest.mark.parametrize('has_buffers', [True, False])
def test_operators_keep_torch_librarys_rules(names, has_buffers):
    # Schema, fake results, autograd registration and AOT dispatch with symbolic shapes.
    x, params = make((3, 4, 8, 16), names)
    buffers = make_buffers(4) if has_buffers else None
    operator, args = training_operator(x, params, buffers, Rule(0.1, 0.5, 0, 100, False))
    torch.library.opcheck(operator, args)
    y, m, *chosen = operator(*args)
    chosen = [t.clone() for t in chosen]
    values = [params.get(name) for name in Parameters._fields]
    torch.library.opcheck(
        torch.ops.ubn_det.unified_batch_norm.default, (x, *values, EPS, m, *chosen, None)
    )
    x, values = x.detach(), [None if v is None else v.detach() for v in values]
    torch.library.opcheck(
        torch.ops.ubn_det.unified_batch_norm_backward.default,
        (
            torch.randn_like(x),
            x,
            values[0],
            *values[2:],
            m,
            *chosen[:2],
            EPS,
            chosen[2],
            None,
            True,
        ),
    )


def test_undefined_gradient_is_zero(monkeypatch):
    # And the ranks that share the statistics are not left waiting.
    sent = []
    monkeypatch.setattr(sys.modules[unified_batch_norm.__module__], 'resolve', lambda name: name)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda t, group: sent.append(t.clone()))
    x, params = make((3, 4, 5, 6), RECTIFIERS['all'])
    y, *_ = apply(x, params, group='a group')

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    # Another path to the input, so that the backward pass has something to do.
    loss = Undefined.apply(y).sum() + x.sum()
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.equal(dx, torch.ones_like(x))
    assert len(sent) == 1
    assert torch.equal(sent[0], torch.zeros_like(sent[0]))


def test_differentiable_once():
    x, params = make((3, 4, 5, 6), RECTIFIERS['all'])
    y, *_ = apply(x, params)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.square().sum().backward()

"""Tests of the autograd function against the plain composition of operators in float64."""

import pytest
import reference
import torch

from ubn_det.ops import BatchStatistics, planes, unified_batch_norm

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


def make(shape, names, kernel=3):
    params = reference.random_params(shape[1], len(shape) - 2, kernel)
    params = {name: params[name].requires_grad_() for name in names}
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), params


def apply(x, params, mean=None, var=None, **statistics):
    """Call the function under test as the layer does; return the output and the statistics."""
    if mean is not None:
        y = unified_batch_norm(x, planes.instance_mean(x.detach()), mean, var, EPS, **params)
        return y, mean, var
    with torch.no_grad():
        mean, var, count = reference.statistics(x, params)
    y = unified_batch_norm(
        x,
        planes.instance_mean(x.detach()),
        mean,
        var,
        EPS,
        statistics=BatchStatistics(**{'count': count, **statistics}),
        **params,
    )
    return y, mean, var


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
    expected, *_ = reference.ubn(x, params, EPS, *given)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


@pytest.mark.parametrize('kernel', [3, 5, 7])
def test_kernels_larger_than_the_map(kernel):
    x, params = make((2, 3, 4, 3), RECTIFIERS['all'], kernel)
    y, *_ = apply(x, params)
    expected, *_ = reference.ubn(x, params, EPS)
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
    y, mean, var = apply(x, params, gate=torch.tensor(opened))
    given = () if opened else (mean, var)
    expected, *_ = reference.ubn(x, params, EPS, *given)
    dy = torch.randn_like(y)
    torch.testing.assert_close(grads(y, x, params, dy), grads(expected, x, params, dy), **CLOSE)


def test_a_closed_gate_keeps_a_gradient_that_is_not_finite_out():
    x, params = make((2, 3, 4, 4), RECTIFIERS['rectifiers and affine'])
    with torch.no_grad():
        x[1, 2, 3, 3] = float('nan')
    # Running statistics normalize, and no factor of 0 stands between them and the NaN.
    mean, var = running(3)
    statistics = BatchStatistics(32, torch.tensor(False))
    m = planes.instance_mean(x.detach())
    y = unified_batch_norm(x, m, mean, var, EPS, statistics=statistics, **params)
    expected, *_ = reference.ubn(x, params, EPS, mean, var)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx_expected,) = torch.autograd.grad(expected, x, dy)
    assert torch.isfinite(dx_expected[0]).all()
    torch.testing.assert_close(dx, dx_expected, equal_nan=True, **CLOSE)


@names
def test_parts_with_all_reduce_equal_the_whole(names):
    x, params = make((5, 4, 3, 6), names)
    expected, mean, var = reference.ubn(x, params, EPS)
    dy = torch.randn_like(expected)
    whole = grads(expected, x, params, dy)
    mean, var, count = mean.detach(), var.detach(), torch.tensor(5 * 3 * 6.0)

    def run(part, all_reduce):
        piece = x[part].detach().requires_grad_()
        y = unified_batch_norm(
            piece,
            planes.instance_mean(piece.detach()),
            mean,
            var,
            EPS,
            statistics=BatchStatistics(count, None, all_reduce),
            **params,
        )
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
    expected, *_ = reference.ubn(x, params, EPS)
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
    expected, *_ = reference.ubn(x.double(), params, EPS)
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
    expected, *_ = reference.ubn(x.detach(), params, EPS)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, params.values(), dy),
        torch.autograd.grad(expected, params.values(), dy),
        **CLOSE,
    )


def test_differentiable_once():
    x, params = make((3, 4, 5, 6), RECTIFIERS['all'])
    y, *_ = apply(x, params)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.square().sum().backward()

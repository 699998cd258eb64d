"""Tests of the passes over planes, each against the formula of its docstring in float64."""

import pytest
import torch

from ubn_det.ops import planes

SHAPES = [(3, 4), (3, 4, 7), (3, 4, 5, 6), (2, 3, 2, 3, 4), (1, 1, 1, 1), (1, 4, 6, 5), (3, 1, 8)]

# (rtol, atol). float64 and float32: rounding of sums of about a hundred terms. Half precision: the
# result is rounded once, to 11 or 8 bits; what stays in float32 is compared as float32.
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=1e-3, atol=1e-3),
    torch.bfloat16: dict(rtol=8e-3, atol=8e-3),
}
DTYPES = list(TOLERANCE)

shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def spread(t, x):
    """Reshape (N, C) or (C,) so that it broadcasts against x."""
    return t.double().expand(x.shape[:2]).reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def sum_plane(t):
    return t.flatten(2).sum(2) if t.dim() > 2 else t


def rows(shape, dtype, device):
    """Return a random (N, C) tensor of the type statistics have."""
    return torch.randn(shape[:2], dtype=planes.accumulate_dtype(dtype), device=device)


def check(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    'dtype, expected',
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_accumulate_dtype(dtype, expected):
    assert planes.accumulate_dtype(dtype) == expected


@shapes
def test_as_planes(shape):
    x = torch.randn(shape)
    seen = planes.as_planes(x)
    assert seen.shape == (1, shape[0] * shape[1], x[0, 0].numel())
    assert seen.data_ptr() == x.data_ptr()
    torch.testing.assert_close(seen[0, -1], x[-1, -1].flatten(), rtol=0, atol=0)


@shapes
@dtypes
def test_moments(shape, dtype, device):
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype)
    mean, var, _ = planes.moments(x)
    assert mean.shape == var.shape == shape[:2]
    exact = x.double().reshape(*shape[:2], -1)
    kept = planes.accumulate_dtype(dtype)
    check(mean, exact.mean(2), kept)
    check(var, exact.var(2, unbiased=False), kept)
    check(planes.instance_mean(x), exact.mean(2), kept)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_moments_of_half_precision_do_not_overflow(dtype, device):
    x = torch.full((2, 3, 16, 16), 4096.0, device=device)
    x[..., ::2] = -4096.0
    mean, var, _ = planes.moments(x.to(dtype))
    # The squares are far beyond float16 and exact in float32.
    check(mean, torch.zeros(2, 3, device=device).double(), torch.float32)
    check(var, torch.full((2, 3), 4096.0**2, device=device).double(), torch.float32)


def test_moments_of_a_large_mean_do_not_cancel(device):
    x = torch.randn(4, 3, 32, 32, device=device) + 1e4
    _, var, _ = planes.moments(x)
    exact = x.double().flatten(2).var(2, unbiased=False)
    # The mean is rounded to about 1e-3, which adds its square to the variance; E[x^2] - mean^2 in
    # float32 is off by about 10.
    torch.testing.assert_close(var.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize('shape', [(0, 4), (0, 4, 5, 6), (2, 4, 0, 6)], ids=str)
def test_moments_of_nothing_are_zero(shape, device):
    x = torch.empty(shape, device=device)
    zeros = torch.zeros(shape[:2], device=device)
    for moment in (*planes.moments(x)[:2], planes.instance_mean(x)):
        torch.testing.assert_close(moment, zeros, rtol=0, atol=0)


@shapes
@dtypes
def test_affine(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    mean, scale, shift = (rows(shape, dtype, device) for _ in range(3))
    y = planes.affine(x, mean, scale, shift)
    assert y.shape == x.shape
    expected = spread(scale, x) * (x.double() - spread(mean, x)) + spread(shift, x)
    check(y, expected, dtype)


@shapes
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_rescale_of_the_standardized_features(shape, dtype):
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    x[0, 0] = 7.0  # has no variance
    mean, _, standardized = planes.moments(x)
    scale, shift = (rows(shape, dtype, 'cpu') for _ in range(2))
    y = planes.rescale_(standardized, scale, shift)
    assert y.shape == x.shape
    assert y.data_ptr() == standardized.z.data_ptr() != x.data_ptr()
    assert not y._is_view()
    check(y, spread(scale, x) * (x.double() - spread(mean, x)) + spread(shift, x), dtype)


def test_moments_of_constant_planes(device):
    x = torch.full((2, 3, 5, 7), 1e-3, device=device)
    x[1] = 0
    mean, var, _ = planes.moments(x)
    assert torch.equal(mean[1], torch.zeros(3, device=device))
    torch.testing.assert_close(mean[0], x[0, :, 0, 0])
    assert (var[1] == 0).all()
    # What rounding of the mean may leave.
    assert (var[0] < 1e-18).all()


def test_affine_result_is_no_view(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    y = planes.affine(x, *(rows(x.shape, x.dtype, device) for _ in range(3)))
    # An in-place activation after the layer needs to write to it.
    assert not y._is_view()
    assert y.data_ptr() != x.data_ptr()


@shapes
@dtypes
def test_reduce(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    mean = rows(shape, dtype, device)
    sum_dy, sum_dy_xmu = planes.reduce(dy, x, mean)
    kept = planes.accumulate_dtype(dtype)
    check(sum_dy, sum_plane(dy.double()), kept)
    check(sum_dy_xmu, sum_plane(dy.double() * (x.double() - spread(mean, x))), kept)


@shapes
@dtypes
def test_affine_backward(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    mean, scale, shift = (rows(shape, dtype, device) for _ in range(3))
    slope, weight = rows(shape, dtype, device)[0], rows(shape, dtype, device)[0]
    # A zero-initialised residual branch, and with it a scaling gate that is shut.
    weight[0] = 0
    scale = scale.abs()
    dx = planes.affine_backward(dy, x, mean, scale, slope, shift, weight)
    assert dx.shape == x.shape
    expected = spread(scale, x) * dy.double() + spread(shift, x)
    expected = expected + spread(slope, x) * (x.double() - spread(mean, x))
    check(dx, spread(weight, x) * expected, dtype)


def test_affine_backward_without_slope_and_weight(device):
    x, dy = torch.randn(2, 2, 3, 4, 4, device=device).unbind()
    mean, scale, shift = (rows(x.shape, x.dtype, device) for _ in range(3))
    dx = planes.affine_backward(dy, x, mean, scale, None, shift, None)
    torch.testing.assert_close(dx.double(), spread(scale, x) * dy + spread(shift, x))


def test_affine_backward_with_a_scale_of_zero(device):
    x, dy = torch.randn(2, 2, 3, 4, 4, device=device).unbind()
    zeros, ones = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device)
    dx = planes.affine_backward(dy, x, zeros, zeros, ones[0], ones, ones[0])
    torch.testing.assert_close(dx, x + 1, rtol=1e-5, atol=1e-5)

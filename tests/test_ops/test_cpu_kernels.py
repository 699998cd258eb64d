"""Tests of the CPU kernels, step by step, against plain operators in float64.

Both layouts, all types and sizes, the instruction sets that this processor has. What is compared
may differ by rounding errors of the terms that are summed up, no more: :func:`expected` returns
how large these are beside each result.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

kernels = pytest.importorskip(
    'ubn_det.ops._cpu', reason='the CPU kernels are not built', exc_type=ImportError
)

EPS = 1e-3
GAIN = 10.0
NAMES = (*('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'),)
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
CAPABILITY = 'UBN_CPU_CAPABILITY'

SHAPES = [
    (2, 3, 4, 5),
    (5, 7, 7, 7),
    (3, 2, 14, 14),
    (2, 2, 25, 42),
    (1, 3, 30, 33),
    (2, 1, 1, 9),
    (3, 2, 9, 1),
    (2, 2, 2, 2),
    (4, 3, 1, 1),
    (1, 17, 1, 1),
    (2, 33, 3, 2),
    (2, 17, 9, 8),
    (2, 1, 17, 15),
    (3, 33, 1, 4),
    (9, 16, 4, 3),
    (6, 5, 20, 33),
    # More than one band of rows, and blocks of channels.
    (2, 3, 40, 61),
    (2, 600, 9, 4),
]
# What every instruction set is tried on.
CORE = [(5, 7, 7, 7), (2, 33, 3, 2), (2, 17, 9, 8), (2, 3, 40, 61)]

layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
sizes = pytest.mark.parametrize('k', [1, 3, 5])
dtypes = pytest.mark.parametrize(
    'dtype',
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).split('.')[1],
)


def accumulate_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(shape):
    return 'x'.join(map(str, shape))


def shapes(cases):
    return pytest.mark.parametrize('shape', cases, ids=name_of)


# ------------------------------------------------------------------------------------------
# What is expected
# ------------------------------------------------------------------------------------------


def make(shape, k, dtype, layout, names=NAMES):
    """Return x, dy and the parameters, None where they are not in ``names``."""
    x = (torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype)
    dy = (torch.randn(shape, dtype=torch.float64) + 0.1).to(dtype)
    random = reference.random_params(shape[1], 2, k)
    parameters = [
        random[name].to(accumulate_dtype(dtype)).contiguous()
        if name in names and name in random
        else None
        for name in NAMES
    ]
    return x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout), parameters


def expected(x, dy, parameters, statistics=None):
    """Return results in float64 by their names, and how large the summands of each are.

    With ``statistics``, mean and var, these are constants, as in evaluation.
    """
    x, dy = x.double(), dy.double()
    params = {
        name: None if p is None else p.double().clone().requires_grad_()
        for name, p in zip(NAMES, parameters, strict=True)
    }
    is_training = statistics is None
    leaf = x.clone().requires_grad_()
    mean, var = statistics or (None, None)
    y, mean, var = reference.ubn(leaf, params, EPS, mean, var)
    y.backward(dy)
    results = {'y': y, 'mean': mean, 'var': var, 'dx': leaf.grad}
    results |= {f'd_{name}': p.grad for name, p in params.items() if p is not None}

    # The gradients of mean and var alone.
    mean, var = mean.detach().requires_grad_(), var.detach().requires_grad_()
    frozen = {name: None if p is None else p.detach() for name, p in params.items()}
    reference.ubn(x, frozen, EPS, mean, var)[0].backward(dy)
    results['d_statistics'] = torch.stack((mean.grad, var.grad))

    # The rest follows the formulas; so do the sizes, with all terms made positive.
    def column(v):
        return v.detach()[:, None, None]

    n, c, height, width = x.shape
    values = height * width
    m = x.mean((2, 3), keepdim=True)
    u = x - m
    weights = {name: reference.rectifier(frozen, name) for name in reference.RECTIFIERS}
    w_c, w_s, b_s = (
        column(torch.zeros(c).double() if weights[name] is None else weights[name])
        for name in ('center_weight', 'scale_weight', 'scale_bias')
    )
    taps = weights['neighbour_weight']
    weight = column(torch.ones(c).double() if frozen['weight'] is None else frozen['weight'])
    bias = 0 if frozen['bias'] is None else column(frozen['bias'])
    r = column((var + EPS).rsqrt())
    centred = (1 + w_c) * m - column(mean)
    normalized = centred * r
    g = 2 * torch.sigmoid(w_s * normalized + b_s) if weights['scale_weight'] is not None else 1.0
    g = g * torch.ones_like(normalized)

    def spread(v, factor):
        """Through all taps and weight."""
        total = weight.abs() * v if factor else weight * v
        if taps is not None:
            total = total + reference.neighbourhood(v, taps.abs() if factor else taps)
        return total

    h = torch.zeros_like(x).requires_grad_()
    spread(h, 0).backward(dy)
    s0 = h.grad.sum((2, 3))
    s1 = (h.grad * u).sum((2, 3))
    results |= {'m': m[:, :, 0, 0], 'sums': torch.stack((s0, s1))}

    # The mean of z is small beside what it is the difference of.
    centred = ((1 + w_c) * m).abs() + column(mean).abs()
    normalized = centred * r
    h_size = g * r * (u.abs() + centred)
    h = torch.zeros_like(x).requires_grad_()
    spread(h, 1).backward(dy.abs())
    dh = h.grad
    s0, s1 = (v.sum((2, 3), keepdim=True) for v in (dh, dh * u.abs()))
    # Not times 1 - g / 2, which is a difference.
    d_logit = (r * s1 + normalized * s0) * g
    dk = g * s0 + d_logit * w_s.abs()
    d_mean = r[None] * dk.sum(0, keepdim=True)
    d_var = r[None] ** 3 / 2 * (g * s1 + dk * centred).sum(0, keepdim=True)
    share = 1 / (n * values) if is_training else 0
    d_centred = dk * r + values * share * (d_mean + 2 * d_var * centred)
    dy_h = (dy.abs() * h_size).sum((0, 2, 3))
    far = h_size.amax((2, 3), keepdim=True)
    scale = {
        'm': x.abs().mean((2, 3)),
        'mean': ((1 + w_c).abs() * x.abs().mean((2, 3), keepdim=True)).mean((0, 2, 3)),
        'var': column(var)[:, 0, 0] + (x * x).mean((0, 2, 3)) * 1e-2,
        'y': spread(h_size, 1) + abs(bias),
        'sums': torch.stack((s0, s1))[:, :, :, 0, 0],
        'd_statistics': torch.cat((d_mean, d_var))[:, :, 0, 0],
        'd_weight': dy_h,
        'd_bias': dy.abs().sum((0, 2, 3)),
        'd_scale_weight': (d_logit * normalized).sum((0, 2, 3)) / GAIN,
        'd_scale_bias': d_logit.sum((0, 2, 3)) / GAIN,
        'd_center_weight': (d_centred * m.abs()).sum((0, 2, 3)) / GAIN,
        'd_neighbour_weight': ((dy.abs() * far).sum((0, 2, 3)) / GAIN)[:, None, None, None],
        'dx': g * r * dh
        + 2 * d_var * share * u.abs()
        + ((1 + w_c).abs() * d_centred + g * r * s0) / values,
    }
    return {name: value.detach() for name, value in results.items()}, scale


def assert_close(actual, results, scale, dtype):
    """Compare what there is of ``actual`` by its names."""
    info = torch.finfo(accumulate_dtype(dtype))
    rounding = 64 * info.eps
    for name, value in actual.items():
        bound = rounding * (scale[name] + info.smallest_normal).expand_as(results[name])
        if name in ('y', 'dx') and dtype in (torch.bfloat16, torch.float16):
            assert value.dtype == dtype
            info = torch.finfo(dtype)
            bound = bound + results[name].abs() * info.eps / 2 + info.smallest_normal * info.eps
        excess = (value.double() - results[name]).abs() / (bound + 1e-300)
        worst = int(excess.argmax())
        assert excess.flatten()[worst] <= 1, (
            f'{name} is off by {excess.max():.3g} times what rounding explains: '
            f'{value.flatten()[worst]:.9g} for {results[name].flatten()[worst]:.9g} at {worst}'
        )


def named_gradients(gradients, names=NAMES):
    return {
        f'd_{name}': gradient
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }


def statistics_of(summary):
    channels = len(summary) // 2 - 1
    return summary[:channels].clone(), summary[channels : 2 * channels].clone()


def split_backward(x, dy, parameters, m, statistics, is_training):
    """Run the backward pass as it is around a collective."""
    kept, sums, d_statistics, *gradients = kernels.reduce(
        dy, x, m, *statistics, parameters, EPS, GAIN
    )
    share = x.shape[1] / x.numel()
    dx, d_center_weight = kernels.input_gradient(
        *(dy, x, kept, *statistics, parameters, sums),
        *(d_statistics if is_training else None, share, EPS, GAIN),
    )
    gradients.insert(2, d_center_weight)
    return dx, gradients, kept, sums, d_statistics


def check_training(x, dy, parameters):
    """Compare every step of a training iteration; return the results."""
    results, scale = expected(x, dy, parameters)
    dtype = x.dtype

    y, m, summary = kernels.train(x, parameters, EPS, GAIN, True)
    statistics = statistics_of(summary)
    mean, var = statistics
    assert_close(dict(y=y, m=m, mean=mean, var=var), results, scale, dtype)
    assert y.is_contiguous() == x.is_contiguous()
    count = x.numel() / x.shape[1]
    assert summary[-3] == count
    assert torch.equal(kernels.train(x, parameters, EPS, GAIN, False)[0], y)

    m_alone, summary_alone = kernels.moments(x, parameters[2], GAIN, True)
    mean_alone, var_alone = statistics_of(summary_alone)
    assert_close(dict(m=m_alone, mean=mean_alone, var=var_alone), results, scale, dtype)
    assert torch.equal(summary_alone[-3::2], summary[-3::2])
    y_alone = kernels.normalize(x, m, mean, var, parameters, EPS, GAIN)
    assert_close(dict(y=y_alone), results, scale, dtype)

    for known in (m, None):
        dx, gradients = kernels.backward(
            dy, x, known, mean, var, parameters, True, True, EPS, GAIN
        )
        assert_close(dict(dx=dx, **named_gradients(gradients)), results, scale, dtype)
        assert dx.is_contiguous() == x.is_contiguous()
        dx, gradients, kept, sums, d_statistics = split_backward(
            x, dy, parameters, known, statistics, True
        )
        assert_close(
            dict(
                dx=dx, m=kept, sums=sums, d_statistics=d_statistics, **named_gradients(gradients)
            ),
            *(results, scale, dtype),
        )
    _, without_dx = kernels.backward(dy, x, m, mean, var, parameters, True, False, EPS, GAIN)
    assert_close(named_gradients(without_dx), results, scale, dtype)
    return results, scale


def check_evaluation(x, dy, parameters):
    channels, acc = x.shape[1], accumulate_dtype(x.dtype)
    mean, var = torch.randn(channels, dtype=acc), torch.rand(channels, dtype=acc) + 0.5
    results, scale = expected(x, dy, parameters, (mean.double(), var.double()))
    y = kernels.evaluate(x, mean, var, parameters, EPS, GAIN)
    assert y.is_contiguous() == x.is_contiguous()
    dx, gradients = kernels.backward(dy, x, None, mean, var, parameters, False, True, EPS, GAIN)
    assert_close(dict(y=y, dx=dx, **named_gradients(gradients)), results, scale, x.dtype)
    dx, gradients, *_ = split_backward(x, dy, parameters, None, (mean, var), False)
    assert_close(dict(dx=dx, **named_gradients(gradients)), results, scale, x.dtype)


# ------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------


@layouts
@sizes
@dtypes
class TestSteps:
    @shapes(CORE)
    def test_core(self, shape, dtype, k, layout):
        case = make(shape, k, dtype, layout)
        check_training(*case)
        check_evaluation(*case)

    @shapes([shape for shape in SHAPES if shape not in CORE])
    def test_shapes(self, shape, dtype, k, layout):
        case = make(shape, k, dtype, layout)
        check_training(*case)
        check_evaluation(*case)


@layouts
@pytest.mark.parametrize('k', [1, 3])
class TestParameters:
    @pytest.mark.parametrize(
        'absent',
        [
            *[(name,) for name in NAMES if not name.startswith('scale')],
            ('scale_weight', 'scale_bias'),
            ('center_weight', 'scale_weight', 'scale_bias'),
            ('weight', 'bias'),
            NAMES,
        ],
        ids='+'.join,
    )
    def test_absent(self, absent, k, layout):
        names = [name for name in NAMES if name not in absent]
        case = make((3, 5, 6, 7), k, torch.float32, layout, names)
        check_training(*case)
        check_evaluation(*case)

    def test_all_zero(self, k, layout):
        x, dy, parameters = make((3, 5, 6, 7), k, torch.float32, layout)
        parameters = [p if p is None else torch.zeros_like(p) for p in parameters]
        check_training(x, dy, parameters)
        check_evaluation(x, dy, parameters)

    def test_new_layer_is_bn(self, k, layout):
        x, dy, parameters = make((3, 5, 6, 7), k, torch.float32, layout)
        rectifiers = [p if p is None else torch.zeros_like(p) for p in parameters[2:]]
        y, _, summary = kernels.train(x, [*parameters[:2], *rectifiers], EPS, GAIN, False)
        torch.testing.assert_close(
            y, torch.nn.functional.batch_norm(x, None, None, *parameters[:2], True, 0.0, EPS)
        )


@layouts
@dtypes
@pytest.mark.parametrize('name', NAMES)
def test_an_error_of_5_percent_in_a_parameter_is_seen(name, dtype, layout):
    """The tolerances would see it in y, or in dx where y does not depend on it."""
    x, dy, parameters = make((3, 5, 6, 7), 3, dtype, layout)
    results, scale = expected(x, dy, parameters)
    wrong = list(parameters)
    index = NAMES.index(name)
    wrong[index] = wrong[index] * 1.05
    y, m, summary = kernels.train(x, wrong, EPS, GAIN, False)
    with pytest.raises(AssertionError, match='off by'):
        assert_close(dict(y=y), results, scale, dtype)
    statistics = results['mean'].to(m.dtype), results['var'].to(m.dtype)
    dx, gradients = kernels.backward(dy, x, None, *statistics, wrong, True, True, EPS, GAIN)
    with pytest.raises(AssertionError, match='off by'):
        # bias moves no gradient.
        seen = dict(y=y) if name == 'bias' else dict(dx=dx)
        assert_close(seen, results, scale, dtype)


@layouts
@dtypes
def test_an_error_of_5_percent_in_a_gradient_is_seen(dtype, layout):
    x, dy, parameters = make((3, 5, 6, 7), 3, dtype, layout)
    results, scale = expected(x, dy, parameters)
    for name in ('m', 'mean', 'var', 'sums', 'd_statistics', *(f'd_{name}' for name in NAMES)):
        with pytest.raises(AssertionError, match='off by'):
            assert_close({name: results[name] * 1.05}, results, scale, dtype)


# ------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------


@layouts
@dtypes
class TestScores:
    def score(self, x):
        m, summary = kernels.moments(x, None, GAIN, True)
        return summary[-2].item() / summary[-1].item()

    @shapes([(2, 3, 4, 5), (4, 17, 9, 8), (5, 33, 6, 2), (9, 2, 7, 7), (3, 40, 25, 31)])
    def test_is_mean_cosine(self, shape, dtype, layout):
        x = make(shape, 1, dtype, layout)[0]
        expected_score = reference.condensation_score(x.double()).item()
        eps = torch.finfo(accumulate_dtype(dtype)).eps
        assert self.score(x) == pytest.approx(expected_score, abs=64 * eps)

    @pytest.mark.parametrize('num', [2, 4, 5, 9])
    def test_sample_of_zeros(self, num, dtype, layout):
        x = make((num, 5, 6, 7), 1, dtype, layout)[0]
        x[1] = 0
        expected_score = reference.condensation_score(x.double()).item()
        eps = torch.finfo(accumulate_dtype(dtype)).eps
        assert self.score(x) == pytest.approx(expected_score, abs=64 * eps)

    @pytest.mark.parametrize('num', [2, 4, 5, 9])
    def test_equal_samples(self, num, dtype, layout):
        x = make((1, 5, 6, 7), 1, dtype, layout)[0].expand(num, -1, -1, -1)
        x = x.contiguous(memory_format=layout)
        assert self.score(x) == pytest.approx(1, abs=1e-5)

    def test_one_sample_has_none(self, dtype, layout):
        x = make((1, 5, 6, 7), 1, dtype, layout)[0]
        _, summary = kernels.moments(x, None, GAIN, True)
        assert summary[-2:].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------
# Values that are hard
# ------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize('k', [1, 3])
class TestValues:
    @shapes([(2, 20, 3, 4), (3, 5, 40, 41), (2, 33, 120, 110)])
    def test_offset(self, shape, k, layout):
        """A mean of 1e6 beside a deviation of 1: the sum of squares would have no digit left."""
        x, _, parameters = make(shape, k, torch.float32, layout)
        x = x + 1e6
        wide = x.double()
        expected_m = wide.mean((2, 3))
        m, summary = kernels.moments(x, None, GAIN, False)
        mean, var = statistics_of(summary)
        # Two numbers of float32 are 1/16 apart here: m is rounded once, and their mean once more.
        torch.testing.assert_close(m.double(), expected_m, rtol=0, atol=0.04)
        torch.testing.assert_close(mean.double(), expected_m.mean(0), rtol=0, atol=0.07)
        expected_var = wide.var((0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), expected_var, rtol=0, atol=0.03)

    @pytest.mark.parametrize('first', [0.0, 1e4])
    def test_first_pixels_unlike_the_rest(self, first, k, layout):
        """What deviations are taken from must not matter."""
        x, _, _ = make((2, 5, 40, 41), k, torch.float32, layout)
        x = x + 1e3
        x[:, :, 0, :8] = first
        _, summary = kernels.moments(x, None, GAIN, False)
        expected_var = x.double().var((0, 2, 3), correction=0)
        torch.testing.assert_close(
            statistics_of(summary)[1].double(), expected_var, rtol=3e-5, atol=0
        )

    def test_denormals(self, k, layout):
        x, dy, parameters = make((2, 17, 6, 7), k, torch.float32, layout)
        x = x * 1e-40
        assert 0 < x.abs().max() < torch.finfo(torch.float32).smallest_normal
        check_training(x, dy, parameters)
        check_evaluation(x, dy, parameters)

    def test_scores_of_denormals(self, k, layout):
        for seed in range(60):
            torch.manual_seed(seed)
            x, _, parameters = make((2, 17, 9, 8), k, torch.float32, layout)
            _, summary = kernels.moments(x * 1e-44, parameters[2], GAIN, True)
            assert summary.isfinite().all()

    @pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=['nan', 'inf'])
    @pytest.mark.parametrize('where', [(1, 4, 0, 0), (0, 20, 3, 2), (1, 32, 8, 6)], ids=str)
    def test_stays_in_its_channel(self, where, value, k, layout):
        x, dy, parameters = make((2, 33, 9, 7), k, torch.float32, layout)
        bad = x.clone(memory_format=torch.preserve_format)
        bad[where] = value
        others = [c for c in range(x.shape[1]) if c != where[1]]

        def results(x):
            y, m, summary = kernels.train(x, parameters, EPS, GAIN, False)
            mean, var = statistics_of(summary)
            dx, gradients = kernels.backward(
                dy, x, m, mean, var, parameters, True, True, EPS, GAIN
            )
            ones = torch.ones_like(mean)
            z = kernels.evaluate(x, ones, ones, parameters, EPS, GAIN)
            by_channel = [v.transpose(0, 1) for v in (y, m, dx, z)]
            return [*by_channel, mean, var, *[g for g in gradients if g is not None]]

        for good, spoilt in zip(results(x), results(bad), strict=True):
            assert torch.equal(good[others], spoilt[others])
        y, m, summary = kernels.train(bad, parameters, EPS, GAIN, False)
        assert y[:, where[1]].isnan().all()
        assert not summary[where[1]].isfinite()

    def test_evaluation_without_rectifiers_spoils_neighbours_only(self, k, layout):
        names = ('weight', 'bias', 'neighbour_weight')
        x, _, parameters = make((1, 17, 9, 8), k, torch.float32, layout, names)
        x[0, 3, 4, 0] = float('nan')
        x[0, 16, 8, 7] = float('nan')
        ones = torch.ones(17)
        y = kernels.evaluate(x, ones, ones, parameters, EPS, GAIN)
        spoilt = torch.zeros(1, 17, 9, 8, dtype=torch.bool)
        p = k // 2
        spoilt[0, 3, 4 - p : 5 + p, : 1 + p] = True
        spoilt[0, 16, 8 - p :, 7 - p :] = True
        assert torch.equal(y.isnan(), spoilt)


# ------------------------------------------------------------------------------------------
# Threads, sizes, layouts
# ------------------------------------------------------------------------------------------


def all_results(x, dy, parameters):
    y, m, summary = kernels.train(x, parameters, EPS, GAIN, True)
    mean, var = statistics_of(summary)
    dx, gradients = kernels.backward(dy, x, m, mean, var, parameters, True, True, EPS, GAIN)
    again, _ = kernels.backward(dy, x, None, mean, var, parameters, False, True, EPS, GAIN)
    z = kernels.evaluate(x, mean, var, parameters, EPS, GAIN)
    split = split_backward(x, dy, parameters, m, (mean, var), True)
    results = [y, m, summary, dx, again, z, *gradients, split[0], *split[1], *split[2:]]
    return [result for result in results if result is not None]


@layouts
@sizes
@dtypes
@shapes([(2, 3, 40, 61), (5, 33, 7, 7), (2, 600, 9, 4), (1, 40, 64, 33)])
def test_same_bytes_for_any_number_of_threads(shape, dtype, k, layout):
    case = make(shape, k, dtype, layout)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(all_results(*case))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for result, first in zip(run, runs[0], strict=True):
            assert torch.equal(result, first)


@layouts
@sizes
@shapes([(3, 17, 7, 7), (2, 33, 30, 41), (2, 600, 9, 4)])
def test_split_steps_are_those_of_one_process(shape, k, layout):
    x, dy, parameters = make(shape, k, torch.float32, layout)
    y, m, summary = kernels.train(x, parameters, EPS, GAIN, False)
    statistics = statistics_of(summary)
    assert torch.equal(kernels.normalize(x, m, *statistics, parameters, EPS, GAIN), y)
    dx, gradients = kernels.backward(dy, x, m, *statistics, parameters, True, True, EPS, GAIN)
    split_dx, split_gradients, *_ = split_backward(x, dy, parameters, m, statistics, True)
    torch.testing.assert_close(split_dx, dx, rtol=1e-6, atol=1e-7)
    for split, fused in zip(split_gradients, gradients, strict=True):
        if fused is not None:
            torch.testing.assert_close(split, fused, rtol=1e-6, atol=1e-7)


def test_large_results():
    """They are written past the caches in channels last."""
    x, dy, parameters = make((1, 64, 363, 365), 3, torch.float32, torch.channels_last)
    assert x.numel() * 4 > 32 << 20
    flat = x.contiguous(), dy.contiguous()
    y, m, summary = kernels.train(x, parameters, EPS, GAIN, False)
    torch.testing.assert_close(
        y, kernels.train(flat[0], parameters, EPS, GAIN, False)[0], rtol=1e-4, atol=1e-4
    )
    statistics = statistics_of(summary)
    dx, _ = kernels.backward(dy, x, m, *statistics, parameters, True, True, EPS, GAIN)
    flat_dx, _ = kernels.backward(
        flat[1], flat[0], m, *statistics, parameters, True, True, EPS, GAIN
    )
    torch.testing.assert_close(dx, flat_dx, rtol=1e-4, atol=1e-4)


def test_wrong_layouts_are_refused():
    x, dy, parameters = make((2, 5, 6, 7), 3, torch.float32, torch.channels_last)
    y, m, summary = kernels.train(x, parameters, EPS, GAIN, False)
    statistics = statistics_of(summary)
    with pytest.raises(RuntimeError, match='memory format'):
        kernels.backward(dy.contiguous(), x, m, *statistics, parameters, True, True, EPS, GAIN)
    with pytest.raises(RuntimeError, match='memory format'):
        kernels.reduce(dy.double(), x, m, *statistics, parameters, EPS, GAIN)
    with pytest.raises(RuntimeError, match='contiguous or in channels last'):
        kernels.train(x[:, :, ::2], parameters, EPS, GAIN, False)


# ------------------------------------------------------------------------------------------
# Instruction sets
# ------------------------------------------------------------------------------------------


PROBE = (
    'import torch; from ubn_det.ops import _cpu; '
    '_cpu.moments(torch.ones(2, 2, 2, 2), None, 1, False)'
)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize('capability', ['baseline', 'avx2', 'avx512'])
def test_instruction_set(capability):
    run = run_python(PROBE, **{CAPABILITY: capability})
    if run.returncode:
        assert f'{CAPABILITY} asks for {capability}' in run.stderr
        pytest.skip('the processor does not have it')
    run = subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider'),
            *(
                f'{__file__}::TestSteps::test_core',
                f'{__file__}::test_inputs_at_the_end_of_memory',
            ),
        ],
        env=os.environ | {CAPABILITY: capability},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_unknown_instruction_set_is_an_error():
    run = run_python(PROBE, **{CAPABILITY: 'mmx'})
    assert run.returncode
    assert f"{CAPABILITY} has to be baseline, avx2 or avx512 and is 'mmx'" in run.stderr


# ------------------------------------------------------------------------------------------
# Bounds
# ------------------------------------------------------------------------------------------

_KEPT = []


def at_border(tensor: Tensor, at_end: bool) -> Tensor:
    """Copy a tensor to the end, or the beginning, of memory whose neighbours cannot be read."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    copy = flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    # Never unmapped: a tensor may outlive this.
    _KEPT.append(memory)
    return copy


def run_at_border(shape, k, dtype, layout, at_end):
    x, dy, parameters = make(shape, k, dtype, layout)
    x, dy = at_border(x, at_end), at_border(dy, at_end)
    parameters = [None if p is None else at_border(p, at_end) for p in parameters]
    return all_results(x, dy, parameters)


BORDER_SHAPES = [
    *[(2, 3, 4, 5), (3, 2, 14, 14), (2, 1, 1, 9), (2, 2, 9, 1), (4, 3, 1, 1), (2, 17, 9, 8)],
    *[(2, 33, 3, 2), (1, 7, 40, 61), (2, 2, 7, 7), (2, 40, 5, 16), (1, 2, 2, 48)],
]


def test_inputs_at_the_end_of_memory():
    """A read outside of a tensor ends the process, so another one tries."""
    code = (
        'import sys; sys.path[:0] = ["tests/helpers", "tests/test_ops"]\n'
        'import torch, test_cpu_kernels as t\n'
        'for layout in t.LAYOUTS.values():\n'
        '  for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n'
        '    for k in (1, 3, 5):\n'
        '      for shape in t.BORDER_SHAPES:\n'
        '        for at_end in (True, False):\n'
        '          print(shape, dtype, k, layout, at_end, flush=True)\n'
        '          t.run_at_border(shape, k, dtype, layout, at_end)\n'
    )
    run = run_python(code)
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + [run.stderr[-2000:]]


def test_reads_outside_of_memory_end_the_process():
    """The test above would see them."""
    code = (
        'import sys; sys.path[:0] = ["tests/helpers", "tests/test_ops"]\n'
        'import ctypes, torch, test_cpu_kernels as t\n'
        'x = t.at_border(torch.ones(1000), {at_end})\n'
        'ctypes.string_at(x.data_ptr(), 4000)\n'
        'print("ready", flush=True)\n'
        'ctypes.string_at(x.data_ptr() + {offset}, 1)\n'
    )
    for at_end, offset in ((True, 4000), (False, -1)):
        run = run_python(code.format(at_end=at_end, offset=offset))
        assert (run.stdout, run.returncode) == ('ready\n', -11)

"""Tests of the GPU kernels, each step against its formula in float64.

On a machine with an accelerator they run on it. Without one they run in Triton's interpreter,
which has to be asked for before triton is imported: tests/test_ops/test_triton_launches.py runs
this file so, in a process of its own.
"""

import os

import pytest
import torch

pytest.importorskip('triton')
if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
    reason = 'no accelerator; test_triton_launches.py runs these in the interpreter'
    pytest.skip(reason, allow_module_level=True)

import fuzzing
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import GAIN, GateReference

from ubn_det.ops import Buffers, Rule, triton_kernels

EPS = 1e-5
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAMES = (
    'weight',
    'bias',
    'center_weight',
    'scale_weight',
    'scale_bias',
    'neighbour_weight',
)
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}

# Sums of some thousand terms in float32, and the device's own exp and rsqrt (2 units in the last
# place): what an error may be as a share of the largest value.
SUMS = 2e-5
# As a share of the value itself: maps in half precision are rounded once, to 11 or 8 bits; the
# interpreter cuts bfloat16 off instead. What is float32 anyway is compared as such, since the
# inputs are exact.
ROUNDING = {
    torch.float32: 0,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8 if DEVICE == 'cuda' else 2**-7,
}

SHAPES = {
    'one value': (3, 3, 1, 1),
    'one row': (2, 3, 1, 6),
    'one column': (2, 3, 6, 1),
    'narrower than the kernel': (2, 3, 5, 2),
    '7x7': (2, 3, 7, 7),
    'one sample': (1, 5, 4, 4),
    'many samples': (9, 2, 3, 3),
    '14x14': (2, 2, 14, 14),
    '25x42': (1, 2, 25, 42),
    'several chunks': (1, 2, 40, 34),
}

layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
dtypes = pytest.mark.parametrize('dtype', ROUNDING, ids=str)
kernels = pytest.mark.parametrize('kernel', [1, 3, 5])


def as_tuple(params):
    """Parameters as the operators take them: on the device, in float32."""
    given = (params.get(name) for name in NAMES)
    return tuple(None if p is None else p.detach().float().to(DEVICE) for p in given)


def random_case(shape, kernel, dtype=torch.float32, layout=torch.contiguous_format, off=()):
    """A map, a gradient, and float64 parameters that float32 can hold."""
    x = (torch.randn(shape) * 2 + torch.randn(1, shape[1], 1, 1)).to(dtype)
    dy = (torch.randn(shape) + 0.5).to(dtype)
    params = reference.random_params(shape[1], 2, kernel)
    params = {name: p.float().double() for name, p in params.items() if name not in off}
    x, dy = (t.to(DEVICE).contiguous(memory_format=layout) for t in (x, dy))
    return x, dy, params


def error(actual, expected, scale=0.1, sums=SUMS):
    """Largest error in units of what it may be; ``scale`` is the least that the values add up."""
    rounding = ROUNDING.get(actual.dtype, 0)
    actual, expected = actual.detach().double().cpu(), expected.detach()
    assert actual.shape == expected.shape
    limit = sums * expected.abs().max().clamp(min=scale) + rounding * expected.abs()
    return ((actual - expected).abs() / limit).max().item()


def check(actual, expected, scale=0.1, sums=SUMS):
    # False of NaN.
    assert error(actual, expected, scale, sums) <= 1


def check_gradients(gradients, expected):
    """Compare the gradients of parameters, by name; those of absent ones have to be None."""
    # The sums of these two mostly cancel: with one sample, or planes of one value, all but all.
    scales = dict.fromkeys(NAMES, 0.1)
    scales['center_weight'] += (expected.sums[0] * expected.m).abs().sum(0).max().item() / GAIN
    if 'scale_bias' in expected.gradients:
        scales['scale_weight'] += expected.gradients['scale_bias'].abs().max().item()
    for name, gradient in gradients.items():
        assert (gradient is None) == (name not in expected.gradients)
        if gradient is not None:
            assert gradient.dtype == torch.float32
            check(gradient, expected.gradients[name], scales[name])


class Reference:
    """Every step's results in float64, by the formulas and autograd."""

    def __init__(self, x, dy, params, mean=None, var=None):
        """``mean`` and ``var`` are those of the batch where they are not given."""
        self.x = x.detach().double().cpu().requires_grad_()
        self.params = {name: p.clone().requires_grad_() for name, p in params.items()}
        self.m = self.x.mean((2, 3))
        self.y, self.mean, self.var = reference.ubn(self.x, self.params, EPS, mean, var)
        leaves = [self.x, *self.params.values()]
        gradients = torch.autograd.grad(self.y, leaves, dy.double().cpu())
        self.dx = gradients[0]
        self.gradients = dict(zip(params, gradients[1:], strict=True))
        self.d_statistics, self.sums = self._inner(dy.double().cpu())

    def _inner(self, dy):
        """Gradients of the statistics with x held fast, and the sums of dh and dh u."""
        mean = self.mean.detach().requires_grad_()
        var = self.var.detach().requires_grad_()
        y, _, _ = reference.ubn(self.x.detach(), self.params, EPS, mean, var)
        d_statistics = torch.stack(torch.autograd.grad(y, (mean, var), dy))
        h = torch.zeros_like(dy).requires_grad_()
        y = torch.zeros_like(h)
        if (kernel := self.params.get('neighbour_weight')) is not None:
            y = y + reference.neighbourhood(h, GAIN * kernel)
        weight = self.params.get('weight')
        if weight is not None:
            y = y + weight[:, None, None] * h
        else:
            y = y + h
        (dh,) = torch.autograd.grad(y, h, dy)
        u = self.x.detach() - self.m.detach()[..., None, None]
        return d_statistics, torch.stack([dh.sum((2, 3)), (dh * u).sum((2, 3))])


def statistics(summary, num_channels):
    return summary[:num_channels], summary[num_channels : 2 * num_channels]


def run_training(x, dy, params):
    """All steps of a training iteration, by name."""
    given = as_tuple(params)
    m, summary = triton_kernels.moments(x, given[2], GAIN, True)
    mean, var = statistics(summary, x.shape[1])
    y = triton_kernels.normalize(x, m, mean, var, given, EPS, GAIN)
    backward = triton_kernels.reduce(dy, x, m, mean, var, given, EPS, GAIN)
    share = torch.tensor(x.shape[1] / x.numel(), device=DEVICE)
    dx, d_center_weight = triton_kernels.input_gradient(
        dy, x, m, mean, var, given, *backward[1:3], share, EPS, GAIN
    )
    order = ('weight', 'bias', 'scale_weight', 'scale_bias', 'neighbour_weight')
    gradients = dict(zip(order, backward[3:], strict=True), center_weight=d_center_weight)
    return dict(m=m, summary=summary, mean=mean, var=var, y=y, sums=backward[1]) | dict(
        d_statistics=backward[2], dx=dx, gradients=gradients
    )


def check_training(x, dy, params):
    done = run_training(x, dy, params)
    expected = Reference(x, dy, params)
    for name in ('m', 'mean', 'var', 'sums', 'd_statistics'):
        assert done[name].dtype == torch.float32
        check(done[name], getattr(expected, name))
    for name in ('y', 'dx'):
        assert done[name].dtype == x.dtype
        assert done[name].stride() == x.stride()
        check(done[name], getattr(expected, name))
    check_gradients(done['gradients'], expected)
    check_score(done['summary'], x)


def check_score(summary, x):
    N, C, H, W = x.shape
    pairs = N * (N - 1)
    count, pair_sum, num_pairs = summary[2 * C :].tolist()
    assert count == N * H * W
    assert num_pairs == pairs
    flat = x.double().cpu().flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    assert pair_sum == pytest.approx(cosines.sum().item(), abs=max(pairs, 1) * 2e-6)


@layouts
@kernels
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_training(shape, kernel, layout):
    check_training(*random_case(shape, kernel, layout=layout))


@layouts
@kernels
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_training_in_half_precision(dtype, kernel, layout):
    check_training(*random_case((2, 3, 7, 7), kernel, dtype, layout))


@layouts
@kernels
def test_programs_that_take_several_samples(kernel, layout, monkeypatch):
    # As on large batches: few programs, and loops over what one of them cannot hold.
    monkeypatch.setattr(triton_kernels, '_WARPS', 8)
    monkeypatch.setattr(triton_kernels, '_summary_tile', lambda N, chunks: (2, 1))
    check_training(*random_case((5, 2, 6, 3), kernel, layout=layout))


def test_more_samples_than_are_summed_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_kernels, '_WARPS', 64)
    check_training(*random_case((300, 2, 2, 1), 1))


def test_more_chunks_than_are_summed_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_kernels, '_summary_tile', lambda N, chunks: (1, 2))
    monkeypatch.setattr(triton_kernels, '_MEAN_CHUNKS', 2)
    x, dy, params = random_case((1, 1, 90, 70), 1)
    params['weight'] += 1
    check_training(x, dy, params)
    check_evaluation(x, dy, params)


SINGLE = ('weight', 'bias', 'center_weight', 'neighbour_weight')
ABSENT = [
    (),
    *[(name,) for name in SINGLE],
    ('scale_weight', 'scale_bias'),
    ('weight', 'bias'),
    ('center_weight', 'scale_weight', 'scale_bias'),
    *[tuple(name for name in NAMES if name not in kept) for kept in [(), *[(n,) for n in SINGLE]]],
    ('weight', 'bias', 'center_weight', 'neighbour_weight'),
]


@pytest.mark.parametrize('off', ABSENT, ids=' '.join)
def test_parameters_that_are_off(off):
    x, dy, params = random_case((2, 3, 4, 5), 3, off=off)
    check_training(x, dy, params)
    check_evaluation(x, dy, params)


@dtypes
def test_tolerances_tell_an_error_of_5_percent(dtype):
    x, dy, params = random_case((2, 3, 7, 7), 3, dtype)
    done = run_training(x, dy, params)
    for name in params:
        wrong = params | {name: params[name] * 1.05}
        assert error(done['y'], Reference(x, dy, wrong).y) > 1, name


def check_evaluation(x, dy, params):
    C = x.shape[1]
    mean, var = torch.randn(C), torch.rand(C) + 0.5
    expected = Reference(x, dy, params, mean.double(), var.double())
    given, mean, var = as_tuple(params), mean.to(DEVICE), var.to(DEVICE)
    y = triton_kernels.evaluate(x, mean, var, given, EPS, GAIN)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    check(y, expected.y)
    m, sums, _, *gradients = triton_kernels.reduce(dy, x, None, mean, var, given, EPS, GAIN)
    dx, d_center_weight = triton_kernels.input_gradient(
        dy, x, m, mean, var, given, sums, None, None, EPS, GAIN
    )
    check(m, expected.m)
    check(dx, expected.dx)
    gradients.insert(2, d_center_weight)
    check_gradients(dict(zip(NAMES, gradients, strict=True)), expected)


@layouts
@pytest.mark.parametrize(
    'shape, kernel',
    [((2, 3, 7, 7), 5), ((3, 5, 1, 1), 3), ((1, 2, 45, 50), 1), ((1, 1, 45, 50), 3)],
)
def test_evaluation(shape, kernel, layout):
    check_evaluation(*random_case(shape, kernel, layout=layout))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_running_statistics_of_other_types(dtype):
    x, dy, params = random_case((2, 3, 4, 5), 1)
    mean, var = torch.randn(3).to(dtype), (torch.rand(3) + 0.5).to(dtype)
    expected = Reference(x, dy, params, mean.double(), var.double()).y
    args = mean.to(DEVICE), var.to(DEVICE), as_tuple(params), EPS, GAIN
    check(triton_kernels.evaluate(x, *args), expected)


@layouts
@pytest.mark.parametrize('shape', [(2, 3, 14, 14), (1, 2, 48, 50), (9, 2, 3, 3)], ids=str)
def test_large_offsets_leave_the_variance(shape, layout):
    x = (torch.randn(shape) + 1e6).to(DEVICE).contiguous(memory_format=layout)
    m, summary = triton_kernels.moments(x, None, GAIN, False)
    mean, var = statistics(summary, shape[1])
    exact = x.double().cpu()
    # A unit in the last place of 1e6 is 1/16.
    torch.testing.assert_close(m.double().cpu(), exact.mean((2, 3)), rtol=0, atol=0.0625)
    torch.testing.assert_close(mean.double().cpu(), exact.mean((0, 2, 3)), rtol=0, atol=0.0625)
    expected = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double().cpu(), expected, rtol=5e-3, atol=0)


@layouts
@pytest.mark.parametrize('num', [2, 3, 4, 8, 9, 21])
def test_score(num, layout):
    # Alike, and one sample of zeros.
    x = torch.randn(num, 3, 5, 7) + torch.randn(1, 3, 5, 7)
    x[num // 2] = 0
    x = x.to(DEVICE).contiguous(memory_format=layout)
    _, summary = triton_kernels.moments(x, None, GAIN, True)
    check_score(summary, x)


def test_score_over_several_chunks():
    for num in (2, 9):
        x = (torch.randn(num, 1, 48, 50) + torch.randn(1, 1, 48, 50)).to(DEVICE)
        check_score(triton_kernels.moments(x, None, GAIN, True)[1], x)


@pytest.mark.parametrize('num', [2, 9])
def test_zeros_have_no_similarity(num):
    x = torch.zeros(num, 2, 3, 3, device=DEVICE)
    _, summary = triton_kernels.moments(x, None, GAIN, True)
    assert summary.tolist() == [0] * 4 + [num * 9, 0, num * (num - 1)]


def test_batch_that_is_not_scored():
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    _, summary = triton_kernels.moments(x, None, GAIN, False)
    assert summary[-2:].tolist() == [0, 0]


@pytest.mark.parametrize('num', [2, 9])
@layouts
def test_nan_spoils_its_channel_alone(num, layout):
    x, dy, params = random_case((num, 3, 4, 5), 3, layout=layout)
    x[1, 2, 3, 4] = float('nan')
    done = run_training(x, dy, params)
    clean = Reference(x[:, :2], dy[:, :2], {n: p[:2] for n, p in params.items()})
    for name in ('y', 'dx'):
        check(done[name][:, :2], getattr(clean, name))
        assert done[name][:, 2].isnan().all()
    assert done['mean'].isnan().tolist() == [False, False, True]
    assert done['summary'][-2].isnan()
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y = triton_kernels.evaluate(x, mean, var, as_tuple(params), EPS, GAIN)
    assert y.isnan().sum() == 20


def test_empty_batches():
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        x, dy, params = random_case(shape, 3)
        done = run_training_of_nothing(x, dy, params)
        for name in ('y', 'dx'):
            assert done[name].shape == shape
        for t in (done['m'], done['summary'], done['sums'], done['d_statistics']):
            assert not t.any()
        assert not any(gradient.any() for gradient in done['gradients'].values())


def run_training_of_nothing(x, dy, params):
    given = as_tuple(params)
    m, summary = triton_kernels.moments(x, given[2], GAIN, True)
    mean, var = statistics(summary, x.shape[1])
    y = triton_kernels.normalize(x, m, mean, var, given, EPS, GAIN)
    backward = triton_kernels.reduce(dy, x, None, mean, var, given, EPS, GAIN)
    share = torch.zeros((), device=DEVICE)
    dx, d_center_weight = triton_kernels.input_gradient(
        dy, x, m, mean, var, given, *backward[1:3], share, EPS, GAIN
    )
    gradients = dict(enumerate([*backward[3:], d_center_weight]))
    return dict(m=m, summary=summary, y=y, sums=backward[1], d_statistics=backward[2]) | dict(
        dx=dx, gradients=gradients
    )


@layouts
def test_gradient_in_the_other_layout(layout):
    x, dy, params = random_case((2, 3, 4, 5), 3, layout=layout)
    other = [t for t in LAYOUTS.values() if t != layout]
    check_training(x, dy.contiguous(memory_format=other[0]), params)


def test_other_layouts_are_refused():
    x = torch.randn(2, 3, 5, 4, device=DEVICE).transpose(2, 3)
    with pytest.raises(ValueError, match='contiguous or channels_last'):
        triton_kernels.moments(x, None, GAIN, False)


# ------------------------------------------------------------------------------------------------
# The gate
# ------------------------------------------------------------------------------------------------

BUFFERS = Buffers._fields


def buffers_of(gate, dtype=torch.float32, kept_in=torch.float32):
    """What the kernel moves, as a gate has it; the moments of its score in ``kept_in``."""
    values = [torch.as_tensor(getattr(gate, name)) for name in BUFFERS]
    counts = [torch.int64] * 3
    kinds = [dtype, dtype, torch.int64, kept_in, *counts, kept_in, kept_in, torch.int64]
    return tuple(v.to(DEVICE, kind) for v, kind in zip(values, kinds, strict=True))


def rule_of(gate):
    """The rule of a gate, as the kernel takes it."""
    rule = Rule(gate.momentum, gate.threshold, gate.warmup, gate.patience)
    if gate.threshold == 'auto':
        rule = rule._replace(condensation_threshold=gate.margin, z=gate.z)
    return rule


def summary_of(mean, var, count, score=None, num_pairs=2):
    num_pairs = 0 if score is None else num_pairs
    rest = torch.tensor([count, (score or 0) * num_pairs, num_pairs])
    return torch.cat([mean.float(), var.float(), rest.float()]).to(DEVICE)


def check_gate(buffers, gate, rounding=1e-6):
    for name, buffer in zip(BUFFERS, buffers, strict=True):
        expected = torch.as_tensor(getattr(gate, name)).double()
        torch.testing.assert_close(buffer.double().cpu(), expected, rtol=rounding, atol=rounding)


GATES = {
    'threshold': dict(threshold=0.5, warmup=2, patience=3),
    'no patience': dict(threshold=0.5, warmup=0, patience=0),
    'no threshold': dict(threshold=None),
    'mean of all batches': dict(threshold=0.5, momentum=None, warmup=0, patience=3),
    'negative threshold': dict(threshold=-0.2, momentum=0.01, warmup=1, patience=2),
    'auto': dict(threshold='auto', warmup=2, patience=3, z=1.0, margin=0.1),
    'auto, mean of all batches': dict(threshold='auto', momentum=None, warmup=2, patience=3),
}
NAN = float('nan')
# None: the score is not defined.
SCORES = [0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, None, 0.2, float('nan'), 0.7, 1.5, -1.5, 0.6, 0.3]


@pytest.mark.parametrize('rule', GATES.values(), ids=GATES)
@pytest.mark.parametrize('num_channels', [3, 1500])
def test_update(rule, num_channels):
    gate = GateReference(num_channels, **rule)
    buffers = buffers_of(gate)
    for step, score in enumerate(SCORES):
        mean, var = torch.randn(num_channels).double(), torch.rand(num_channels).double()
        if step in (2, 8):
            # The last one, so that no block is left out.
            (mean if step == 2 else var)[-1] = float('nan') if step == 2 else float('inf')
        clamped = score if score is None else torch.tensor(score).clamp(-1, 1).item()
        is_open = gate.step(mean, var, 40, clamped)
        kept = [b.clone() for b in buffers[:2]]
        triton_kernels.update(
            buffers,
            summary_of(mean, var, 40, score),
            *rule_of(gate),
        )
        check_gate(buffers, gate)
        if not is_open:
            assert all(torch.equal(a, b) for a, b in zip(kept, buffers[:2], strict=True))
    assert gate.num_batches_condensed > 1


def test_update_by_random_scores(request):
    seen = set()

    @fuzzing.cases(request, 80)
    @given(
        scores=st.lists(
            st.none() | st.floats(0.1, 0.3) | st.floats(-1, 1) | st.sampled_from([0.9, 0.8, NAN]),
            min_size=10,
            max_size=20,
        ),
        broken=st.sets(st.integers(0, 40)),
        momentum=st.sampled_from([0.1, None]),
        patience=st.integers(1, 4),
        z=st.sampled_from([0.0, 1.0, 3.0]),
        # Scores weigh the same from the twentieth on.
        scored=st.sampled_from([0, 15, 30]),
    )
    def compare(scores, broken, momentum, patience, z, scored):
        gate = GateReference(3, momentum, 'auto', 4, patience, z=z)
        if scored:
            gate.condensation_mean, gate.condensation_var = 0.25, 0.0625
            gate.num_batches_tracked = gate.num_batches_scored = scored
        buffers = buffers_of(gate)
        for i, score in enumerate(scores):
            mean, var = torch.randn(3).double(), torch.rand(3).double()
            if i in broken:
                mean[1] = NAN
            limit = gate.limit
            gate.step(mean, var, 40, score)
            if score is not None and abs(score - limit) < 1e-4:
                # Rounding may decide it.
                return
            triton_kernels.update(buffers, summary_of(mean, var, 40, score), *rule_of(gate))
            check_gate(buffers, gate, 1e-5)
        seen.add((gate.num_batches_condensed > 0, gate.num_batches_readmitted > 0))

    compare()
    assert (True, True) in seen


@pytest.mark.parametrize(
    'dtype, rounding', [(torch.float64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize('threshold', [0.6, 'auto'])
def test_update_of_other_types(dtype, rounding, threshold):
    gate = GateReference(3, threshold=threshold)
    gate.condensation_mean, gate.condensation_var, gate.num_batches_scored = 0.125, 0.0625, 2
    buffers = buffers_of(gate, dtype, dtype)
    kinds = [buffer.dtype for buffer in buffers]
    mean, var = torch.randn(3).double(), torch.rand(3).double()
    gate.step(mean, var, 40, 0.2)
    triton_kernels.update(buffers, summary_of(mean, var, 40, 0.2), *rule_of(gate))
    assert [buffer.dtype for buffer in buffers] == kinds
    check_gate(buffers, gate, rounding)


def test_update_by_nothing_changes_nothing():
    gate = GateReference(3, score=0.25)
    gate.consecutive_condensed = 2
    buffers = buffers_of(gate)
    summary = torch.zeros(9, device=DEVICE)
    triton_kernels.update(buffers, summary, *Rule(0.1, 0.6, 0, 1))
    check_gate(buffers, gate, 0)


def test_update_by_one_value_closes_the_gate():
    gate = GateReference(3)
    buffers = buffers_of(gate)
    summary = summary_of(torch.randn(3), torch.zeros(3), 1)
    triton_kernels.update(buffers, summary, *Rule(0.1, None, 0, 100))
    gate.num_batches_condensed = gate.consecutive_condensed = 1
    check_gate(buffers, gate, 0)


# ------------------------------------------------------------------------------------------------
# On the device alone
# ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs an accelerator')
@pytest.mark.parametrize('num', [2, 9])
@layouts
@dtypes
def test_results_are_the_same_in_a_graph(dtype, layout, num):
    x, dy, params = random_case((num, 64, 56, 60), 3, dtype, layout)
    buffers = buffers_of(GateReference(64))

    def step():
        done = run_training(x, dy, params)
        triton_kernels.update(buffers, done['summary'], *Rule(0.1, 0.6, 50, 100))
        return done

    expected = step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert buffers[2] == 2
    for name in ('m', 'summary', 'y', 'sums', 'd_statistics', 'dx'):
        assert torch.equal(captured[name], expected[name])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs an accelerator')
@pytest.mark.parametrize(
    'shape', [(1024, 256, 7, 7), (2, 64, 400, 672), (16, 64, 56, 56)], ids=str
)
@layouts
@kernels
def test_training_at_full_size(shape, kernel, layout):
    x, dy, params = random_case(shape, kernel, layout=layout)
    done = run_training(x, dy, params)
    again = run_training(x, dy, params)
    # A few channels against the reference; those of the whole batch would take minutes.
    kept = [0, 1, shape[1] - 1]
    expected = Reference(x[:, kept], dy[:, kept], {n: p[kept] for n, p in params.items()})
    for name in ('m', 'y', 'dx'):
        assert torch.equal(done[name], again[name])
        check(done[name][:, kept], getattr(expected, name), sums=2e-4)
    for name, gradient in expected.gradients.items():
        assert torch.equal(done['gradients'][name], again['gradients'][name])
        check(done['gradients'][name][kept], gradient, sums=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs an accelerator')
@layouts
def test_more_values_than_32_bits_count(layout):
    shape = (33, 256, 512, 512)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip('needs 40 GiB on the accelerator')
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_()
    params = as_tuple(reference.random_params(256, 2, 3))
    mean, var = torch.zeros(256, device=DEVICE), torch.ones(256, device=DEVICE)
    m, summary = triton_kernels.moments(x, None, GAIN, True)
    assert summary.isfinite().all()
    y = triton_kernels.normalize(x, m, mean, var, params, EPS, GAIN)
    last = triton_kernels.normalize(x[-1:], m[-1:], mean, var, params, EPS, GAIN)
    assert torch.equal(y[-1:], last)
    _, sums, *_ = triton_kernels.reduce(y, x, m, mean, var, params, EPS, GAIN)
    dx, _ = triton_kernels.input_gradient(y, x, m, mean, var, params, sums, None, None, EPS, GAIN)
    _, last_sums, *_ = triton_kernels.reduce(last, x[-1:], m[-1:], mean, var, params, EPS, GAIN)
    last_dx, _ = triton_kernels.input_gradient(
        last, x[-1:], m[-1:], mean, var, params, last_sums, None, None, EPS, GAIN
    )
    # A chunk is of another size where there is one sample.
    torch.testing.assert_close(sums[:, -1], last_sums[:, 0], rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(dx[-1:], last_dx, rtol=2e-2, atol=1e-3)

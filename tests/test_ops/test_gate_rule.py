"""Tests of the gate's rule, in operators and in C++, against its text in plain Python."""

import itertools
import math
import random

import pytest
import torch
from kernels import needs_kernels
from reference import GateReference

from ubn_det.ops import Buffers, Rule, dispatch, gate

C = 3
COUNTERS = tuple(name for name in Buffers._fields if name.startswith(('num_', 'consecutive_')))
SCORES = ('condensation', 'condensation_mean', 'condensation_var')


def update_by_kernels(buffers, summary, rule):
    dispatch.kernels_of(summary).update(list(buffers), summary, *rule)


updates = pytest.mark.parametrize(
    'update',
    [gate.update, pytest.param(update_by_kernels, marks=needs_kernels)],
    ids=['operators', 'kernels'],
)
types = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)


def make_buffers(dtype=torch.float64, kept_in=torch.float32):
    buffers = {name: torch.zeros((), dtype=torch.long) for name in COUNTERS}
    values = zip(SCORES, (0.25, 0.25, 0.01), strict=True)
    buffers.update({name: torch.tensor(value, dtype=kept_in) for name, value in values})
    statistics = dict(running_mean=torch.randn(C), running_var=torch.rand(C))
    return Buffers(**buffers, **{name: t.to(dtype) for name, t in statistics.items()})


def clone(buffers):
    return Buffers(*(b.clone() for b in buffers))


def make_summary(count=12.0, score=0.0, num_pairs=2.0, bad=None, dtype=torch.float64):
    """Return what a batch says of itself; ``bad`` is a value and the place where it is."""
    statistics = torch.cat([torch.randn(C), torch.rand(C)])
    if bad:
        statistics[bad[1]] = bad[0]
    if count == 0:
        statistics.zero_()
    counts = torch.tensor([count, score * num_pairs, num_pairs])
    return torch.cat([statistics, counts]).to(dtype)


def reference_of(buffers, rule):
    """Return the rule in plain Python, as far as the buffers have come."""
    momentum, threshold, warmup, patience, z, _ = rule
    norm = GateReference(C, momentum, threshold, warmup, patience)
    if z is not None:
        norm.threshold, norm.z, norm.margin = 'auto', z, threshold
    norm.running_mean = buffers.running_mean.double()
    norm.running_var = buffers.running_var.double()
    for name in COUNTERS + SCORES:
        setattr(norm, name, getattr(buffers, name).item())
    return norm


def step(norm, summary):
    """Let the reference take in a batch; return whether it was let in, None of an empty one."""
    mean, var = summary[:-3].double().chunk(2)
    count, pair_sum, num_pairs = summary[-3:].tolist()
    if count == 0:
        return None
    # A single value has no variance.
    seen = mean if count > 1 else mean * float('nan')
    score = min(max(pair_sum / num_pairs, -1), 1) if num_pairs else None
    return norm.step(seen, var, count, score)


def check(buffers, norm, dtype):
    for name in COUNTERS:
        assert getattr(buffers, name) == getattr(norm, name), name
    # Each step rounds once or twice; the score is kept in float32.
    close = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    for name in ('running_mean', 'running_var'):
        torch.testing.assert_close(getattr(buffers, name).double(), getattr(norm, name), **close)
    for name in SCORES:
        expected = torch.tensor(getattr(norm, name))
        torch.testing.assert_close(getattr(buffers, name).float(), expected, rtol=2e-5, atol=1e-6)


NAN, INF = float('nan'), float('inf')
SUMMARIES = [
    *(dict(score=score) for score in (-1.1, 0.2, 0.5, 0.9, 1.1, NAN, INF)),
    *(dict(score=0.9, bad=(value, place)) for value in (NAN, INF, -INF) for place in (1, C + 2)),
    # One sample; a single value over all ranks; nothing at all.
    *(dict(num_pairs=0.0), dict(count=1.0, num_pairs=0.0), dict(count=0.0, num_pairs=0.0)),
]
RULES = [
    *itertools.starmap(Rule, itertools.product([0.1, None], [0.5, None], [5], [3])),
    # Mean 0.25 and deviation 0.1 at first: over 0.55.
    *(Rule(momentum, 0.1, 5, 3, z=2.0) for momentum in (0.1, None)),
]
# Tracked batches, closed ones in a row, and batches behind the moments of the score.
HISTORIES = [(0, 0, 0), (4, 3, 5), (5, 0, 4), (5, 3, 4), (5, 0, 5), (5, 2, 5), (5, 3, 50)]


@updates
@types
def test_every_branch(update, dtype):
    seen = set()
    for rule, history, case in itertools.product(RULES, HISTORIES, SUMMARIES):
        buffers = make_buffers(dtype)
        buffers.num_batches_tracked.fill_(history[0])
        buffers.consecutive_condensed.fill_(history[1])
        buffers.num_batches_scored.fill_(history[2])
        before, norm = clone(buffers), reference_of(buffers, rule)
        summary = make_summary(**case, dtype=dtype)
        opened = step(norm, summary)
        update(buffers, summary, rule)
        check(buffers, norm, dtype)
        if rule.z is None or not opened or math.isnan(case.get('score', NAN)):
            for name in ('condensation_mean', 'condensation_var', 'num_batches_scored'):
                assert torch.equal(getattr(buffers, name), getattr(before, name)), name
        for name in ('running_mean', 'running_var'):
            is_same = torch.equal(getattr(buffers, name), getattr(before, name))
            # To the bit, also where there is a NaN.
            assert is_same == (not opened), (rule, history, case)
        if opened is None:
            assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
        seen.add((opened, norm.num_batches_readmitted > 0))
    assert seen == {(True, False), (True, True), (False, False), (None, False)}


@updates
@types
@pytest.mark.parametrize('momentum', [0.1, 0.0, 1.0, None])
def test_a_random_course_of_batches(update, dtype, momentum):
    rule = Rule(momentum, 0.5, 4, 3)
    buffers = make_buffers(dtype)
    norm = reference_of(buffers, rule)
    chooser = random.Random(0)
    for _ in range(300):
        summary = make_summary(**chooser.choice(SUMMARIES), dtype=dtype)
        step(norm, summary)
        update(buffers, summary, rule)
        check(buffers, norm, dtype)
    assert min(norm.num_batches_tracked, norm.num_batches_condensed) > 50
    assert (norm.num_batches_readmitted > 5) == (momentum is not None)


@updates
@pytest.mark.parametrize('kept_in', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('rule', [Rule(0.1, 0.5, 0, 3), Rule(0.1, 0.1, 0, 3, z=2.0)], ids=str)
def test_buffers_of_a_layer_that_was_cast(update, kept_in, rule):
    # As layer.half() and layer.double() leave them: all that is a floating point number is cast.
    buffers = make_buffers(kept_in, kept_in)
    buffers.num_batches_scored.fill_(2)
    norm = reference_of(buffers, rule)
    for score in (0.2, 0.9, 0.3):
        summary = make_summary(score=score, dtype=torch.float32)
        before = clone(buffers)
        opened = step(norm, summary)
        update(buffers, summary, rule)
        assert opened == (not torch.equal(buffers.running_mean, before.running_mean))
        # Each step is rounded to what is kept: half a unit of values up to 4.
        close = dict(rtol=0, atol=max(4 * torch.finfo(kept_in).eps, 1e-6))
        for name in ('running_mean', 'running_var', *SCORES):
            expected = torch.as_tensor(getattr(norm, name)).double()
            torch.testing.assert_close(getattr(buffers, name).double(), expected, **close)
        assert {b.dtype for b in buffers} == {kept_in, torch.long}
    assert norm.num_batches_condensed == 1


@updates
def test_a_score_equal_to_the_threshold_is_open(update):
    # And rounding lifts no score over 1.
    for threshold, score in ((0.5, 0.5), (1.0, 1.0 + 2**-20), (-1.0, -1.0)):
        buffers = make_buffers()
        update(buffers, make_summary(score=score), Rule(0.1, threshold, 0, 3))
        assert buffers.num_batches_tracked == 1


@updates
def test_a_score_at_the_threshold_as_float32_rounds_it(update):
    random.seed(0)
    for _ in range(200):
        threshold = random.random()
        score = torch.tensor(threshold)
        summary = make_summary(score=0.0, dtype=torch.float32)
        summary[-2:] = torch.stack([score, torch.ones(())])
        buffers = make_buffers()
        update(buffers, summary, Rule(0.1, threshold, 0, 5))
        assert buffers.num_batches_tracked == 1


@updates
def test_variances_whose_sum_overflows_float32(update):
    summary = make_summary(dtype=torch.float32)
    summary[C : 2 * C] = 3e38
    buffers = make_buffers()
    update(buffers, summary, Rule(0.1, None, 0, 5))
    assert buffers.num_batches_tracked == 1

"""Tests of condensation_threshold='auto': the threshold that follows the layer's own scores."""

import copy
import math

import distributed
import fuzzing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import GateReference
from torch import nn

from ubn_det import UBN, SyncUBN

C = 3
COUNTERS = (
    *('num_batches_tracked', 'num_batches_condensed', 'num_batches_readmitted'),
    *('consecutive_condensed', 'num_batches_scored'),
)
MOMENTS = ('condensation_mean', 'condensation_var')
RUNNING = ('running_mean', 'running_var')

# The moments are kept in float32 and move by a few roundings a batch.
CLOSE = dict(rtol=1e-4, atol=1e-6)
# How near to its threshold a score may be decided differently.
TIE = 1e-4


def batch_of(score, scale=1.0):
    """Return two samples whose cosine similarity is ``score``."""
    first, second = torch.zeros(2, C, 4, 4)
    first[:, :2], second[:, 2:] = 1.0, 1.0
    first *= torch.linspace(0.5, 1.5, C).view(C, 1, 1)
    second *= torch.linspace(1.5, 0.5, C).view(C, 1, 1)
    first, second = first / first.norm(), second / second.norm()
    other = score * first + math.sqrt(1 - score**2) * second
    return scale * 10 * torch.stack([first, other])


def build(cls=UBN, **options):
    options = {'condensation_threshold': 'auto', 'warmup': 5, 'patience': 8, **options}
    return cls(C, affine_kernel=1, **options)


def trained(scores=(0.1, 0.2, 0.15, 0.12, 0.18, 0.2), **options):
    layer = build(**options)
    for score in scores:
        layer(batch_of(score))
    return layer


def snapshot(layer):
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def is_open(layer, x):
    """Forward ``x``; return whether it moved the running statistics, to the bit."""
    before = snapshot(layer)
    layer(x)
    moved = {not torch.equal(getattr(layer, name), before[name]) for name in RUNNING}
    assert len(moved) == 1
    return moved.pop()


def make_reference(layer):
    """Return the rule in plain Python, as far as a layer has come."""
    gate = GateReference(C, layer.momentum, 'auto', layer.warmup, layer.patience)
    gate.z, gate.margin = layer.condensation_z, layer.condensation_margin
    follow(gate, layer)
    return gate


def follow(gate, layer):
    for name in COUNTERS + MOMENTS + ('condensation',):
        setattr(gate, name, getattr(layer, name).item())


def check(layer, gate, close=CLOSE):
    for name in COUNTERS:
        assert getattr(layer, name) == getattr(gate, name), name
    for name in (*MOMENTS, 'condensation'):
        expected = torch.tensor(getattr(gate, name))
        torch.testing.assert_close(getattr(layer, name).float(), expected, **close)


def step(gate, x):
    """Let the reference take in a batch of ``batch_of`` and its like; return if it is open."""
    if x.numel() == 0:
        return False
    x = x.double()
    mean = x.mean((0, 2, 3))
    score = None
    if len(x) > 1:
        score = torch.cosine_similarity(x[0].flatten(), x[1].flatten(), dim=0).item()
    return gate.step(mean, x.var((0, 2, 3), unbiased=False), x.numel() / C, score)


# The rule


BATCHES = {
    'ordinary': lambda score: batch_of(0.2 + 0.1 * score),
    'any': batch_of,
    'condensed': lambda score: batch_of(0.9 + 0.1 * abs(score)),
    'one sample': lambda score: batch_of(score)[:1],
    'empty': lambda score: batch_of(score)[:0],
    'not finite': lambda score: batch_of(score) * math.nan,
    'infinite': lambda score: batch_of(score) / 0,
}
series = st.lists(
    st.tuples(
        st.sampled_from([*BATCHES, *['ordinary'] * 6, *['condensed'] * 4]),
        st.floats(-1, 1, width=32),
    ),
    min_size=15,
    max_size=40,
)


@pytest.mark.parametrize('number', [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kept_in', [None, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_random_scores(number, kept_in, request, implementation):
    seen = set()

    @fuzzing.cases(request, number if kept_in is None else number // 3)
    @given(
        batches=series,
        momentum=st.sampled_from([0.1, 0.1, 0.5, None]),
        warmup=st.integers(2, 6),
        patience=st.integers(1, 6),
        z=st.sampled_from([0.0, 1.0, 3.0]),
        margin=st.sampled_from([0.0, 0.03, 0.2]),
        loaded=st.none() | st.integers(0, 40),
    )
    def compare(batches, momentum, warmup, patience, z, margin, loaded):
        rule = dict(condensation_z=z, condensation_margin=margin)
        options = dict(momentum=momentum, warmup=warmup, patience=patience, **rule)
        layer = build(**options)
        if kept_in is not None:
            layer.to(kept_in)
        gate = make_reference(layer)
        for i, (kind, value) in enumerate(batches):
            if i == loaded:
                state = layer.state_dict()
                layer = build(**options).to(kept_in or torch.float32)
                layer.load_state_dict(state)
            x = BATCHES[kind](value)
            x = x.to(kept_in or x.dtype)
            before, was = snapshot(layer), copy.copy(gate)
            opened = step(gate, x)
            is_scored = x.numel() > 0 and len(x) > 1 and bool(x.isfinite().all())
            if is_scored and abs(gate.condensation - was.limit) < TIE:
                return
            layer(x)
            if not opened:
                for name in RUNNING + MOMENTS + ('num_batches_tracked', 'num_batches_scored'):
                    assert torch.equal(getattr(layer, name), before[name]), name
            if kept_in in (torch.float16, torch.bfloat16):
                check(layer, gate, dict(rtol=0, atol=4 * torch.finfo(kept_in).eps))
                follow(gate, layer)
            else:
                check(layer, gate)
            seen.add((kind, opened, gate.num_batches_readmitted > was.num_batches_readmitted))

    compare()
    if kept_in is not None:
        return
    assert {(kind, opened) for kind, opened, _ in seen} >= {
        *(('ordinary', True), ('any', True), ('any', False), ('condensed', True)),
        *(('condensed', False), ('one sample', True), ('empty', False), ('not finite', False)),
    }
    assert ('condensed', True, True) in seen


def test_threshold_is_what_the_next_score_is_held_against(implementation):
    for offset, expected in ((-1e-3, True), (1e-3, False)):
        layer = trained()
        threshold = layer.threshold()
        scores = torch.tensor([0.1, 0.2, 0.15, 0.12, 0.18, 0.2])
        expected_threshold = scores.mean() + 3 * scores.std(correction=0) + 0.03
        torch.testing.assert_close(threshold, expected_threshold, **CLOSE)
        assert is_open(layer, batch_of(threshold.item() + offset)) == expected


@pytest.mark.parametrize('threshold, expected', [(None, None), (0.5, 0.5)])
def test_threshold_of_other_layers(threshold, expected):
    assert UBN(C, condensation_threshold=threshold).threshold() == expected
    assert build(track_running_stats=False).threshold() is None


def test_z_and_margin_matter_with_auto_alone():
    layers = [
        trained(condensation_threshold=0.16, condensation_z=z, condensation_margin=m, warmup=0)
        for z, m in ((3.0, 0.03), (0.0, 2.0))
    ]
    torch.testing.assert_close(snapshot(layers[0]), snapshot(layers[1]), rtol=0, atol=0)
    assert layers[0].num_batches_condensed == 3
    assert not any(getattr(layers[0], name) for name in (*MOMENTS, 'num_batches_scored'))


def test_a_batch_is_normalized_the_same_whatever_the_gate_says(implementation):
    x = batch_of(0.9)
    ys = []
    for options in (dict(), dict(condensation_threshold=None)):
        ys.append(trained(**options)(x))
    assert torch.equal(*ys)


# Where the scores go


def normal_scores(number, mean=0.4, deviation=0.04):
    scores = torch.randn(number, generator=torch.Generator().manual_seed(2))
    return (mean + deviation * scores).clamp(-1, 1).tolist()


@pytest.mark.parametrize('deviation', [0.002, 0.02, 0.1])
def test_ordinary_noise_closes_at_most_one_batch_in_a_hundred(deviation, implementation):
    layer = trained(normal_scores(2000, deviation=deviation), warmup=50, patience=100)
    assert layer.num_batches_condensed <= 0.01 * 2000
    assert layer.num_batches_tracked + layer.num_batches_condensed == 2000


def test_scores_that_rise_steadily_close_no_gate(implementation):
    # As those of a last stage do: from 0.3 to 0.75 in 100 batches.
    noise = normal_scores(300, 0, 0.01)
    scores = [0.3 + 0.45 * min(max(i - 100, 0) / 100, 1) + e for i, e in enumerate(noise)]
    assert trained(scores, warmup=50).num_batches_condensed <= 3


def test_condensed_batches_stay_out(implementation):
    layer = trained(normal_scores(200), warmup=50, patience=100)
    before = snapshot(layer)
    assert not any(is_open(layer, batch_of(0.8)) for _ in range(10))
    for name in (*RUNNING, *MOMENTS, 'num_batches_scored', 'num_batches_tracked'):
        assert torch.equal(getattr(layer, name), before[name]), name


@pytest.mark.parametrize('patience', [1, 20])
@pytest.mark.parametrize('score', [0.6, 0.8, 1.0])
def test_a_lasting_shift_opens_the_gate_again(score, patience, implementation):
    layer = trained(normal_scores(200, deviation=0.01), warmup=50, patience=patience)
    noise = normal_scores(100, 0, 0.01)
    opened = [is_open(layer, batch_of(min(score + e, 1.0))) for e in noise]
    assert opened == [False] * patience + [True] * (100 - patience)
    assert 1 <= layer.num_batches_readmitted <= 3
    assert layer.consecutive_condensed == 0
    # By now the new scores are the ordinary ones.
    torch.testing.assert_close(layer.condensation_mean.item(), score, rtol=0, atol=0.02)


def test_readmitted_batches_go_on_until_the_score_is_no_longer_over(implementation):
    # Without deviations the mean alone has to arrive, by a twentieth of the way a batch.
    layer = trained([0.2] * 30, condensation_z=0, condensation_margin=0.1, patience=3)
    opened = [is_open(layer, batch_of(0.8)) for _ in range(60)]
    assert opened == [False] * 3 + [True] * 57
    # 0.6 * 0.95**n < 0.1
    assert layer.num_batches_readmitted == 35
    assert layer.consecutive_condensed == 0


def test_batches_without_a_score_neither_end_nor_add_to_a_row(implementation):
    layer = trained(patience=3)
    for _ in range(3):
        assert is_open(layer, batch_of(0.2)[:1])
        assert not is_open(layer, batch_of(0.9))
    assert layer.consecutive_condensed == 3
    assert is_open(layer, batch_of(0.9))
    assert layer.num_batches_readmitted == 1


# What is kept


def test_a_resumed_run_decides_as_one_that_goes_on(implementation):
    scores = [*normal_scores(40), *[0.9] * 12, *normal_scores(20), *[0.8] * 5]
    expected = build()
    for score in scores:
        expected(batch_of(score))
    for place in (3, 7, 45, 52):
        layer = trained(scores[:place])
        again = build()
        again.load_state_dict(layer.state_dict())
        for score in scores[place:]:
            again(batch_of(score))
        torch.testing.assert_close(snapshot(again), snapshot(expected), rtol=0, atol=0)
    assert expected.num_batches_readmitted > 0 and expected.num_batches_condensed == 8


def test_the_moments_of_a_bn_warm_up_anew(implementation):
    bn = nn.BatchNorm2d(C)
    bn.num_batches_tracked.fill_(100_000)
    layer = trained(warmup=4)
    layer.load_state_dict(bn.state_dict(), strict=True)
    assert layer.num_batches_scored == layer.condensation_mean == layer.condensation_var == 0
    assert all(is_open(layer, batch_of(score)) for score in (0.9, 0.1, 0.2, 0.1))
    assert layer.num_batches_scored == 4
    torch.testing.assert_close(layer.condensation_mean.item(), 0.325, **CLOSE)


def test_the_moments_of_an_older_ubn_start_anew():
    state = trained().state_dict()
    for name in (*MOMENTS, 'num_batches_scored'):
        del state[name]
    layer = trained([0.7] * 8)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 6 and layer.condensation > 0
    assert layer.num_batches_scored == layer.condensation_mean == layer.condensation_var == 0


@pytest.mark.parametrize('change', [copy.deepcopy, lambda m: m.double(), lambda m: m.half()])
def test_copies_and_casts_keep_the_moments(change):
    layer = trained()
    before, other = snapshot(layer), change(copy.deepcopy(layer))
    for name in (*MOMENTS, 'num_batches_scored'):
        kept = getattr(other, name)
        torch.testing.assert_close(kept.to(before[name]), before[name], rtol=1e-3, atol=1e-4)
    assert {getattr(other, name).dtype for name in MOMENTS} == {other.condensation.dtype}


def test_reset_forgets_the_moments():
    layer = trained()
    layer.reset_running_stats()
    assert not any(getattr(layer, name) for name in (*MOMENTS, *COUNTERS))


# Ranks, graphs


def train_on_rank(rank, batches):
    layer = build(SyncUBN, warmup=4, patience=3)
    states = []
    for parts in batches:
        layer(parts[rank])
        states.append(snapshot(layer))
    return states


def test_ranks_decide_alike():
    scores = [*normal_scores(12, 0.2, 0.02), *[0.9] * 9, *normal_scores(3, 0.2, 0.02)]
    # What one rank alone would decide differs.
    batches = [
        [batch_of(s), batch_of(max(s - 0.3, -1.0), 2.0)] if i % 3 else [batch_of(s)[:1]] * 2
        for i, s in enumerate(scores)
    ]
    batches[5][1] = batches[5][1][:0]
    ranks = distributed.run(2, train_on_rank, batches)
    gate = make_reference(build(warmup=4, patience=3))
    for parts, *states in zip(batches, *ranks, strict=True):
        torch.testing.assert_close(*states, rtol=0, atol=0)
        parts = [p for p in parts if p.numel()]
        pairs = [torch.cosine_similarity(*p.double().flatten(1), 0) for p in parts if len(p) > 1]
        values = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1).double()
        mean, var = values.mean(1), values.var(1, unbiased=False)
        score = sum(pairs).item() / len(pairs) if pairs else None
        gate.step(mean, var, values.shape[1], score)
        for name in COUNTERS:
            assert states[0][name] == getattr(gate, name), name
        for name in MOMENTS:
            expected = torch.tensor(getattr(gate, name))
            torch.testing.assert_close(states[0][name], expected, **CLOSE)
    assert gate.num_batches_condensed > 2 and gate.num_batches_readmitted > 0


def test_compiled_without_a_break():
    layer, expected = build(), build()
    forward = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for score in (*normal_scores(10), *[0.9] * 10):
        torch.testing.assert_close(forward(batch_of(score)), expected(batch_of(score)))
    torch.testing.assert_close(snapshot(layer), snapshot(expected))
    assert layer.num_batches_condensed > 0


def test_export_in_evaluation():
    layer = trained().eval()
    x = batch_of(0.3)
    before = snapshot(layer)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(snapshot(layer), before, rtol=0, atol=0)

"""PopulationStatistics against the moments of all values at once, in float64."""

import distributed
import pytest
import torch
from reference import random_params, statistics, ubn
from torch import nn

from ubn_det import UBN, SyncUBN, UBN1d, UBN3d
from ubn_det.engine import PopulationStatistics

C = 5
# Both sides compute in float64 and differ in the order of their sums only.
EXACT = dict(rtol=1e-10, atol=1e-10)
SHAPES = {
    1: [(7, C), (2, C), (3, C, 4), (1, C, 9)],
    2: [(2, C, 3, 4), (1, C, 5, 1), (6, C, 1, 1), (3, C, 7, 2)],
    3: [(2, C, 2, 3, 1), (1, C, 4, 2, 2)],
}
LAYERS = {
    'BN1d': (lambda: nn.BatchNorm1d(C), 1),
    'BN2d': (lambda: nn.BatchNorm2d(C), 2),
    'UBN': (lambda: UBN(C, affine_kernel=3), 2),
    'UBN1d': (lambda: UBN1d(C), 1),
    'UBN3d': (lambda: UBN3d(C), 3),
    'SyncUBN': (lambda: SyncUBN(C), 2),
    'UBN without centering': (lambda: UBN(C, centering=False), 2),
}


def fill(layer):
    """Give a layer random values everywhere, and return its parameters by name."""
    layer.double()
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return {name: p.detach() for name, p in layer.named_parameters()}


def make_batches(shapes):
    """Make batches that differ in level and in spread."""
    return [
        (1 + i) * torch.randn(shape, dtype=torch.float64) + 3 * i for i, shape in enumerate(shapes)
    ]


def expect(batches, params):
    mean, var, count = statistics(batches, params)
    return mean, var * count / (count - 1)


def collect(layers, calls):
    """Call each layer with its batches; return the names of those not reached."""
    with PopulationStatistics(layers) as population, torch.no_grad():
        for name, batches in calls.items():
            for batch in batches:
                layers[name](batch)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    return population.write()


def assert_statistics(layer, expected, **tolerance):
    for name, value in zip(('running_mean', 'running_var'), expected, strict=True):
        torch.testing.assert_close(getattr(layer, name), value, **tolerance or EXACT)


@pytest.mark.parametrize('kind', LAYERS)
def test_statistics_are_those_of_all_values_together(kind):
    make, dims = LAYERS[kind]
    layer = make()
    params = fill(layer)
    # A depthwise kernel has no say in what is normalized, but has to run.
    batches = make_batches(SHAPES[dims])
    assert collect({'layer': layer}, {'layer': batches}) == []
    assert_statistics(layer, expect(batches, params))


def test_values_count_not_batches():
    layer = nn.BatchNorm2d(1).double()
    few, many = torch.zeros(1, 1, 1, 2).double(), torch.ones(2, 1, 3, 1).double()
    collect({'layer': layer}, {'layer': [few, many]})
    # 6 ones and 2 zeros: the mean of the means would be 1/2, that of the variances 0.
    expected = torch.tensor([[0.75], [1.5 / 7]], dtype=torch.float64)
    assert_statistics(layer, expected)


def test_what_is_empty_or_not_finite_adds_nothing():
    layers = {'bn': nn.BatchNorm2d(C), 'ubn': UBN(C), 'both': UBN(C), 'never': UBN(C)}
    params = {name: fill(layer) for name, layer in layers.items()}
    batches = make_batches(SHAPES[2])
    bad = []
    for value in (torch.nan, torch.inf, -torch.inf):
        bad.append(torch.randn(2, C, 3, 3).double())
        bad[-1][1, 2, 0, 1] = value
    empty = torch.zeros(0, C, 3, 3).double()
    mixed = [bad[0], batches[0], empty, *batches[1:], *bad[1:]]
    kept = [layers[name].running_var.clone() for name in ('both', 'never')]
    # Behind bad batches alone, and not called at all.
    calls = {'bn': mixed[:2] + mixed[3:], 'ubn': mixed, 'both': [empty]}
    assert collect(layers, calls) == ['both', 'never']
    for name in ('bn', 'ubn'):
        assert_statistics(layers[name], expect(batches, params[name]))
    assert torch.equal(layers['never'].running_var, kept[1])
    assert torch.equal(layers['both'].running_var, kept[0])


def test_keyword_and_low_precision_input():
    layer = UBN(C)
    params = fill(layer)
    layer.float()
    batches = [b.to(torch.bfloat16) for b in make_batches(SHAPES[2])]
    with PopulationStatistics({'layer': layer}) as population:
        for batch in batches:
            layer(input=batch)
    population.write()
    assert layer.running_mean.dtype == torch.float32
    expected = expect([b.double() for b in batches], params)
    assert_statistics(layer, [e.float() for e in expected], rtol=1e-5, atol=1e-5)


def test_no_cancellation_in_float32():
    layer = nn.BatchNorm2d(1)
    x = 1e4 + torch.randn(64, 1, 8, 8)
    collect({'layer': layer}, {'layer': x.split(4)})
    var = x.double().var().float().view(1)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=0)


def chain(rank, params, batches):
    """Run a shared SyncUBN twice and a BN on this rank's batches, and return their statistics."""
    first, second = SyncUBN(C).double(), nn.BatchNorm2d(C).double()
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.copy_(params[name])
    with PopulationStatistics({'first': first, 'second': second}) as population, torch.no_grad():
        for x in batches[rank]:
            y = first(x)
            first(2 * x)
            if y.numel():
                second(y)
    assert population.write() == []
    return [t for layer in (first, second) for t in (layer.running_mean, layer.running_var)]


def test_ranks_are_added_up_by_their_values():
    params = random_params(C, 2, 3)
    shapes = [
        [(2, C, 3, 4), (0, C, 3, 3), (1, C, 2, 2)],
        [(1, C, 5, 1), (3, C, 4, 4), (0, C, 1, 1)],
    ]
    batches = [make_batches(rank) for rank in shapes]
    batches[1] = [b - 7 for b in batches[1]]
    first, second = [], []
    for step in zip(*batches, strict=True):
        present = [x for x in step if x.numel()]
        first += present + [2 * x for x in present]
        # Normalized by the batch over both ranks.
        mean, var, _ = statistics(present, params)
        second += [ubn(x, params, 1e-5, mean, var)[0] for x in present]
    expected = [*expect(first, params), *expect(second, {})]
    for found in distributed.run(2, chain, params, batches):
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, **EXACT)


def nothing(rank, is_reached):
    layer = UBN(C)
    with PopulationStatistics({'layer': layer}) as population:
        if is_reached[rank]:
            layer(torch.arange(2.0 * C).view(2, C, 1, 1))
    return population.write(), layer.running_mean


@pytest.mark.parametrize('is_reached', [(True, False), (False, False)])
def test_a_rank_that_reaches_nothing_hangs_nobody(is_reached):
    expected = torch.zeros(C)
    if any(is_reached):
        expected = torch.arange(C) + C / 2
    for not_reached, mean in distributed.run(2, nothing, is_reached):
        assert not_reached == ([] if any(is_reached) else ['layer'])
        torch.testing.assert_close(mean, expected)

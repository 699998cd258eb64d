"""Tests of SyncUBN on real processes, against one process that holds the batches of all ranks."""

import copy
import functools
import pickle
from types import SimpleNamespace

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import Collectives, RankError
from mmengine.hooks import SyncBuffersHook
from reference import condensation_score, random_params, ubn
from sync_reference import SyncReference, pair_weighted_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, convert_sync_ubn

C = 4

# Both sides compute in float64 and differ in the order of their sums only.
EXACT = dict(rtol=1e-10, atol=1e-10)
# The score is kept in float32.
SCORE = dict(rtol=1e-6, atol=1e-6)

COUNTERS = (
    'num_batches_tracked',
    'num_batches_condensed',
    'num_batches_readmitted',
    'consecutive_condensed',
)

# The collectives of one layer. Per channel a mean and a sum of squared deviations, then count,
# pair count and pair sum; and per channel the gradients of mean and variance.
FORWARD = ('all_gather', 2 * C + 3)
BACKWARD = ('all_reduce', 2 * C)

ALWAYS_CONDENSED = dict(condensation_threshold=-1.0, warmup=0)


def random_batches(shapes, alike=0.0):
    """Make one batch a rank; with ``alike`` near 1 the samples of a rank are nearly the same."""
    batches = []
    for shape in shapes:
        # Every rank has values of its own scale and offset, so that their statistics differ.
        channels = (C,) + (1,) * (len(shape) - 2)
        scale = 0.5 + torch.rand(channels, dtype=torch.float64)
        offset = torch.randn(channels, dtype=torch.float64)
        noise = torch.randn(shape, dtype=torch.float64) * scale + offset
        common = 3 * torch.randn(shape[1:], dtype=torch.float64)
        batches.append((1 - alike) * noise + alike * common)
    return batches


def with_gradients(batches):
    return batches, [torch.randn_like(x) for x in batches]


def build(options, params, dtype=torch.float64):
    layer = SyncUBN(C, **{'condensation_threshold': 0.6, **options}, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name])
    return layer


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def train_step(layer, x, dy, use_reentrant=None, requires_grad=True):
    """Forward and backward of one batch on one rank, and what there is to know of it."""
    layer.zero_grad()
    x = x.clone().requires_grad_(requires_grad)
    with Collectives() as collectives:
        if use_reentrant is None:
            y = layer(x)
        else:
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        y.backward(dy)
    return {
        'y': y.detach(),
        'dx': x.grad,
        'gradients': {name: p.grad for name, p in layer.named_parameters()},
        'buffers': buffers(layer),
        'collectives': collectives.log,
    }


def train(rank, options, params, steps, kwargs):
    layer = build(options, params)
    return [train_step(layer, xs[rank], dys[rank], **kwargs) for xs, dys in steps]


def make_reference(options):
    names = {
        'condensation_threshold': 'threshold',
        **{name: name for name in ('momentum', 'warmup', 'patience', 'eps')},
    }
    return SyncReference(C, **{names[k]: v for k, v in options.items() if k in names})


def reference_step(norm, params, xs, dys):
    """Move ``norm`` on by one step; return outputs and gradients as one process has them."""
    xs = [x.double().detach().requires_grad_() for x in xs]
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    ys = norm(xs, params)
    # No value at all on any rank: the parameters are not in the reference's graph.
    zero = sum(p.sum() * 0 for p in params.values())
    (zero + sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True))).backward()
    dxs = [x.grad for x in xs]
    return [y.detach() for y in ys], dxs, {name: p.grad for name, p in params.items()}


def assert_close(found, expected, what, tolerance=EXACT):
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        **tolerance,
        equal_nan=True,
        msg=lambda text: f'{what}: {text}',
    )


def assert_buffers_equal(found, norm, tolerance=EXACT):
    for name, buffer in found.items():
        expected = torch.as_tensor(getattr(norm, name))
        if name in COUNTERS:
            assert buffer == expected, name
        else:
            assert_close(buffer, expected, name, SCORE if name == 'condensation' else tolerance)


def assert_step_equals(ranks, norm, params, xs, dys, values=EXACT, sums=EXACT):
    """Compare one step of all ranks with the reference, which is moved on by it.

    ``values`` is the tolerance of what has the input's type, ``sums`` that of the parameters'
    gradients, summed over the ranks, and of the running statistics.
    """
    ys, dxs, gradients = reference_step(norm, params, xs, dys)
    for rank, found in enumerate(ranks):
        assert_close(found['y'], ys[rank], f'y of rank {rank}', values)
        assert_close(found['dx'], dxs[rank], f'dx of rank {rank}', values)
        assert_buffers_equal(found['buffers'], norm, sums)
        assert found['gradients'].keys() <= params.keys()
    for name in ranks[0]['gradients']:
        total = sum(found['gradients'][name].double() for found in ranks)
        assert_close(total, gradients[name], f'gradient of {name}', sums)


def assert_equals_one_process(steps, params, options, norm=None, **kwargs):
    """Train on ``steps``, lists of one batch a rank, and compare every step with the reference.

    Returns:
        tuple[list[list[dict]], SyncReference]: What each rank has of each step, and the reference
        as it is after the last.
    """
    steps = [with_gradients(batches) for batches in steps]
    ranks = distributed.run(len(steps[0][0]), train, options, params, steps, kwargs)
    norm = make_reference(options) if norm is None else norm
    # An option that takes parameters away takes them from the reference, too.
    params = {name: params[name] for name in ranks[0][0]['gradients']}
    for i, (xs, dys) in enumerate(steps):
        assert_step_equals([rank[i] for rank in ranks], norm, params, xs, dys)
    return ranks, norm


# K ranks equal one process.

SHAPES = {
    'equal': [(2, C, 4, 5), (2, C, 4, 5)],
    'ragged maps': [(2, C, 4, 5), (1, C, 3, 2), (3, C, 2, 7)],
    'ragged batches': [(1, C, 4, 3), (5, C, 4, 3), (2, C, 4, 3), (3, C, 4, 3)],
    'ragged maps and batches': [(3, C, 2, 2), (2, C, 6, 5), (1, C, 1, 3), (6, C, 3, 1)],
    'first rank empty': [(0, C, 3, 3), (3, C, 3, 3)],
    'last rank empty': [(3, C, 3, 3), (2, C, 5, 2), (0, C, 7, 7)],
    'one rank not empty': [(0, C, 2, 2), (0, C, 2, 2), (4, C, 2, 3), (0, C, 2, 2)],
    'maps without values': [(2, C, 3, 3), (2, C, 0, 3)],
    'one sample': [(1, C, 2, 3), (4, C, 2, 3)],
    'one sample each': [(1, C, 2, 3), (1, C, 4, 3), (1, C, 3, 3)],
    'one value': [(1, C, 1, 1), (2, C, 3, 1)],
    '2-D': [(3, C), (5, C)],
    '2-D, one value and none': [(1, C), (0, C), (4, C)],
    '2-D, one value each': [(1, C), (1, C)],
    '3-D': [(2, C, 5), (0, C, 9), (3, C, 2)],
    '5-D': [(2, C, 2, 3, 2), (1, C, 3, 1, 2)],
}


@pytest.mark.parametrize('shapes', SHAPES.values(), ids=SHAPES.keys())
def test_ranks_equal_one_process(shapes):
    # The gate is open, closed, open.
    steps = [random_batches(shapes, alike) for alike in (0, 0.9, 0)]
    options = dict(condensation_threshold=0.9, warmup=1)
    if len(shapes[0]) == 5:
        # A neighbourhood is one of 2 dimensions.
        options['affine_kernel'] = 1
    ranks, norm = assert_equals_one_process(steps, random_params(C, 2, 3), options)

    has_pairs = any(x.numel() and len(x) > 1 for x in steps[0])
    assert norm.num_batches_condensed == has_pairs
    for step in (step for rank in ranks for step in rank):
        assert step['collectives'] == [FORWARD, BACKWARD]


OPTIONS = {
    'no threshold': dict(condensation_threshold=None),
    'momentum': dict(momentum=0.7),
    'cumulative': dict(momentum=None, **ALWAYS_CONDENSED),
    'eps': dict(eps=0.3),
    'closed gate': dict(condensation_threshold=-1.0, warmup=1),
    'plain': dict(affine=False, centering=False, scaling=False),
    'no centering': dict(centering=False),
    'no scaling': dict(scaling=False),
    'no kernel': dict(affine_kernel=1),
    'kernel alone': dict(affine_kernel=5, centering=False, scaling=False),
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options):
    shapes = [(2, C, 4, 3), (0, C, 4, 3), (3, C, 2, 5)]
    params = random_params(C, 2, options.get('affine_kernel', 3))
    steps = [random_batches(shapes) for _ in range(3)]
    ranks, norm = assert_equals_one_process(steps, params, options)
    assert norm.num_batches_condensed == (2 if options == OPTIONS['closed gate'] else 0)
    assert all(step['collectives'] == [FORWARD, BACKWARD] for rank in ranks for step in rank)


@pytest.mark.parametrize('kernel', [1, 3])
def test_channels_last(kernel):
    shapes = [(2, C, 4, 3), (3, C, 2, 5)]
    xs = [x.contiguous(memory_format=torch.channels_last) for x in random_batches(shapes)]
    options = dict(affine_kernel=kernel)
    ranks, _ = assert_equals_one_process([xs], random_params(C, 2, kernel), options)
    for rank in ranks:
        assert rank[0]['y'].is_contiguous(memory_format=torch.channels_last)


def test_without_running_statistics():
    steps = [random_batches([(2, C, 3, 3), (3, C, 2, 2)]) for _ in range(2)]
    options = dict(track_running_stats=False, **ALWAYS_CONDENSED)
    # There is no gate to close.
    norm = SyncReference(C, threshold=None)
    ranks, _ = assert_equals_one_process(steps, random_params(C, 2, 3), options, norm)
    assert ranks[0][0]['buffers'] == {}


def test_input_without_gradient():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (0, C, 3, 3)]))
    ranks = distributed.run(2, train, {}, params, [(xs, dys)], dict(requires_grad=False))
    _, _, gradients = reference_step(SyncReference(C), params, xs, dys)
    for name, gradient in gradients.items():
        assert_close(sum(rank[0]['gradients'][name] for rank in ranks), gradient, name)


def train_frozen(rank, params, xs, dys):
    layer = build({}, params).requires_grad_(False)
    found = train_step(layer, xs[rank], dys[rank])
    with Collectives() as collectives:
        layer(xs[rank])
    return found, collectives.log


def test_frozen_layer_synchronises():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 4, 2)]))
    norm = SyncReference(C)
    ys, dxs, _ = reference_step(norm, params, xs, dys)
    for rank, (found, no_gradient) in enumerate(distributed.run(2, train_frozen, params, xs, dys)):
        assert_close(found['y'], ys[rank], 'y')
        assert_close(found['dx'], dxs[rank], 'dx')
        assert_buffers_equal(found['buffers'], norm)
        assert set(found['gradients'].values()) == {None}
        assert found['collectives'] == [FORWARD, BACKWARD]
        assert no_gradient == [FORWARD]


def train_shared(rank, params, steps):
    """Call one layer several times before the backward, as a head does for each level."""
    layer = build({}, params)
    leaves = [xs[rank].clone().requires_grad_() for xs, _ in steps]
    with Collectives() as collectives:
        ys = [layer(x) for x in leaves]
        torch.autograd.backward(ys, [dys[rank] for _, dys in steps])
    return {
        'ys': ys,
        'dxs': [x.grad for x in leaves],
        'gradients': {name: p.grad for name, p in layer.named_parameters()},
        'buffers': buffers(layer),
        'collectives': collectives.log,
    }


def test_layer_shared_by_several_maps():
    shapes = [[(2, C, 6, 4), (1, C, 4, 4)], [(2, C, 3, 2), (1, C, 2, 2)]]
    steps = [with_gradients(random_batches(level)) for level in shapes]
    params = random_params(C, 2, 3)
    norm = SyncReference(C)
    expected = [reference_step(norm, params, *step) for step in steps]
    ranks = distributed.run(2, train_shared, params, steps)
    for rank, found in enumerate(ranks):
        for level, (ys, dxs, _) in enumerate(expected):
            assert_close(found['ys'][level], ys[rank], f'y of level {level}')
            assert_close(found['dxs'][level], dxs[rank], f'dx of level {level}')
        assert_buffers_equal(found['buffers'], norm)
        assert found['collectives'] == [FORWARD] * 2 + [BACKWARD] * 2
    for name in params:
        total = sum(found['gradients'][name] for found in ranks)
        assert_close(total, sum(gradients[name] for _, _, gradients in expected), name)


def train_in_float32(rank, xs, dys):
    return train_step(SyncUBN(C, momentum=1.0, condensation_threshold=0.6), xs[rank], dys[rank])


def test_large_mean_does_not_cancel():
    shapes = [(2, C, 6, 5), (3, C, 7, 4), (1, C, 9, 8)]
    # E[x^2] - mean^2 would lose the variance: 3000^2 has a spacing of 1 in float32.
    xs = [torch.randn(shape) + 3000 + rank for rank, shape in enumerate(shapes)]
    dys = [torch.randn(shape) for shape in shapes]
    norm = SyncReference(C, momentum=1.0)
    norm([x.double() for x in xs], {})
    for found in distributed.run(3, train_in_float32, xs, dys):
        # 3000 has a spacing of 2.4e-4; means that are off by d add d^2 + 2 d to the variance.
        for name, atol in (('running_mean', 5e-4), ('running_var', 2e-3)):
            tolerance = dict(rtol=0, atol=atol)
            assert_close(found['buffers'][name], getattr(norm, name), name, tolerance)


def train_in_bfloat16(rank, params, xs, dys, kernel):
    layer = build(dict(affine_kernel=kernel), params, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        return train_step(layer, xs[rank], dys[rank])


@pytest.mark.parametrize('kernel', [1, 3])
def test_bfloat16_under_autocast(kernel):
    shapes = [(2, C, 4, 3), (3, C, 5, 2)]
    xs, dys = ([t.bfloat16() for t in ts] for ts in with_gradients(random_batches(shapes)))
    params = random_params(C, 2, kernel)
    ranks = distributed.run(2, train_in_bfloat16, params, xs, dys, kernel)
    # As the layer holds them.
    params = {name: p.float().double() for name, p in params.items()}
    # All is computed in float32, and what has the input's type rounded once to 8 bits.
    values, sums = dict(rtol=2**-8, atol=1e-5), dict(rtol=1e-4, atol=1e-4)
    assert_step_equals(ranks, SyncReference(C), params, xs, dys, values, sums)
    for found in ranks:
        assert found['y'].dtype == found['dx'].dtype == torch.bfloat16
        assert found['buffers']['running_var'].dtype == torch.float32
        assert found['collectives'] == [FORWARD, BACKWARD]


# Hardly anything there.


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize(
    ('kernel', 'shape'), [(1, (0, C)), (1, (0, C, 5, 5)), (3, (0, C, 5, 5)), (3, (2, C, 0, 5))]
)
def test_nothing_moves_if_all_ranks_are_empty(kernel, shape, momentum):
    full = random_batches([(3, *shape[1:2], *[2] * len(shape[2:]))] * 2)
    empty = random_batches([shape] * 2)
    options = dict(affine_kernel=kernel, momentum=momentum)
    # First with fresh counters, then with others.
    steps = [empty, full, empty, full]
    ranks, _ = assert_equals_one_process(steps, random_params(C, 2, kernel), options)
    for first, before, after, _ in ranks:
        for name, buffer in after['buffers'].items():
            assert torch.equal(buffer, before['buffers'][name]), name
        assert first['buffers']['num_batches_tracked'] == 0
        assert after['y'].shape == after['dx'].shape == shape
        assert not any(gradient.any() for gradient in after['gradients'].values())
        assert after['collectives'] == [FORWARD, BACKWARD]


@pytest.mark.parametrize('shape', [(1, C), (1, C, 1, 1)])
def test_single_value_over_all_ranks_does_not_move_running_stats(shape):
    """It has no variance. No rank can raise an error by itself: the others would wait for it."""
    params = random_params(C, 2, 3)
    full = random_batches([(3, *shape[1:])] * 2)
    single = random_batches([shape, (0, *shape[1:])])
    steps = [with_gradients(full), with_gradients(single)]
    for before, after in distributed.run(2, train, {}, params, steps, {}):
        for name in ('running_mean', 'running_var', 'num_batches_tracked'):
            assert torch.equal(after['buffers'][name], before['buffers'][name]), name
        assert after['buffers']['num_batches_condensed'] == 1
        results = [after['y'], after['dx'], *after['gradients'].values()]
        assert all(torch.isfinite(t).all() for t in results)


# The gate.


@pytest.mark.parametrize(
    ('num_alike', 'num_random', 'threshold', 'is_open'), [(2, 5, 0.35, True), (5, 2, 0.7, False)]
)
def test_pairs_of_all_ranks_decide(num_alike, num_random, threshold, is_open):
    """One rank is over the threshold, the other under it; so is the mean that counts ranks."""
    alike = torch.randn(C, 3, 4).double() + 0.1 * torch.randn(num_alike, C, 3, 4).double()
    batches = [alike, torch.randn(num_random, C, 3, 4).double()]
    over, under = (condensation_score(x) for x in batches)
    score = pair_weighted_score(batches)
    assert under < threshold < over
    assert (score < threshold) == is_open
    assert ((over + under) / 2 < threshold) != is_open

    options = dict(condensation_threshold=threshold, warmup=0, momentum=0.5)
    # On either rank the local score is the wrong one once.
    for xs in (batches, batches[::-1]):
        ranks, _ = assert_equals_one_process([xs, xs], random_params(C, 2, 3), options)
        for found in (rank[1]['buffers'] for rank in ranks):
            assert found['num_batches_tracked'] == (2 if is_open else 0)
            assert_close(found['condensation'], score, 'condensation', SCORE)


def test_pairs_of_different_ranks_do_not_count():
    """The maps of all ranks are the same, and so are no two on one rank."""
    batch = torch.randn(2, C, 3, 3).double()
    batch[1] -= (batch[0] * batch[1]).sum() / batch[0].square().sum() * batch[0]
    options = dict(condensation_threshold=0.1, warmup=0)
    ranks, _ = assert_equals_one_process([[batch] * 2], random_params(C, 2, 3), options)
    for rank in ranks:
        assert rank[0]['buffers']['num_batches_condensed'] == 0
        assert_close(rank[0]['buffers']['condensation'], torch.zeros(()), 'condensation', SCORE)


def test_score_is_undefined_without_pairs():
    pairs, none = ([(n, C, 3, 3)] * 2 for n in (3, 1))
    options = dict(ALWAYS_CONDENSED)
    steps = [random_batches(pairs), random_batches(none)]
    for rank in assert_equals_one_process(steps, random_params(C, 2, 3), options)[0]:
        before, after = (step['buffers'] for step in rank)
        assert torch.equal(after['condensation'], before['condensation'])
        assert before['num_batches_tracked'] == 0
        assert after['num_batches_tracked'] == 1


def test_warmup_and_patience():
    shapes = [(2, C, 3, 3), (0, C, 3, 3), (3, C, 2, 4)]
    options = dict(condensation_threshold=0.7, warmup=2, patience=3)
    steps = [random_batches(shapes, alike=0.9) for _ in range(11)]
    ranks, _ = assert_equals_one_process(steps, random_params(C, 2, 3), options)
    for rank in ranks:
        tracked = [int(step['buffers']['num_batches_tracked']) for step in rank]
        assert tracked == [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
        assert rank[-1]['buffers']['num_batches_readmitted'] == 2


@pytest.mark.parametrize('bad_value', [float('nan'), float('inf')])
@pytest.mark.parametrize('bad_rank', [0, 2])
def test_one_bad_rank_closes_the_gate_on_all(bad_rank, bad_value):
    shapes = [(2, C, 3, 3), (3, C, 2, 4), (2, C, 4, 1)]
    good, bad = random_batches(shapes), random_batches(shapes)
    bad[bad_rank][1, 2, 0, 0] = bad_value
    # Patience does not let it through, either.
    options = dict(condensation_threshold=0.95, warmup=0, patience=1)
    ranks, _ = assert_equals_one_process([good, bad, bad, good], random_params(C, 2, 3), options)
    for before, *closed, after in ranks:
        for step in closed:
            for name in ('running_mean', 'running_var', 'condensation', 'num_batches_tracked'):
                assert torch.equal(step['buffers'][name], before['buffers'][name]), name
        assert closed[-1]['buffers']['num_batches_condensed'] == 2
        assert after['buffers']['num_batches_tracked'] == 2
        assert torch.isfinite(after['y']).all()


def train_buffers(rank, options, steps):
    layer = SyncUBN(C, **options)
    for xs in steps:
        layer(xs[rank])
    return buffers(layer)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_buffers_of_all_ranks_are_the_same_bytes(momentum):
    shapes = [(2, C, 5, 3), (1, C, 7, 7), (0, C, 3, 3), (5, C, 2, 9)]
    steps = [
        [x.float() for x in random_batches(shapes, alike)] for alike in (0, 0.5, 0.9, 0.9, 0.2, 0)
    ]
    options = dict(momentum=momentum, condensation_threshold=0.8, warmup=1, patience=1)
    first, *others = distributed.run(4, train_buffers, options, steps)
    assert first['num_batches_tracked'] > 0
    assert (first['num_batches_condensed'] > 0) == (momentum is not None)
    for other in others:
        for name, buffer in first.items():
            assert torch.equal(buffer, other[name]), name


def average_buffers(rank, steps):
    layer = SyncUBN(C, warmup=1, condensation_threshold=0.6)
    for xs in steps:
        layer(xs[rank])
    before = buffers(layer)
    SyncBuffersHook().after_train_epoch(SimpleNamespace(model=layer))
    return before, buffers(layer)


def test_averaging_the_buffers_changes_nothing():
    """mmengine's hook averages the integers, too, and cuts off what is behind the point."""
    shapes = [(2, C, 5, 3), (3, C, 2, 9)]
    steps = [[x.float() for x in random_batches(shapes, alike)] for alike in (0, 0.9, 0.9)]
    for before, after in distributed.run(2, average_buffers, steps):
        assert before['num_batches_condensed'] == 2
        for name, buffer in before.items():
            assert torch.equal(after[name], buffer), name


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    shapes = [(2, C, 3, 3), (0, C, 3, 3), (3, C, 2, 4)]
    # What the first run of a step moves would turn the decision in the second.
    options = dict(condensation_threshold=-1.0, warmup=1, patience=1)
    ranks, norm = assert_equals_one_process(
        [random_batches(shapes) for _ in range(4)],
        random_params(C, 2, 3),
        options,
        use_reentrant=use_reentrant,
    )
    assert norm.num_batches_condensed == 2
    # The forward runs twice, and its collective with it. At first a reentrant checkpoint's ranks
    # also say whether they will run it again.
    first = ('all_gather', FORWARD[1] + use_reentrant)
    for step in (step for rank in ranks for step in rank):
        assert step['collectives'] == [first, FORWARD, BACKWARD]


def train_checkpointed(rank, params, xs, dys, use_reentrant, is_frozen):
    """Train where the input requires a gradient on the first rank alone."""
    layer = build({}, params).requires_grad_(not is_frozen)
    return train_step(layer, xs[rank], dys[rank], use_reentrant, requires_grad=rank == 0)


@pytest.mark.parametrize('is_frozen', [False, True])
def test_checkpointed_input_without_gradient_on_one_rank(is_frozen):
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    norm = SyncReference(C)
    ys, dxs, gradients = reference_step(norm, params, xs, dys)
    ranks = distributed.run(2, train_checkpointed, params, xs, dys, False, is_frozen)
    for rank, found in enumerate(ranks):
        assert_close(found['y'], ys[rank], 'y')
        assert_buffers_equal(found['buffers'], norm)
        assert found['collectives'] == [FORWARD, FORWARD, BACKWARD]
    assert_close(ranks[0]['dx'], dxs[0], 'dx')
    assert ranks[1]['dx'] is None
    for name, gradient in gradients.items():
        parts = [found['gradients'][name] for found in ranks]
        if is_frozen:
            assert parts == [None, None]
        else:
            assert_close(sum(parts), gradient, name)


def run_nested(rank, params, xs):
    layer = build({}, params)
    x = xs[rank].clone().requires_grad_(rank == 0)
    # What the inner one gets requires no gradient on either rank.
    inner = functools.partial(checkpoint, layer, use_reentrant=True)
    checkpoint(lambda x: inner(2 * x), x, use_reentrant=True)


@pytest.mark.parametrize('case', ['trainable', 'frozen', 'nested'])
def test_reentrant_checkpoint_that_one_rank_does_not_run_again_is_refused(case):
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    with pytest.raises(RankError) as error:
        if case == 'nested':
            distributed.run(2, run_nested, params, xs)
        else:
            distributed.run(2, train_checkpointed, params, xs, dys, True, case == 'frozen')
    # On all ranks, before one waits for the other.
    for rank in (0, 1):
        assert f'rank {rank} raised' in str(error.value)
    assert str(error.value).count('RuntimeError: SyncUBN in reentrant activation check') == 2


def run_without_gradient(rank, xs, is_grad_enabled):
    """Run checkpoints inside of each other, of which on no rank an input requires a gradient."""
    layer = SyncUBN(C)
    with Collectives() as collectives, torch.set_grad_enabled(is_grad_enabled):
        checkpoint(
            lambda x: checkpoint(layer, x, use_reentrant=True),
            xs[rank].float(),
            use_reentrant=True,
        )
    return collectives.log, layer.num_batches_tracked.item()


@pytest.mark.filterwarnings('ignore:.*None of the inputs')
@pytest.mark.parametrize('is_grad_enabled', [True, False])
def test_reentrant_checkpoint_that_no_rank_runs_again(is_grad_enabled):
    xs = random_batches([(2, C, 3, 3), (3, C, 2, 4)])
    for log, num_batches in distributed.run(2, run_without_gradient, xs, is_grad_enabled):
        assert [name for name, _ in log] == ['all_gather']
        assert num_batches == 1


def train_nested(rank, params, xs, dys):
    layer = build({}, params)
    x = xs[rank].clone().requires_grad_(True)
    inner = functools.partial(checkpoint, layer, use_reentrant=True)
    # What the inner one gets requires no gradient in the outer one's first run, on either rank.
    y = checkpoint(lambda x: inner(2 * x), x, use_reentrant=True)
    y.backward(dys[rank])
    return {
        'y': y.detach(),
        'dx': x.grad,
        'gradients': {name: p.grad for name, p in layer.named_parameters()},
        'buffers': buffers(layer),
    }


def test_nested_reentrant_checkpoints():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    ranks = distributed.run(2, train_nested, params, xs, dys)
    norm = SyncReference(C)
    leaves = [x.clone().requires_grad_() for x in xs]
    ys = norm([2 * x for x in leaves], params)
    dxs = torch.autograd.grad(ys, leaves, dys)
    for rank, found in enumerate(ranks):
        assert_close(found['y'], ys[rank].detach(), 'y')
        assert_close(found['dx'], dxs[rank], 'dx')
        assert_buffers_equal(found['buffers'], norm)


# Where nothing is to be communicated.


def evaluate(rank, params, x, track_running_stats):
    if rank > 0:
        # Evaluation may be uneven: this rank has no samples left.
        return None
    layer = build(dict(track_running_stats=track_running_stats), params).eval()
    if track_running_stats:
        layer.running_mean.fill_(0.5)
        layer.running_var.fill_(2)
    return train_step(layer, x, torch.ones_like(x))


@pytest.mark.parametrize('track_running_stats', [True, False])
def test_evaluation_of_one_rank_alone(track_running_stats):
    params = random_params(C, 2, 3)
    x = torch.randn(2, C, 3, 3).double()
    found, _ = distributed.run(2, evaluate, params, x, track_running_stats)
    running = [torch.full((C,), value).double() for value in (0.5, 2)]
    leaf = x.clone().requires_grad_()
    expected, _, _ = ubn(leaf, params, 1e-5, *(running if track_running_stats else []))
    expected.sum().backward()
    assert_close(found['y'], expected, 'y')
    assert_close(found['dx'], leaf.grad, 'dx')
    assert found['collectives'] == []


def train_both(rank, params, x, dy):
    """Train a SyncUBN on its own, and a UBN."""
    sync, plain = build({}, params), UBN(C, condensation_threshold=0.6, dtype=x.dtype)
    plain.load_state_dict(sync.state_dict())
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        sync(x[:1, :, :1, :1])
    return train_step(sync, x, dy), train_step(plain, x, dy)


@pytest.mark.parametrize('is_initialised', [False, True])
def test_one_rank_is_ubn(is_initialised):
    args = (
        random_params(C, 2, 3),
        torch.randn(3, C, 3, 3).double(),
        torch.randn(3, C, 3, 3).double(),
    )
    if is_initialised:
        ((sync, plain),) = distributed.run(1, train_both, *args)
    else:
        assert not dist.is_initialized()
        sync, plain = train_both(0, *args)
    assert sync['collectives'] == []
    for found, expected in ((sync, plain), (sync['gradients'], plain['gradients'])):
        for name in found.keys() - {'gradients', 'buffers', 'collectives'}:
            assert torch.equal(found[name], expected[name]), name
    assert sync['buffers'].keys() == plain['buffers'].keys()
    for name, buffer in sync['buffers'].items():
        assert torch.equal(buffer, plain['buffers'][name]), name


# Process groups.


def train_in_groups(rank, options, params, steps):
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return train(rank, dict(options, process_group=groups[rank // 2]), params, steps, {})


def test_groups_keep_their_own_statistics():
    shapes = [(2, C, 3, 3), (3, C, 2, 4), (0, C, 3, 3), (5, C, 4, 1)]
    # One group closes its gate when the other does not.
    half = random_batches(shapes[:2], alike=0.9) + random_batches(shapes[2:])
    steps = [with_gradients(xs) for xs in (random_batches(shapes), half)]
    options = dict(condensation_threshold=0.9, warmup=1)
    params = random_params(C, 2, 3)
    ranks = distributed.run(4, train_in_groups, options, params, steps)
    closed = []
    for group in (slice(0, 2), slice(2, 4)):
        norm = make_reference(options)
        for i, (xs, dys) in enumerate(steps):
            found = [rank[i] for rank in ranks[group]]
            assert_step_equals(found, norm, params, xs[group], dys[group])
            assert all(step['collectives'] == [FORWARD, BACKWARD] for step in found)
        closed.append(norm.num_batches_condensed)
    assert closed == [1, 0]


def train_outside(rank, x):
    layer = SyncUBN(C, process_group=dist.new_group([0]))
    if rank == 0:
        with Collectives() as collectives:
            assert torch.equal(layer(x), UBN(C)(x))
        assert collectives.log == []
        return
    with pytest.raises(RuntimeError, match='process_group'):
        layer(x)
    assert layer.num_batches_tracked == 0
    # Evaluation needs no group.
    layer.eval()(x)


def test_rank_outside_of_the_group():
    distributed.run(2, train_outside, torch.randn(3, C, 2, 2))


def train_copies(rank, params, xs, dys):
    group = dist.new_group([0, 1])
    layer = build(dict(process_group=group), params)
    assert f'process_group={group}' in repr(layer)
    if rank == 2:
        return None
    found = [train_step(layer, xs[rank], dys[rank])]
    # A layer that has been used, and one inside of a model.
    layer.reset_running_stats()
    for copied in (
        copy.deepcopy(layer),
        copy.deepcopy(nn.Sequential(layer))[0],
        AveragedModel(layer).module,
    ):
        assert copied.process_group is group
        assert copied.weight is not layer.weight
        found.append(train_step(copied, xs[rank], dys[rank]))
        copied.process_group = None
        assert layer.process_group is group
    return found


def test_copy_keeps_the_group():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4), (2, C, 2, 2)]))
    *ranks, _ = distributed.run(3, train_copies, params, xs, dys)
    for i in range(4):
        found = [rank[i] for rank in ranks]
        assert_step_equals(found, SyncReference(C), params, xs[:2], dys[:2])


def train_pickled(rank, params, xs, dys):
    group = dist.new_group([0, 1])
    layer = build(dict(process_group=group), params)
    train_step(layer, xs[rank], dys[rank])
    layer.reset_running_stats()
    once = pickle.loads(pickle.dumps(layer))
    twice = pickle.loads(pickle.dumps(copy.deepcopy(once)))
    for loaded in (once, twice):
        with pytest.raises(RuntimeError, match='process_group.*pickling'):
            loaded(xs[rank])
        assert loaded.num_batches_tracked == 0
        loaded.eval()(xs[rank])
        loaded.train()
    once.process_group = group
    twice.process_group = None
    # None is all ranks, which is not lost.
    world = pickle.loads(pickle.dumps(build({}, params)))
    return [train_step(loaded, xs[rank], dys[rank]) for loaded in (once, twice, world)]


def test_pickling_loses_the_group():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    ranks = distributed.run(2, train_pickled, params, xs, dys)
    for i in range(3):
        assert_step_equals([rank[i] for rank in ranks], SyncReference(C), params, xs, dys)


# A model.


class Net(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.norm1 = SyncUBN(C, **options)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm2 = SyncUBN(C, affine_kernel=3, **options)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)).mean((2, 3))


def reference_net(parts, params, norms):
    for name in ('1', '2'):
        parts = [F.conv2d(part, params[f'conv{name}.weight'], padding=1) for part in parts]
        prefix = f'norm{name}.'
        own = {key.removeprefix(prefix): p for key, p in params.items() if prefix in key}
        parts = norms[prefix](parts, own)
        if name == '1':
            parts = [F.relu(part) for part in parts]
    return [part.mean((2, 3)) for part in parts]


make_optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def train_net(rank, options, state, steps, broadcast_buffers):
    net = Net(options).double()
    net.load_state_dict(state, strict=False)
    model = DistributedDataParallel(net, broadcast_buffers=broadcast_buffers)
    optimizer = make_optimizer(model.parameters())
    for xs, targets in steps:
        optimizer.zero_grad()
        # The mean over all samples of all ranks. DistributedDataParallel divides the sum of the
        # ranks' gradients by their number.
        share = len(xs) / sum(len(x) for x in xs)
        loss = share * (model(xs[rank]) - targets[rank]).square().sum()
        loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}, buffers(net)


@pytest.mark.parametrize('broadcast_buffers', [False, True])
def test_distributed_data_parallel_equals_one_process(broadcast_buffers):
    options = dict(condensation_threshold=0.8, warmup=1, momentum=0.5)
    # One rank has no sample at all in a step, another rank has none in the next.
    sizes = [(2, 3), (0, 4), (3, 0), (1, 2), (3, 2)]
    alike = [0, 0.2, 0.95, 0, 0.95]
    steps = []
    for numbers, share in zip(sizes, alike, strict=True):
        common = 2 * torch.randn(3, 5, 4)
        xs = [((1 - share) * torch.randn(n, 3, 5, 4) + share * common).double() for n in numbers]
        steps.append((xs, [torch.randn(n, C).double() for n in numbers]))

    state = {name: 0.3 * torch.randn_like(p) for name, p in Net(options).named_parameters()}
    state = {name: p.double() for name, p in state.items()}
    params = {name: p.clone().requires_grad_() for name, p in state.items()}
    norms = {prefix: make_reference(options) for prefix in ('norm1.', 'norm2.')}
    optimizer = make_optimizer(params.values())
    for xs, targets in steps:
        optimizer.zero_grad()
        ys = reference_net(xs, params, norms)
        F.mse_loss(torch.cat(ys), torch.cat(targets), reduction='sum').div(
            sum(len(x) for x in xs)
        ).backward()
        optimizer.step()
    assert all(norm.num_batches_tracked and norm.num_batches_condensed for norm in norms.values())

    ranks = distributed.run(2, train_net, options, state, steps, broadcast_buffers)
    for found, found_buffers in ranks:
        assert found.keys() == params.keys()
        for name, p in params.items():
            # Rounding grows over the steps.
            assert_close(found[name], p, name, dict(rtol=1e-9, atol=1e-9))
            assert not torch.allclose(p, state[name])
        for prefix, norm in norms.items():
            own = {
                name.removeprefix(prefix): buffer
                for name, buffer in found_buffers.items()
                if name.startswith(prefix)
            }
            assert_buffers_equal(own, norm, dict(rtol=1e-9, atol=1e-9))


# Conversion.


def used_layer(kind=UBN, **options):
    """Make a layer in the middle of a training, all of whose values tell it from a new one."""
    layer = kind(C, condensation_threshold=0.7, warmup=3, patience=7, momentum=0.3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for i, name in enumerate(COUNTERS):
        getattr(layer, name).fill_(i + 2)
    layer.condensation.fill_(0.25)
    layer.running_mean.normal_()
    layer.running_var.uniform_(1, 2)
    return layer


@pytest.mark.parametrize(
    ('kind', 'options', 'shape'),
    [
        (UBN, {}, (3, C, 4, 5)),
        (UBN, dict(affine_kernel=3), (3, C, 4, 5)),
        (UBN, dict(affine=False), (3, C, 4, 5)),
        (UBN1d, {}, (5, C)),
        (UBN2d, dict(affine_kernel=3, centering=False), (3, C, 4, 5)),
        (UBN3d, dict(scaling=False), (2, C, 3, 2, 2)),
    ],
)
def test_convert_keeps_the_layer(kind, options, shape):
    layer = used_layer(kind, **options)
    twin = copy.deepcopy(layer)
    layer.train(False)
    parameter = next(layer.parameters())
    parameter.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append('forward'))
    layer.register_forward_pre_hook(lambda *args: calls.append('pre'))

    sync = convert_sync_ubn(layer)
    assert type(sync) is SyncUBN
    assert sync.process_group is None
    assert not sync.training
    assert not parameter.requires_grad
    assert sync.extra_repr() == layer.extra_repr()
    for found, expected in (
        (dict(sync.named_parameters()), dict(layer.named_parameters())),
        (dict(sync.named_buffers()), dict(layer.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        assert all(found[name] is expected[name] for name in expected)

    x = torch.randn(shape)
    assert torch.equal(sync(x), twin.eval()(x))
    assert calls == ['pre', 'forward']
    for _ in range(3):
        assert torch.equal(sync.train()(x), twin.train()(x))
    for name, buffer in twin.named_buffers():
        assert torch.equal(getattr(sync, name), buffer), name


def test_convert_a_model():
    inner = nn.Sequential(nn.Conv2d(3, C, 1), UBN2d(C), nn.ReLU(), nn.BatchNorm2d(C))
    already = SyncUBN(C)
    model = nn.ModuleDict({'inner': inner, 'norm': UBN(C), 'already': already})
    model.train(False)['norm'].train(True)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert convert_sync_ubn(model) is model
    assert type(model['inner'][1]) is type(model['norm']) is SyncUBN
    assert type(model['inner'][3]) is nn.BatchNorm2d
    assert model['already'] is already
    assert [type(module) for module in model['inner']][::2] == [nn.Conv2d, nn.ReLU]
    assert list(model) == ['inner', 'norm', 'already']
    assert model['norm'].training
    assert not model['inner'][1].training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    # An optimizer that was built before goes on with the same parameters.
    assert {id(p) for p in model.parameters()} == {
        id(p) for p in optimizer.param_groups[0]['params']
    }


def test_convert_a_layer_that_two_names_share():
    """As heads have it that are shared between the levels of a pyramid."""
    shared = UBN(C)
    model = nn.Module()
    model.first = shared
    model.second = shared
    model.inner = nn.Sequential(shared)
    convert_sync_ubn(model)
    assert type(model.first) is SyncUBN
    assert model.second is model.first
    assert model.inner[0] is model.first


@pytest.mark.parametrize('kind', [UBN1d, UBN3d])
def test_convert_refuses_a_kernel_that_sync_lacks(kind):
    model = nn.Sequential(UBN(C), kind(C, affine_kernel=3))
    with pytest.raises(ValueError, match='affine_kernel=3.*' + kind.__name__):
        convert_sync_ubn(model)


def train_converted(rank, steps):
    group = dist.new_group([0, 1])
    torch.manual_seed(0)
    model = convert_sync_ubn(nn.Sequential(used_layer()), group).double()
    assert model[0].process_group is group
    start = {name: t.clone() for name, t in model[0].state_dict().items()}
    return start, [train_step(model[0], xs[rank], dys[rank]) for xs, dys in steps]


def test_converted_layer_goes_on_over_all_ranks():
    shapes = [(2, C, 3, 3), (3, C, 2, 4)]
    steps = [with_gradients(random_batches(shapes, alike)) for alike in (0, 0.9, 0)]
    ranks = distributed.run(2, train_converted, steps)
    start = ranks[0][0]
    norm = SyncReference(C, threshold=0.7, warmup=3, patience=7, momentum=0.3)
    for name in (*COUNTERS, 'running_mean', 'running_var', 'condensation'):
        setattr(norm, name, start[name])
    params = {name: t for name, t in start.items() if not hasattr(norm, name)}
    for i, (xs, dys) in enumerate(steps):
        assert_step_equals([found[i] for _, found in ranks], norm, params, xs, dys)


# The helper.


def fail_on_one_rank(rank):
    if rank == 1:
        raise ValueError('the reason')
    dist.all_reduce(torch.ones(1))


def test_error_of_a_rank_is_reported():
    with pytest.raises(RankError, match='(?s)rank 1 raised.*fail_on_one_rank.*the reason'):
        distributed.run(3, fail_on_one_rank)
    # And does no harm to what comes after.
    assert distributed.run(3, int) == [0, 1, 2]


def train_compiled(rank, params, xs, dys):
    layers = [build({}, params) for _ in range(2)]
    steps = []
    for layer in (layers[0], torch.compile(layers[1], backend='aot_eager', fullgraph=True)):
        x = xs[rank].clone().requires_grad_()
        with Collectives() as collectives:
            y = layer(x)
            y.backward(dys[rank])
        steps.append((y.detach(), x.grad, collectives.log))
    return steps, [buffers(layer) for layer in layers]


def test_compiled_layer_synchronises():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 4, 2)]))
    for (plain, compiled), (before, after) in distributed.run(2, train_compiled, params, xs, dys):
        for a, b in zip(plain[:2], compiled[:2], strict=True):
            assert_close(a, b, 'compiled')
        assert plain[2] == compiled[2] == [FORWARD, BACKWARD]
        torch.testing.assert_close(before, after)

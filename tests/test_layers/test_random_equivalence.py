"""SyncUBN on random cases: K ranks equal one process with the whole batch, whatever the case."""

import copy
import math
from collections import Counter
from typing import Any, NamedTuple

import distributed
import fuzzing
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import gain_of, random_params, statistics
from sync_reference import SyncReference, pair_weighted_score
from torch import Tensor

from ubn_det import UBN, SyncUBN

PARAMETERS = (
    *('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias'),
    'neighbour_weight',
)
COUNTERS = (
    'num_batches_tracked',
    'num_batches_condensed',
    'num_batches_readmitted',
    'consecutive_condensed',
    'num_batches_scored',
)

# Types of the layer and of its input, and the number of cases of each.
TYPES = {
    (torch.float64, torch.float64): 320,
    (torch.float32, torch.float32): 30,
    (torch.float32, torch.bfloat16): 20,
    (torch.float32, torch.float16): 20,
    (torch.float32, torch.float64): 20,
    (torch.float64, torch.float32): 20,
    (torch.bfloat16, torch.bfloat16): 20,
    (torch.float16, torch.float16): 20,
}

# How far a score must be from the threshold, by the type that it is computed in: it is a sum of
# some thousand products, which together are 1 at most.
MARGIN = {torch.float64: 1e-9, torch.float32: 1e-4}
# The score is kept in float32.
SCORE = {torch.float64: 1e-6, torch.float32: 1e-5}

# How many roundings of the largest value may come together in one result; the worst of some
# thousand cases needed a half of one.
NUM_ROUNDINGS = 4

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Case(NamedTuple):
    """All that makes a case. ``shapes`` goes by step and rank; the last step is in evaluation.

    ``alike`` is the share that the samples of a rank have in common, by step; ``spoilt`` the step,
    the rank and the value of what is not finite.
    """

    options: dict[str, Any]
    types: tuple[torch.dtype, torch.dtype]
    shapes: list[list[tuple[int, ...]]]
    alike: list[float]
    spoilt: tuple[int, int, float] | None
    layout: str
    is_initial: bool
    frozen: set[str]
    input_grads: list[bool]
    group: str
    seed: int


@st.composite
def random_cases(draw, types):
    world_size = draw(st.integers(1, 4))
    num_features = draw(st.integers(1, 5))
    num_steps = draw(st.integers(2, 6))
    num_dims = draw(st.sampled_from([4, 2, 4, 3, 4, 5]))
    # What UBN in one process can have as one batch. It has no score, for which it would take pairs
    # that here are none.
    is_whole = draw(st.integers(0, 2)) == 2
    affine = draw(st.integers(0, 3)) < 3
    threshold = st.sampled_from([-1, -1, 0.0, 0.6, 0.9, 1]) | st.floats(-1, 1)
    options = dict(
        num_features=num_features,
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1, 2.0])),
        momentum=draw(st.sampled_from([0.1, 0.7, 0.3, 0, 1, None])),
        affine=affine,
        track_running_stats=draw(st.integers(0, 4)) < 4,
        condensation_threshold=None if is_whole else draw(threshold),
        warmup=draw(st.sampled_from([0, 0, 1, 2])),
        patience=draw(st.sampled_from([1, 1, 2, 3])),
        centering=draw(st.booleans()),
        scaling=draw(st.booleans()),
        affine_kernel=draw(st.sampled_from([1, 3, 5])) if affine and num_dims == 4 else 1,
    )

    batch_size = st.sampled_from([2, 1, 3, 0, 2, 6])
    map_size = st.sampled_from([3, 1, 2, 4, 3, 2, 5, 0])
    map_shape = st.tuples(*[map_size] * (num_dims - 2)) | st.just((1,) * (num_dims - 2))
    shapes = []
    for _ in range(num_steps):
        common = draw(map_shape)
        all_empty = draw(st.integers(0, 15)) == 15
        maps = [common if is_whole else draw(map_shape) for _ in range(world_size)]
        shapes.append([(0 if all_empty else draw(batch_size), num_features, *m) for m in maps])

    spoilt = None
    if draw(st.integers(0, 4)) == 4:
        # Not in evaluation, where nothing holds it back.
        spoilt = (
            draw(st.integers(0, num_steps - 2)),
            draw(st.integers(0, world_size - 1)),
            draw(st.sampled_from([math.nan, math.inf, -math.inf])),
        )

    frozen_sets = {
        'none': st.just(set()),
        'some': st.sets(st.sampled_from(PARAMETERS)),
        'all': st.just(set(PARAMETERS)),
    }
    frozen = draw(frozen_sets[draw(st.sampled_from(['none', 'none', 'some', 'all']))])
    return Case(
        options=options,
        types=types,
        shapes=shapes,
        alike=[draw(st.sampled_from([0, 0.9, 0.5, 0.98])) for _ in range(num_steps)],
        spoilt=spoilt,
        layout=draw(st.sampled_from(['contiguous', 'channels_last', 'transposed', 'sliced'])),
        is_initial=draw(st.integers(0, 4)) == 4,
        frozen=frozen,
        input_grads=draw(st.lists(st.booleans(), min_size=world_size, max_size=world_size)),
        group=draw(st.sampled_from(['default', 'world', 'new'])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def make_steps(case):
    """Return, for each step, the inputs of all ranks and the gradients that come back."""
    torch.manual_seed(case.seed)
    steps = []
    for step, shapes in enumerate(case.shapes):
        xs = []
        for rank, shape in enumerate(shapes):
            # Every rank has values of its own scale and offset, so that their statistics differ.
            channels = (shape[1],) + (1,) * (len(shape) - 2)
            scale = 0.5 + torch.rand(channels).double()
            x = torch.randn(shape).double() * scale + torch.randn(channels).double()
            alike = case.alike[step]
            x = (1 - alike) * x + alike * 3 * torch.randn(shape[1:]).double()
            if case.spoilt and case.spoilt[:2] == (step, rank) and x.numel():
                x.view(-1)[torch.randint(x.numel(), ())] = case.spoilt[2]
            xs.append(x.to(case.types[1]))
        steps.append((xs, [torch.randn_like(x) for x in xs]))
    return steps


def make_params(case):
    """Return the values of the parameters that the layer has, in its type."""
    torch.manual_seed(case.seed)
    params = random_params(case.options['num_features'], 2, case.options['affine_kernel'])
    if case.is_initial:
        params = {name: torch.full_like(p, name == 'weight') for name, p in params.items()}
    names = dict(build(case.options, torch.float64, {}, set()).named_parameters())
    return {name: params[name].to(case.types[0]) for name in names}


# On the ranks.


def build(options, dtype, params, frozen, kind=SyncUBN):
    layer = kind(**options, dtype=dtype)
    with torch.no_grad():
        for name, value in params.items():
            getattr(layer, name).copy_(value)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return layer


def lay_out(x, layout):
    """Return the values of ``x`` as they lie in memory in this layout."""
    if layout == 'channels_last' and x.dim() in CHANNELS_LAST:
        return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    if layout == 'transposed':
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'sliced':
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x


def run_step(layer, x, dy, layout, input_grad):
    """Forward and backward of one batch; None where it is refused as a single value."""
    layer.zero_grad()
    x = lay_out(x, layout).detach().requires_grad_(input_grad)
    try:
        y = layer(x)
    except ValueError as error:
        assert 'more than 1 value per channel' in str(error), error
        return None
    # Some sizes are in two formats at once.
    if layout == 'channels_last' and not x.is_contiguous():
        assert y.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
    assert y.dtype == x.dtype
    wants_grad = input_grad or any(p.requires_grad for p in layer.parameters())
    # A rank that wants none goes back all the same where others may wait for it.
    is_shared = isinstance(layer, SyncUBN) and layer.training and dist.get_world_size() > 1
    assert y.requires_grad == (wants_grad or is_shared)
    if y.requires_grad:
        y.backward(lay_out(dy, layout))
    return {
        'y': y.detach(),
        'dx': x.grad,
        'gradients': {name: p.grad for name, p in layer.named_parameters()},
        'buffers': {name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


def run_steps(rank, case, params, steps):
    group = {'default': lambda: None, 'world': lambda: dist.group.WORLD, 'new': dist.new_group}
    options = dict(case.options, process_group=group[case.group]())
    layer = build(options, case.types[0], params, case.frozen)
    found = []
    for i, (xs, dys) in enumerate(steps):
        layer.train(i < len(steps) - 1)
        found.append(run_step(layer, xs[rank], dys[rank], case.layout, case.input_grads[rank]))
    return found


# In one process.


class Expected(NamedTuple):
    """What the reference has of one step, and how far rounding may move it."""

    xs: list[Tensor]
    # None of a rank that is refused as a single value.
    ys: list[Tensor | None]
    dxs: list[Tensor]
    gradients: dict[str, Tensor]
    norm: SyncReference
    bounds: dict[str, Tensor]


def expect(case, params, steps):
    """Return what the reference has of every step."""
    names = ('num_features', 'eps', 'momentum', 'warmup', 'patience', 'track_running_stats')
    threshold = case.options['condensation_threshold']
    norm = SyncReference(threshold=threshold, **{name: case.options[name] for name in names})
    found, bounds = [], {}
    for i, (xs, dys) in enumerate(steps):
        is_training = i < len(steps) - 1
        xs = [x.double().requires_grad_() for x in xs]
        params = {name: p.detach().double().requires_grad_() for name, p in params.items()}
        # Such a rank shares its statistics with no other one.
        is_alone = len(xs) == 1 if is_training else not norm.track_running_stats
        parts = [x for x in xs if not (is_alone and x.numel() == x.shape[1])]
        present = [part for part in parts if part.numel()]
        if is_training:
            keep_off_the_threshold(case, parts)
            ys = iter(norm(parts, params))
            used = [statistics(present, params)[:2]] if present else []
        else:
            ys = iter(norm.evaluate(parts, params))
            used = [statistics(part, params)[:2] for part in present]
            if norm.track_running_stats:
                used = [(norm.running_mean, norm.running_var)]
        ys = [next(ys) if any(x is part for part in parts) else None for x in xs]

        # Where there is no value at all, the parameters are not in the graph.
        total = sum(p.sum() * 0 for p in params.values())
        for x, y, dy in zip(xs, ys, dys, strict=True):
            total = total + (x * 0 if y is None else y * dy).sum()
        gradients = torch.autograd.grad(total, [*xs, *params.values()])
        bounds = rounding_bounds(case, xs, dys, params, used, bounds)
        found.append(
            Expected(
                [x.detach() for x in xs],
                [y if y is None else y.detach() for y in ys],
                gradients[: len(xs)],
                dict(zip(params, gradients[len(xs) :], strict=True)),
                copy.copy(norm),
                bounds,
            )
        )
    return found


def keep_off_the_threshold(case, parts):
    """Leave out cases in which rounding may turn the decision."""
    threshold = case.options['condensation_threshold']
    score = None if threshold is None else pair_weighted_score(parts)
    # There is no decision where a value, and so the score, is not finite.
    if score is not None and score.isfinite():
        assume(abs(score - threshold) > MARGIN[accumulate_type(case)])


def accumulate_type(case):
    return torch.promote_types(case.types[1], torch.float32)


def rounding_bounds(case, xs, dys, params, used, before):
    """Return, by channel, how far rounding may move each result.

    A normalized value is off by one rounding of the largest there is, and so is, relative to
    itself, the deviation that it is divided by; ``error`` has both. A result is off by that times
    its slope in the normalized values, and a sum by as much in each of its terms.

    Args:
        case (Case): Of this step.
        xs (list[Tensor]): Inputs.
        dys (list[Tensor]): Gradients of the outputs.
        params (dict[str, Tensor]): All parameters.
        used (list[tuple[Tensor, Tensor]]): Means and variances that normalize.
        before (dict[str, Tensor]): Bounds of the step before.
    """

    def largest(parts):
        values = [part.transpose(0, 1).flatten(1) for part in parts]
        values = torch.cat([torch.zeros(num_features, 1), *values], 1).detach().double()
        return values.nan_to_num(0, 0, 0).abs().amax(1)

    num_features = case.options['num_features']
    types = [accumulate_type(case), case.types[0]]
    unit = NUM_ROUNDINGS * max(torch.finfo(dtype).eps for dtype in types)

    size = {
        name: gain_of(name) * p.detach().abs().view(num_features, -1).sum(1)
        for name, p in params.items()
    }
    center, scale = (1 + size.get(name, 0) for name in ('center_weight', 'scale_weight'))
    weight = size.get('weight', 1) + size.get('neighbour_weight', 0)
    x, dy = largest(xs), largest(dys).max()
    value = 1 + torch.maximum(center * x, largest([mean[None] for mean, _ in used]))
    r = largest([(var[None] + case.options['eps']).rsqrt() for _, var in used])
    z = 1 + 2 * value * r
    error = unit * z
    slope = 2 * scale * z
    dz = dy * weight * slope
    dx = dz * z * r * center
    count = math.sqrt(1 + sum(part.numel() for part in xs) / num_features)
    return {
        'y': error * slope * weight + unit * size.get('bias', 0),
        'dx': error * dx,
        'weight': error * slope * dy * count,
        'neighbour_weight': error * slope * dy * count,
        'bias': error * dy * count,
        'scale_weight': error * dz * z * count,
        'scale_bias': error * dz * z * count,
        'center_weight': error * dx * x * count,
        # These pass the errors of all steps on.
        'running_mean': before.get('running_mean', 0) + unit * value,
        'running_var': before.get('running_var', 0) + unit * value**2,
    }


def assert_within(found, expected, bound, what):
    assert found.shape == expected.shape, what
    difference = (found.double() - expected).abs()
    message = f'{what} is {found}, not {expected}: {difference} and not within {bound}'
    assert (difference <= bound).all(), message


def check_planes(found, expected, x, bound, spacing, what):
    """Compare all instance channels that are finite."""
    assert found.shape == expected.shape, what
    if x.numel() == 0:
        return
    found, expected, x = (t.double().reshape(*t.shape[:2], -1) for t in (found, expected, x))
    chosen = x.isfinite().all(2) & expected.isfinite().all(2)
    if what == 'y':
        # What is not finite must not be hidden.
        assert not (found.isfinite().all(2) & ~expected.isfinite().all(2)).any()
    bound = bound.view(1, -1, 1) + spacing * expected.abs() + 1e-7 * spacing
    assert_within(found[chosen], expected[chosen], bound[chosen], what)


def check_step(case, ranks, expected):
    """Compare one step of all ranks with the reference."""
    xs, ys, dxs, gradients, norm, bounds = expected
    assert [found is None for found in ranks] == [y is None for y in ys]
    spacing = torch.finfo(case.types[1]).eps
    for rank, found in enumerate(ranks):
        if found is None:
            continue
        check_planes(found['y'], ys[rank], xs[rank], bounds['y'], spacing, 'y')
        assert (found['dx'] is not None) == case.input_grads[rank]
        if found['dx'] is not None:
            check_planes(found['dx'], dxs[rank], xs[rank], bounds['dx'], spacing, 'dx')

    ranks = [found for found in ranks if found is not None]
    x_is_finite = torch.stack([x.transpose(0, 1).flatten(1).isfinite().all(1) for x in xs]).all(0)
    for name, expected_sum in gradients.items():
        parts = [found['gradients'][name] for found in ranks]
        if name in case.frozen:
            assert all(part is None for part in parts), name
            continue
        assert all(part.dtype == case.types[0] for part in parts), name
        if not parts:
            continue
        # Each rank rounds its own. One channel a row.
        parts = torch.stack(parts).double().view(len(parts), len(x_is_finite), -1)
        expected_sum = expected_sum.view(len(x_is_finite), -1)
        rounding = torch.finfo(case.types[0]).eps * parts.abs().sum(0)
        chosen = x_is_finite & expected_sum.isfinite().all(1)
        bound = bounds[name][:, None] + rounding
        assert_within(parts.sum(0)[chosen], expected_sum[chosen], bound[chosen], name)

    for found in ranks:
        check_buffers(case, found['buffers'], norm, bounds)
        for name, buffer in found['buffers'].items():
            assert torch.equal(buffer, ranks[0]['buffers'][name]), f'{name} differs by rank'


def check_buffers(case, buffers, norm, bounds):
    assert bool(buffers) == case.options['track_running_stats']
    for name, buffer in buffers.items():
        expected = torch.as_tensor(getattr(norm, name)).double()
        assert buffer.isfinite().all(), name
        if name in COUNTERS:
            assert buffer == expected, name
        elif name.startswith('condensation'):
            assert_within(buffer, expected, torch.tensor(SCORE[accumulate_type(case)]), name)
        else:
            assert_within(buffer, expected, bounds[name], name)


def run_in_one_process(case, params, steps):
    """Return what the ranks would find, by a UBN that has all samples in one batch."""
    layer = build(case.options, case.types[0], params, case.frozen, UBN)
    found = []
    for xs, dys in steps:
        sizes = [len(x) for x in xs]
        step = run_step(layer, torch.cat(xs), torch.cat(dys), case.layout, any(case.input_grads))
        parts = [dict(step, y=y) for y in step['y'].split(sizes)]
        for rank, part in enumerate(parts):
            part['dx'] = step['dx'].split(sizes)[rank] if case.input_grads[rank] else None
            if rank:
                part['gradients'] = {
                    name: None if gradient is None else torch.zeros_like(gradient)
                    for name, gradient in step['gradients'].items()
                }
        found.append(parts)
    return found


def fits_one_process(case):
    """Whether each training batch can be one tensor, which has more than a single value."""
    return case.options['condensation_threshold'] is None and all(
        len({shape[2:] for shape in shapes}) == 1
        and sum(math.prod(shape) for shape in shapes) != shapes[0][1]
        for shapes in case.shapes[:-1]
    )


def describe(case, expected):
    """Return what kinds of case this is one of."""
    norm = expected[-1].norm
    sizes = [[math.prod(shape) for shape in shapes] for shapes in case.shapes]
    return {
        f'{len(sizes[0])} ranks',
        f'{len(case.shapes[0][0])}-D',
        f'condensed: {norm.num_batches_condensed > 0}',
        f'readmitted: {norm.num_batches_readmitted > 0}',
        f'kernel: {case.options["affine_kernel"] > 1}',
        f'refused: {any(y is None for step in expected for y in step.ys)}',
        f'empty rank: {any(0 in step and any(step) for step in sizes)}',
        f'all ranks empty: {any(not any(step) for step in sizes)}',
        f'single value: {any(sum(step) == case.options["num_features"] for step in sizes[:-1])}',
        f'not finite: {any(not x.isfinite().all() for step in expected for x in step.xs)}',
        f'one process: {fits_one_process(case)}',
        f'momentum is {case.options["momentum"]}',
    } | {
        f'{name} is {case.options[name]}'
        for name in ('affine', 'centering', 'scaling', 'track_running_stats')
    }


# What a run cannot do without.
KINDS = {
    *(f'{n} ranks' for n in (1, 2, 3, 4)),
    *(f'{n}-D' for n in (2, 3, 4, 5)),
    *(f'{name}: {value}' for name in ('condensed', 'readmitted') for value in (True, False)),
    *(f'momentum is {value}' for value in (0, 1, None)),
    *(
        'kernel: True',
        'kernel: False',
        'refused: True',
        'empty rank: True',
        'all ranks empty: True',
        'single value: True',
    ),
    *('not finite: True', 'one process: True'),
    *(
        f'{name} is {value}'
        for name in ('affine', 'centering', 'scaling', 'track_running_stats')
        for value in (True, False)
    ),
}


@pytest.mark.parametrize('factor', [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize('types', TYPES, ids=str)
def test_ranks_equal_one_process(types, factor, request):
    number = factor * TYPES[types]
    seen = Counter()

    @fuzzing.cases(request, number)
    @given(random_cases(types))
    def check(case):
        steps, params = make_steps(case), make_params(case)
        expected = expect(case, params, steps)
        ranks = distributed.run(len(case.shapes[0]), run_steps, case, params, steps)
        for found, step in zip(zip(*ranks, strict=True), expected, strict=True):
            check_step(case, found, step)
        if fits_one_process(case):
            training = run_in_one_process(case, params, steps[:-1])
            for found, step in zip(training, expected, strict=False):
                check_step(case, found, step)
        seen.update(['cases', *describe(case, expected)])

    check()
    assert seen['cases'] >= number
    # Hypothesis varies what it drew before: of many kinds, one may be absent by chance.
    if number >= 300:
        assert len(KINDS - seen.keys()) <= 1, KINDS - seen.keys()

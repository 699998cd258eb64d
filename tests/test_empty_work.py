"""A real detector that for some iterations has nothing, or a single value, to normalize."""

import copy

import distributed
import pytest
import torch
from tiny_detector import PARTS, Trainer, build_detector, make_batch

# The gate that closed on one batch lets the next one through, so that two of them move something.
RULE = dict(condensation_threshold=0.4, warmup=1, patience=1)

# What one rank trains on: the sizes of its images, the objects in each, and whether the region
# proposal network proposes anything.
FULL = [(40, 32), (32, 48)], [2, 1], True
NO_OBJECTS = [(40, 32), (32, 48)], [0, 0], True
NO_REGIONS = [(40, 32), (32, 48)], [0, 0], False
ONE_IMAGE = [(40, 32)], [1], True
ONE_REGION = [(40, 32)], [1], False
ONE_PIXEL = [(4, 4)], [1], True


def train(rank, norm, plan, find_unused_parameters=False, freeze=(), **detector):
    """Return what is logged of every iteration and the state after it, the one at first first."""
    torch.manual_seed(0)
    detector = build_detector(dict(type=norm, **RULE), **detector)
    for name in freeze:
        detector.get_submodule(name).requires_grad_(False)
    wrap = norm == 'SyncUBN'
    trainer = Trainer(detector, wrap=wrap, find_unused_parameters=wrap and find_unused_parameters)
    logged, states = [], [copy.deepcopy(detector.state_dict())]
    for iteration, ranks in enumerate(plan):
        torch.manual_seed(100 * iteration + rank)
        shapes, num_objects, has_proposals = ranks[rank]
        trainer.set_proposals(has_proposals)
        losses = trainer.step(make_batch(shapes, num_objects))
        logged.append({name: value.detach() for name, value in losses.items()})
        states.append(copy.deepcopy(detector.state_dict()))
    return logged, states


def train_on(ranks, norm, times=3, **options):
    """Train on full batches, then on what is said for each rank, then on full batches again."""
    full = [FULL] * len(ranks)
    plan = [full] * 2 + [ranks] * times + [full] * 2
    if norm == 'UBN':
        return plan, [train(0, norm, plan, **options)]
    return plan, distributed.run(len(ranks), train_with, norm, plan, options)


def train_with(rank, norm, plan, options):
    return train(rank, norm, plan, **options)


def assert_trained(plan, replicas):
    """Everything is finite, replicas agree to the bit, and layers saw what there was to see."""
    for logged, states in replicas:
        for losses in logged:
            assert all(torch.isfinite(value).all() for value in losses.values()), losses
        for state in states:
            assert all(torch.isfinite(value).all() for value in state.values())
        for state, first in zip(states, replicas[0][1], strict=True):
            for name, value in state.items():
                assert value.numpy().tobytes() == first[name].numpy().tobytes(), name

    _, states = replicas[0]
    names = {part: [n for n in states[0] if n.startswith(part)] for part in PARTS}
    for before, after, ranks in zip(states, states[1:], plan, strict=False):
        has_objects = any(sum(num_objects) for _, num_objects, _ in ranks)
        has_regions = has_objects or any(has_proposals for _, _, has_proposals in ranks)
        has_work = dict(zip(PARTS, (True, True, has_regions, has_objects), strict=True))
        for part, own in names.items():
            for name in own:
                layer, _, kind = name.rpartition('.')
                if kind == 'num_batches_tracked':
                    counts = [
                        s[name] + s[f'{layer}.num_batches_condensed'] for s in (before, after)
                    ]
                    assert counts[1] - counts[0] == has_work[part], name
                elif 'running_' in name and not has_work[part]:
                    assert torch.equal(before[name], after[name]), name

    # Training goes on: what two full batches move, they move at the end, too.
    for start, end in ((0, 2), (-3, -1)):
        for name in (name for part in PARTS for name in names[part] if 'running_' in name):
            assert not torch.equal(states[start][name], states[end][name]), name


def assert_gates_close_by_score_only(replicas):
    """Nothing that is missing has made statistics that are not finite."""
    _, states = replicas[0]
    for before, after in zip(states, states[1:], strict=False):
        for name in (name for name in after if name.endswith('num_batches_condensed')):
            if after[name] > before[name]:
                score = after[name.replace('num_batches_condensed', 'condensation')]
                assert score > RULE['condensation_threshold'], name


# What is empty, and whether the classifier of the regions is without a gradient there: mmdet
# leaves out its loss where there is no region, which DistributedDataParallel has to be told.
ONE_RANK = {
    'no objects': (NO_OBJECTS, False),
    'no regions': (NO_REGIONS, True),
    'one image': (ONE_IMAGE, False),
    'one region': (ONE_REGION, False),
}


@pytest.mark.parametrize(('work', 'is_unused'), ONE_RANK.values(), ids=ONE_RANK.keys())
def test_one_process(work, is_unused):
    plan, replicas = train_on([work], 'UBN')
    assert_trained(plan, replicas)
    assert_gates_close_by_score_only(replicas)


@pytest.mark.parametrize(('work', 'is_unused'), ONE_RANK.values(), ids=ONE_RANK.keys())
@pytest.mark.parametrize(
    'is_rank_full',
    [(True, False), (False, True), (False, False), (True, False, True)],
)
def test_ranks(work, is_unused, is_rank_full):
    ranks = [FULL if is_full else work for is_full in is_rank_full]
    plan, replicas = train_on(ranks, 'SyncUBN', find_unused_parameters=is_unused)
    assert_trained(plan, replicas)
    assert_gates_close_by_score_only(replicas)


def test_one_region_in_all():
    ranks = [NO_REGIONS, ONE_REGION, NO_REGIONS]
    assert_trained(*train_on(ranks, 'SyncUBN', find_unused_parameters=True))


@pytest.mark.parametrize('is_unused', [False, True])
def test_frozen_heads(is_unused):
    """Their layers normalize with the batch and move their statistics all the same."""
    ranks = [FULL, NO_REGIONS if is_unused else NO_OBJECTS]
    freeze = ('roi_head.bbox_head.shared_convs', 'roi_head.mask_head.convs')
    plan, replicas = train_on(ranks, 'SyncUBN', find_unused_parameters=is_unused, freeze=freeze)
    assert_trained(plan, replicas)
    first, *_, last = replicas[0][1]
    for part in freeze:
        name = f'{part}.0.bn.center_weight'
        assert torch.equal(first[name], last[name])


def test_frozen_head_on_features_of_one_level():
    """Without a region that extractor returns zeros that no gradient flows through."""
    plan, replicas = train_on(
        [FULL, NO_OBJECTS],
        'SyncUBN',
        freeze=('roi_head.mask_head.convs',),
        roi_head__mask_roi_extractor__featmap_strides=[4],
    )
    assert_trained(plan, replicas)


def test_maps_of_one_pixel():
    """The maps of each rank have one value per channel, those of both together have two."""
    ranks = [ONE_PIXEL, ONE_PIXEL]
    assert_trained(*train_on(ranks, 'SyncUBN'))
    # In one process it takes two images.
    shapes, num_objects, has_proposals = ONE_PIXEL
    assert_trained(*train_on([(shapes * 2, num_objects * 2, has_proposals)], 'UBN'))


def test_single_value_raises_before_anything_moves():
    detector = build_detector(dict(type='UBN'))
    trainer = Trainer(detector)
    trainer.step(make_batch(*FULL[:2]))
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        trainer.step(make_batch(*ONE_PIXEL[:2]))
    # The stem still had four values, the first layer behind its pooling raised.
    moved = [n for n, value in detector.state_dict().items() if not torch.equal(value, before[n])]
    assert {name.rpartition('.')[0] for name in moved} == {'backbone.bn1'}
    losses = trainer.step(make_batch(*FULL[:2]))
    assert all(torch.isfinite(value).all() for value in losses.values())


def test_single_value_over_all_ranks_closes_the_gate():
    """No rank can raise an error by itself: the others would wait for it."""
    plan, replicas = train_on(
        [ONE_REGION, NO_REGIONS], 'SyncUBN', find_unused_parameters=True, roi_size=1
    )
    assert_trained(plan, replicas)
    _, states = replicas[0]
    prefix = 'roi_head.bbox_head.shared_convs.0.bn'
    for before, after in zip(states[2:5], states[3:6], strict=True):
        for name in ('running_mean', 'running_var', 'num_batches_tracked', 'condensation'):
            assert torch.equal(after[f'{prefix}.{name}'], before[f'{prefix}.{name}']), name
        name = f'{prefix}.num_batches_condensed'
        assert after[name] == before[name] + 1
    # In one process the same region is an error.
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        train_on([ONE_REGION], 'UBN', roi_size=1)

"""Tests of SyncUBN on process groups that differ, overlap, are left, destroyed and made anew.

What a group computes is compared with one process that holds the batches of its ranks, in float64.
"""

import copy
import functools
import io
from datetime import timedelta

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import Collectives
from kernels import HAS_KERNELS
from reference import gain_of, random_params
from sync_reference import SyncReference
from test_sync_ubn import (
    BACKWARD,
    FORWARD,
    C,
    Net,
    assert_buffers_equal,
    assert_close,
    assert_step_equals,
    buffers,
    build,
    random_batches,
    reference_net,
    train_step,
    with_gradients,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ubn_det import UBN, SyncUBN

# Rounding grows over several layers or steps.
DEEP = dict(rtol=1e-8, atol=1e-8)
DESTROYED = r'process_group of this SyncUBN was destroyed: set layer\.process_group.*None for all'


class GroupedReference:
    """A layer in training in one process, each group of whose ranks has its own statistics."""

    def __init__(self, groups, **options):
        self.groups = groups
        self.norms = [SyncReference(C, **options) for _ in groups]

    def __call__(self, parts, params):
        ys = {}
        for ranks, norm in zip(self.groups, self.norms, strict=True):
            ys.update(zip(ranks, norm([parts[rank] for rank in ranks], params), strict=True))
        return [ys[rank] for rank in range(len(parts))]

    def of(self, rank):
        (norm,) = (n for ranks, n in zip(self.groups, self.norms, strict=True) if rank in ranks)
        return norm


def state_of(layer):
    return {name: t.clone() for name, t in layer.state_dict().items()}


def assert_raises_before_anything_moves(layer, x, match):
    """Train ``layer``; neither its state nor other ranks may notice."""
    before = state_of(layer)
    with Collectives() as collectives, pytest.raises(RuntimeError, match=match):
        layer(x)
    assert collectives.log == []
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert torch.equal(after[name], t), name


def assert_evaluates(layer, x):
    """Evaluate ``layer``, which needs no group, and leave it in training."""
    plain = UBN(C, dtype=x.dtype)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    layer.train()


# Several groups in one model.

GROUPS = {
    'world': [[0, 1, 2, 3]],
    'rows': [[0, 1], [2, 3]],
    'columns': [[0, 2], [1, 3]],
    # It overlaps with all others; where three ranks communicate one has nobody to talk to.
    'all but one': [[0, 1, 2], [3]],
}
# Two layers are called twice, with others in between.
ORDER = ('rows', 'world', 'columns', 'rows', 'all but one', 'world')


class Chain(nn.Module):
    """Layers on groups of their own, called one after another."""

    def __init__(self, groups, options):
        super().__init__()
        self.norms = nn.ModuleDict(
            {name: SyncUBN(C, process_group=group, **options) for name, group in groups.items()}
        )
        self.mixes = nn.ModuleList(nn.Conv2d(C, C, 1, bias=False) for _ in ORDER)

    def forward(self, x):
        for name, mix in zip(ORDER, self.mixes, strict=True):
            x = self.norms[name](mix(x))
        return x


def reference_chain(parts, params, norms):
    for i, name in enumerate(ORDER):
        parts = [F.conv2d(part, params[f'mixes.{i}.weight']) for part in parts]
        prefix = f'norms.{name}.'
        own = {key.removeprefix(prefix): p for key, p in params.items() if prefix in key}
        parts = norms[name](parts, own)
    return parts


def own_group(rank, partition):
    """Make all groups, as torch demands of every rank; return the one of this rank."""
    groups = [dist.new_group(ranks) for ranks in partition]
    (own,) = (g for g, ranks in zip(groups, partition, strict=True) if rank in ranks)
    return own


def train_chain(rank, is_mesh, options, state, steps):
    groups = {'world': None, 'all but one': own_group(rank, GROUPS['all but one'])}
    if is_mesh:
        mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('down', 'across'))
        groups |= {'rows': mesh.get_group('across'), 'columns': mesh.get_group('down')}
    else:
        groups |= {name: own_group(rank, GROUPS[name]) for name in ('rows', 'columns')}
    model = Chain(groups, options).double()
    model.load_state_dict(state, strict=False)
    return [train_step(model, xs[rank], dys[rank]) for xs, dys in steps]


@pytest.mark.parametrize('is_mesh', [False, True], ids=['new_group', 'mesh'])
def test_layers_with_groups_of_their_own(is_mesh):
    shapes = [(2, C, 3, 3), (3, C, 2, 4), (0, C, 3, 3), (4, C, 4, 2)]
    # In the second step the gates of some layers and groups close, in others they stay open.
    options = dict(condensation_threshold=0.7, warmup=1)
    steps = []
    for share in (0, 0.9, 0):
        xs = random_batches(shapes[:2], alike=share) + random_batches(shapes[2:])
        steps.append(with_gradients(xs))
    state = {
        name: torch.randn_like(p, dtype=torch.float64)
        for name, p in Chain(dict.fromkeys(GROUPS), options).named_parameters()
    }
    ranks = distributed.run(4, train_chain, is_mesh, options, state, steps)

    gate = dict(threshold=0.7, warmup=1)
    norms = {name: GroupedReference(groups, **gate) for name, groups in GROUPS.items()}
    for i, (xs, dys) in enumerate(steps):
        leaves = [x.clone().requires_grad_() for x in xs]
        params = {name: p.clone().requires_grad_() for name, p in state.items()}
        ys = reference_chain(leaves, params, norms)
        sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True)).backward()
        for rank, found in enumerate(rank[i] for rank in ranks):
            assert_close(found['y'], ys[rank], f'y of rank {rank}', DEEP)
            assert_close(found['dx'], leaves[rank].grad, f'dx of rank {rank}', DEEP)
            for name, norm in norms.items():
                prefix = f'norms.{name}.'
                own = {
                    key.removeprefix(prefix): buffer
                    for key, buffer in found['buffers'].items()
                    if key.startswith(prefix)
                }
                assert own
                assert_buffers_equal(own, norm.of(rank), DEEP)
            # Of rank 3 one layer has nobody to talk to.
            num_calls = len(ORDER) - (rank == 3)
            assert found['collectives'] == [FORWARD] * num_calls + [BACKWARD] * num_calls
        for name, p in params.items():
            total = sum(rank[i]['gradients'][name] for rank in ranks)
            assert_close(total, p.grad, f'gradient of {name}', DEEP)

    closed = [norm.num_batches_condensed for norms in norms.values() for norm in norms.norms]
    assert any(closed)
    assert 0 in closed


# Under DistributedDataParallel over all ranks.

make_optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def train_net(rank, options, state, steps, broadcast_buffers):
    net = Net(options).double()
    net.norm1.process_group = own_group(rank, GROUPS['rows'])
    net.norm2.process_group = own_group(rank, GROUPS['columns'])
    net.load_state_dict(state, strict=False)
    model = DistributedDataParallel(net, broadcast_buffers=broadcast_buffers)
    optimizer = make_optimizer(model.parameters())
    for xs, targets in steps:
        optimizer.zero_grad()
        # The mean over the samples of all ranks: the ranks' gradients are averaged.
        share = len(xs) / sum(len(x) for x in xs)
        (share * (model(xs[rank]) - targets[rank]).square().sum()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}, buffers(net)


@pytest.mark.parametrize('broadcast_buffers', [False, True])
def test_distributed_data_parallel_over_more_ranks_than_the_groups(broadcast_buffers):
    options = dict(condensation_threshold=0.8, warmup=1, momentum=0.5)
    gate = dict(threshold=0.8, warmup=1, momentum=0.5)
    steps = []
    for share in (0, 0.95, 0, 0.5):
        numbers = (2, 3, 1, 4)
        common = 2 * torch.randn(3, 5, 4)
        # The ranks of one row are alike, those of the other are not.
        xs = [
            ((1 - own) * torch.randn(n, 3, 5, 4) + own * common).double()
            for n, own in zip(numbers, (share, share, 0, 0), strict=True)
        ]
        steps.append((xs, [torch.randn(n, C).double() for n in numbers]))
    state = {
        name: 0.3 / gain_of(name.rpartition('.')[2]) * torch.randn_like(p).double()
        for name, p in Net(options).named_parameters()
    }
    ranks = distributed.run(4, train_net, options, state, steps, broadcast_buffers)

    params = {name: p.clone().requires_grad_() for name, p in state.items()}
    norms = {
        'norm1.': GroupedReference(GROUPS['rows'], **gate),
        'norm2.': GroupedReference(GROUPS['columns'], **gate),
    }
    optimizer = make_optimizer(params.values())
    for xs, targets in steps:
        optimizer.zero_grad()
        if broadcast_buffers:
            # Rank 0 hands its buffers to all before each forward; it is in the first groups.
            for norm in norms.values():
                norm.norms = [copy.deepcopy(norm.norms[0]) for _ in norm.norms]
        ys = reference_net(xs, params, norms)
        total = F.mse_loss(torch.cat(ys), torch.cat(targets), reduction='sum')
        (total / sum(len(x) for x in xs)).backward()
        optimizer.step()
    rows = norms['norm1.'].norms
    assert not torch.allclose(rows[0].running_mean, rows[1].running_mean)
    assert any(norm.num_batches_condensed for norm in rows)

    for rank, (found, found_buffers) in enumerate(ranks):
        for name, p in params.items():
            assert_close(found[name], p, name, DEEP)
            assert torch.equal(found[name], ranks[0][0][name])
        for prefix, norm in norms.items():
            own = {
                name.removeprefix(prefix): buffer
                for name, buffer in found_buffers.items()
                if name.startswith(prefix)
            }
            assert_buffers_equal(own, norm.of(rank), DEEP)


# A group of one rank.


def train_alone(rank, params, xs, dys):
    group = own_group(rank, [[0], [1]])
    sync = build(dict(process_group=group), params)
    plain = UBN(C, condensation_threshold=0.6, dtype=torch.float64)
    plain.load_state_dict(sync.state_dict())
    single = xs[rank][:1, :, :1, :1]
    for layer in (sync, plain):
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            layer(single)
    return [train_step(layer, xs[rank], dys[rank]) for layer in (sync, plain)]


def test_group_of_one_rank_is_ubn():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    for sync, plain in distributed.run(2, train_alone, params, xs, dys):
        assert sync['collectives'] == []
        torch.testing.assert_close(sync, plain, rtol=0, atol=0)


# A rank outside of the group.


def train_outside_and_in(rank, params, steps):
    group = dist.new_group([0, 1])
    layer = build(dict(process_group=group), params)
    (xs, dys), (all_xs, all_dys) = steps
    found = []
    if rank == 2:
        for outside in (layer, copy.deepcopy(layer)):
            match = 'process_group of this SyncUBN does not contain this rank'
            assert_raises_before_anything_moves(outside, xs[0], match)
            with torch.no_grad():
                assert_raises_before_anything_moves(outside, xs[0], match)
            assert_evaluates(outside, xs[0])
        found.append(None)
    else:
        found.append(train_step(layer, xs[rank], dys[rank]))
    # The way out: a group that contains all.
    layer.process_group = None
    layer.reset_running_stats()
    return [*found, train_step(layer, all_xs[rank], all_dys[rank])]


def test_rank_outside_of_the_group_raises_and_can_be_taken_in():
    params = random_params(C, 2, 3)
    shapes = [(2, C, 3, 3), (3, C, 2, 4), (1, C, 2, 2)]
    steps = [with_gradients(random_batches(some)) for some in (shapes[:2], shapes)]
    ranks = distributed.run(3, train_outside_and_in, params, steps)
    for i, (xs, dys) in enumerate(steps):
        found = [rank[i] for rank in ranks[: len(xs)]]
        assert_step_equals(found, SyncReference(C), params, xs, dys)


# Copies.


def train_saved(rank, params, xs, dys):
    group = dist.new_group([0, 1])
    if rank == 2:
        # It is there for the layer of all ranks among those that are read.
        SyncUBN(C)(torch.randn(2, C, 3, 3))
        return None
    layer = build(dict(process_group=group), params)
    steps = []

    # A shallow copy shares its buffers with the layer, and its group until either is given one.
    shallow = copy.copy(layer)
    assert shallow.process_group is group
    shallow.process_group = None
    assert layer.process_group is group

    # The state has no group in it, and brings none.
    assert not any('group' in name for name in layer.state_dict())
    other = SyncUBN(C, process_group=group, condensation_threshold=0.6).double()
    other.load_state_dict(layer.state_dict())
    assert other.process_group is group
    steps.append(train_step(other, xs[rank], dys[rank]))

    # A whole model in a file, and a copy of what was read.
    torch.save(nn.Sequential(layer, SyncUBN(C)), file := io.BytesIO())
    file.seek(0)
    model = torch.load(file, weights_only=False)
    for loaded in (model[0], copy.deepcopy(model)[0]):
        assert loaded.process_group is None
        assert_raises_before_anything_moves(loaded, xs[rank], 'process_group.*pickling')
        assert_evaluates(loaded, xs[rank])
        # Its state does not mend it: nobody has said which group.
        loaded.load_state_dict(layer.state_dict())
        assert_raises_before_anything_moves(loaded, xs[rank], 'process_group.*pickling')
        loaded.process_group = group
        steps.append(train_step(loaded, xs[rank], dys[rank]))
    # All ranks are no group that could be lost.
    model[1](xs[rank].float())
    assert model[1].num_batches_tracked == 1
    return steps


def test_saved_and_copied_layers():
    params = random_params(C, 2, 3)
    xs, dys = with_gradients(random_batches([(2, C, 3, 3), (3, C, 2, 4)]))
    ranks = distributed.run(3, train_saved, params, xs, dys)[:2]
    for i in range(3):
        assert_step_equals([rank[i] for rank in ranks], SyncReference(C), params, xs, dys)


# A group that was destroyed.


def train_destroyed(rank, params, steps):
    group = dist.new_group([0, 1])
    alone = own_group(rank, [[0], [1]])
    layer = build(dict(process_group=group), params)
    world = build({}, params)
    lonely = build(dict(process_group=alone), params)
    compiled = torch.compile(
        build(dict(process_group=group), params), backend='aot_eager', fullgraph=True
    )
    (xs, dys), *rest = [(xs[rank], dys[rank]) for xs, dys in steps]
    found = [train_step(layer, xs, dys)]
    train_step(world, xs, dys)
    lonely(xs)
    layers = [layer, copy.deepcopy(layer), lonely]
    # PyTorch's operators look the group up in what is traced, which torch.compile refuses.
    if HAS_KERNELS:
        compiled(xs)
        layers.append(compiled)
    x = xs.clone().requires_grad_()
    unfinished = build(dict(process_group=group), params)(x)

    # No rank may leave while another still talks to it.
    dist.barrier()
    dist.destroy_process_group(group)
    dist.destroy_process_group(alone)
    for broken in layers:
        assert_raises_before_anything_moves(broken, xs, DESTROYED)
    with torch.no_grad():
        assert_raises_before_anything_moves(layer, xs, DESTROYED)
    with pytest.raises(RuntimeError, match=DESTROYED):
        unfinished.backward(dys)
    assert_evaluates(layer, xs)

    # The ways out, and a layer that has never had the group.
    for group in (None, dist.new_group([0, 1])):
        layer.process_group = group
        found.append(train_step(layer, *rest[len(found) - 1]))
    return found, train_step(world, *rest[0])


def test_destroyed_group():
    params = random_params(C, 2, 3)
    shapes = [(2, C, 3, 3), (3, C, 2, 4)]
    steps = [with_gradients(random_batches(shapes)) for _ in range(3)]
    ranks = distributed.run(2, train_destroyed, params, steps)
    norm = SyncReference(C)
    for i, (xs, dys) in enumerate(steps):
        assert_step_equals([found[i] for found, _ in ranks], norm, params, xs, dys)
    norm = SyncReference(C)
    norm(steps[0][0], params)
    assert_step_equals([world for _, world in ranks], norm, params, *steps[1])


# The default group destroyed and made anew.


def train_anew(rank, store, params, steps):
    (xs, dys), (later_xs, later_dys) = steps
    old_world = dist.group.WORLD
    old_group = dist.new_group([0, 1])
    early = build({}, params)
    grouped = build(dict(process_group=old_group), params)
    named = build(dict(process_group=old_world), params)
    found = {'early': [train_step(early, xs[rank], dys[rank])]}
    train_step(named, xs[rank], dys[rank])
    if rank < 2:
        found['grouped'] = [train_step(grouped, xs[rank], dys[rank])]

    # No rank may leave while another still talks to it; the names above keep the connections.
    dist.barrier()
    dist.destroy_process_group()
    if rank == 2:
        return found
    before_init = build({}, params)
    x, dy = later_xs[rank], later_dys[rank]
    # On its own each layer is a UBN, one with a group that is no more, too.
    for layer in (early, grouped):
        sync = copy.deepcopy(layer)
        plain = UBN(C, condensation_threshold=0.6, dtype=x.dtype)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(train_step(sync, x, dy), train_step(plain, x, dy))

    dist.init_process_group(
        'gloo',
        init_method=f'file://{store}',
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=distributed.TIMEOUT),
    )
    new_group = dist.new_group([0, 1])
    # A name does not tell the new groups from the old.
    assert new_group.group_name == old_group.group_name
    assert dist.group.WORLD.group_name == old_world.group_name
    for stale in (grouped, named, copy.deepcopy(grouped)):
        assert_raises_before_anything_moves(stale, x, DESTROYED)
        assert_evaluates(stale, x)
    grouped.process_group = new_group
    named.process_group = dist.group.WORLD
    layers = {'early': early, 'before_init': before_init, 'grouped': grouped, 'named': named}
    for name, layer in layers.items():
        found.setdefault(name, []).append(train_step(layer, x, dy))
        assert found[name][-1]['collectives'] == [FORWARD, BACKWARD]
    return found


def test_default_group_made_anew_with_fewer_ranks(tmp_path):
    params = random_params(C, 2, 3)
    shapes = [(2, C, 3, 3), (3, C, 2, 4), (4, C, 2, 2)]
    (xs, dys), later = (with_gradients(random_batches(some)) for some in (shapes, shapes[:2]))
    store = str(tmp_path / 'store')
    ranks = distributed.run(3, train_anew, store, params, [(xs, dys), later])

    norm = SyncReference(C)
    assert_step_equals([rank['early'][0] for rank in ranks], norm, params, xs, dys)
    of_named = copy.deepcopy(norm)
    assert_step_equals([rank['early'][1] for rank in ranks[:2]], norm, params, *later)
    assert_step_equals([rank['named'][0] for rank in ranks[:2]], of_named, params, *later)
    norm = SyncReference(C)
    assert_step_equals([rank['before_init'][0] for rank in ranks[:2]], norm, params, *later)
    norm = SyncReference(C)
    for i, step in enumerate([(xs[:2], dys[:2]), later]):
        assert_step_equals([rank['grouped'][i] for rank in ranks[:2]], norm, params, *step)

"""Tests of UBN and SyncUBN inside of what spreads a training over processes or several batches.

Each training is compared with one process that holds the batches of all ranks, in float64.
"""

import contextlib
import copy
import functools
import math
import operator
import os
import uuid
from typing import NamedTuple
from unittest import mock

import distributed
import pytest
import torch
import torch.nn.functional as F
from distributed import Collectives
from mmengine.hooks import EMAHook, SyncBuffersHook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from reference import gain_of, ubn
from sync_reference import SyncReference
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ubn_det import UBN, SyncUBN

# Odd, so that shards are uneven.
C = 5
EPS = 1e-5
LEARNING_RATE, MOMENTUM = 0.02, 0.9

# Both sides compute in float64; rounding grows over the layers and the steps.
CLOSE = dict(rtol=1e-8, atol=1e-8)
EXACT = dict(rtol=0, atol=0)
# The score is kept in float32.
SCORE = dict(rtol=1e-6, atol=1e-6)

COUNTERS = (
    'num_batches_tracked',
    'num_batches_condensed',
    'num_batches_readmitted',
    'consecutive_condensed',
    'num_batches_scored',
)
SCORES = ('condensation', 'condensation_mean', 'condensation_var')
BUFFERS = ('running_mean', 'running_var', *SCORES, *COUNTERS)

# The collectives of one SyncUBN, and how many of them a forward runs.
FORWARD = ('all_gather', 2 * C + 3)
BACKWARD = ('all_reduce', 2 * C)
NUM_SYNCHRONISED = 2


class Batch(NamedTuple):
    """What all ranks run at once, one entry a rank.

    Args:
        xs (list[Tensor]): Images.
        targets (list[Tensor]): What the network shall return.
        uses_side (tuple[bool]): Whether the side branch runs.
    """

    xs: list
    targets: list
    uses_side: tuple = (True, True)

    @property
    def scale(self):
        """What makes the average of the ranks' sums the mean over all samples."""
        return len(self.xs) / sum(len(x) for x in self.xs)


class Net(nn.Module):
    """Two SyncUBN in a row, beside the second a UBN, and a SyncUBN that is never called."""

    def __init__(self, has_idle=False, use_reentrant=None):
        super().__init__()
        gate = dict(condensation_threshold=0.8, warmup=1, momentum=0.5)
        convolution = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.first = nn.Sequential(convolution(3, C), SyncUBN(C, **gate), nn.ReLU())
        self.second = nn.Sequential(convolution(C, C), SyncUBN(C, affine_kernel=3, **gate))
        self.side = nn.Sequential(convolution(C, C), UBN(C, **gate))
        if has_idle:
            self.idle = nn.Sequential(convolution(C, C), SyncUBN(C, **gate))
            nn.init.ones_(self.idle[0].weight)
        self.use_reentrant = use_reentrant

    def forward(self, x, uses_side=True):
        x = self.run(self.first, x)
        y = self.run(self.second, x)
        if uses_side:
            y = y + self.run(self.side, x)
        return y.mean((2, 3))

    def run(self, block, x):
        if self.use_reentrant is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.use_reentrant)


class Reference:
    """The network, its norms and the optimizer in one process."""

    def __init__(self, state, num_ranks):
        self.params = {name: p.clone().requires_grad_() for name, p in state.items()}
        self.velocities = {name: torch.zeros_like(p) for name, p in state.items()}

        def make():
            return SyncReference(C, eps=EPS, threshold=0.8, warmup=1, momentum=0.5)

        # Of a UBN each rank has its own.
        self.norms = {
            'first.1': [make()] * num_ranks,
            'second.1': [make()] * num_ranks,
            'side.1': [make() for _ in range(num_ranks)],
        }

    def __call__(self, batch):
        """Return the output of each rank; the running statistics move."""
        return self.forward(batch.xs, batch.uses_side, self.normalize, self.params)

    def evaluate(self, x, rank=0, params=None, statistics=None):
        """Return the output for ``x`` by running statistics, this network's if none are given."""

        def normalize(name, parts, params):
            mean, var = (
                getattr(self.norms[name][rank], key)
                if statistics is None
                else statistics[f'{name}.{key}']
                for key in ('running_mean', 'running_var')
            )
            return {0: ubn(parts[0], params, EPS, mean, var)[0]}

        (y,) = self.forward([x], (True,), normalize, params or self.params)
        return y.detach()

    def normalize(self, name, parts, params):
        norms = self.norms[name]
        if name == 'side.1':
            return {rank: norms[rank]([part], params)[0] for rank, part in parts.items()}
        return dict(zip(parts, norms[0](list(parts.values()), params), strict=True))

    @staticmethod
    def forward(xs, uses_side, normalize, params):
        def run(block, parts):
            weight = params[f'{block}.0.weight']
            parts = {rank: F.conv2d(part, weight, padding=1) for rank, part in parts.items()}
            prefix = f'{block}.1.'
            own = {key.removeprefix(prefix): p for key, p in params.items() if prefix in key}
            return normalize(f'{block}.1', parts, own)

        h = {rank: F.relu(part) for rank, part in run('first', dict(enumerate(xs))).items()}
        ys = run('second', h)
        side = run('side', {rank: part for rank, part in h.items() if uses_side[rank]})
        return [(y + side[rank] if rank in side else y).mean((2, 3)) for rank, y in ys.items()]

    def loss(self, batch, ys):
        total = sum((y - t).square().sum() for y, t in zip(ys, batch.targets, strict=True))
        return total / sum(len(x) for x in batch.xs)

    def gradients(self, loss):
        """Return the gradients of those parameters that took part."""
        grads = torch.autograd.grad(loss, self.params.values(), allow_unused=True)
        return {name: g for name, g in zip(self.params, grads, strict=True) if g is not None}

    @torch.no_grad()
    def descend(self, gradients):
        """Take a step of stochastic gradient descent with momentum."""
        for name, gradient in gradients.items():
            self.velocities[name] = MOMENTUM * self.velocities[name] + gradient
            self.params[name] -= LEARNING_RATE * self.velocities[name]

    def step(self, batches, broadcasts=False):
        """Take one step of the optimizer on some batches; return outputs and gradients."""
        outputs, loss = [], 0
        for batch in batches:
            if broadcasts:
                # Rank 0 hands its buffers to all before each forward.
                side = self.norms['side.1']
                side[:] = [copy.deepcopy(side[0]) for _ in side]
            outputs.append(self(batch))
            loss = loss + self.loss(batch, outputs[-1])
        gradients = self.gradients(loss)
        self.descend(gradients)
        return outputs, gradients

    def buffers(self, rank):
        return {
            f'{name}.{key}': torch.as_tensor(getattr(norms[rank], key)).clone()
            for name, norms in self.norms.items()
            for key in BUFFERS
        }

    def assert_gates_moved(self):
        """Make sure that there was something to compare."""
        norms = [norm for norms in self.norms.values() for norm in norms]
        assert all(norm.num_batches_tracked for norm in norms)
        assert any(norm.num_batches_condensed for norm in norms)


def make_state():
    state = {
        name: 0.4 / gain_of(name.rpartition('.')[2]) * torch.randn_like(p)
        for name, p in Net().named_parameters()
    }
    return {name: p.double() for name, p in state.items()}


def make_net(state, **options):
    net = Net(**options).double()
    net.load_state_dict(state, strict=False)
    return net


def make_batches(num, num_ranks=2):
    """Make batches of ragged sizes; some ranks have none, and some gates close."""
    sizes = [(2, 3), (1, 4), (3, 0), (2, 2)]
    sides = [(5, 4), (4, 6)]
    batches = []
    for i in range(num):
        share = (0, 0.95, 0.2, 0.95)[i % 4]
        xs = []
        for n, side in list(zip(sizes[i % 4], sides, strict=True))[:num_ranks]:
            x = (1 - share) * torch.randn(n, 3, *side) + share * 2 * torch.randn(3, *side)
            xs.append(x.double())
        targets = [torch.randn(len(x), C).double() for x in xs]
        batches.append(Batch(xs, targets, (True,) * num_ranks))
    return batches


def in_steps(batches, num):
    """Cut a list of batches into steps of the optimizer."""
    return [batches[i : i + num] for i in range(0, len(batches), num)]


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def train(model, rank, steps, at_once=False):
    """Train on steps of several batches, and return what there is to know of each.

    With ``at_once`` the batches of a step go forward one after another and backward together. The
    collectives are those of the last step: recording takes longer than all else.
    """
    net = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    found = []
    for batches in steps:
        collectives = Collectives()
        is_recorded = batches is steps[-1]
        optimizer.zero_grad()
        outputs, loss = [], 0
        with collectives if is_recorded else contextlib.nullcontext():
            for i, batch in enumerate(batches):
                keeps = i < len(batches) - 1 and not at_once and hasattr(model, 'no_sync')
                with model.no_sync() if keeps else contextlib.nullcontext():
                    # Reentrant checkpointing gives no gradient without one for its input.
                    x = batch.xs[rank].clone().requires_grad_()
                    y = model(x, batch.uses_side[rank])
                    loss = loss + batch.scale * (y - batch.targets[rank]).square().sum()
                    outputs.append(y.detach())
                    if not at_once:
                        loss.backward()
                        loss = 0
            if at_once:
                loss.backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        optimizer.step()
        found.append(
            {
                'outputs': outputs,
                'gradients': {name: full(g) for name, g in grads.items() if g is not None},
                'weights': {name: full(p) for name, p in net.named_parameters()},
                'buffers': {name: buffer.clone() for name, buffer in net.named_buffers()},
                'collectives': collectives.log,
            }
        )
    return found


def tolerance_of(name, t):
    if not t.dtype.is_floating_point:
        return EXACT
    return SCORE if str(name).endswith(SCORES) else CLOSE


def assert_same_values(found, expected, what, tolerance=None):
    """Compare two dicts of tensors, integers exactly."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            t.double(),
            **(tolerance or tolerance_of(name, t)),
            msg=lambda text, name=name: f'{what}, {name}: {text}',
        )


def assert_equals_one_process(ranks, state, steps, broadcasts=False, forwards=1):
    """Compare what the ranks have of each step with one process; return that."""
    reference = Reference(state, len(ranks))
    for i, batches in enumerate(steps):
        outputs, gradients = reference.step(batches, broadcasts)
        for rank, found in enumerate(rank[i] for rank in ranks):
            what = f'step {i}, rank {rank}'
            ys = dict(enumerate(found['outputs']))
            assert_same_values(ys, dict(enumerate(o[rank] for o in outputs)), what)
            assert_same_values(found['gradients'], gradients, what)
            assert_same_values(without_idle(found['weights']), reference.params, what)
            assert_same_values(without_idle(found['buffers']), reference.buffers(rank), what)
            if len(ranks) > 1 and batches is steps[-1]:
                # A branch that is not run adds nothing to these.
                num = NUM_SYNCHRONISED * len(batches)
                assert found['collectives'].count(FORWARD) == num * forwards
                assert found['collectives'].count(BACKWARD) == num
            for name, weight in found['weights'].items():
                assert torch.equal(weight, ranks[0][i]['weights'][name])
    reference.assert_gates_moved()
    return reference


def without_idle(tensors):
    """Leave out what is never called, after making sure of that."""
    idle = {name: t for name, t in tensors.items() if name.startswith('idle.')}
    for name, t in idle.items():
        assert (t == name.endswith(('.weight', '.running_var'))).all(), name
    return {name: t for name, t in tensors.items() if name not in idle}


# One process.


@pytest.mark.parametrize('at_once', [False, True])
def test_gradient_accumulation_in_one_process(at_once):
    state = make_state()
    steps = in_steps(make_batches(6, num_ranks=1), 3)
    found = train(make_net(state), 0, steps, at_once)
    assert_equals_one_process([found], state, steps)


# torch's DistributedDataParallel.


def train_in_ddp(rank, state, steps, kwargs, options, at_once):
    model = DistributedDataParallel(make_net(state, **options), **kwargs)
    found = train(model, rank, steps, at_once)
    if kwargs.get('gradient_as_bucket_view'):
        # Views they are, and not copies.
        assert all(p.grad._is_view() for p in model.parameters() if p.grad is not None)
    return found


def assert_ddp_equals_one_process(steps, kwargs=None, options=None, at_once=False):
    kwargs, options = kwargs or {}, options or {}
    state = make_state()
    ranks = distributed.run(2, train_in_ddp, state, steps, kwargs, options, at_once)
    broadcasts = kwargs.get('broadcast_buffers', True)
    # What is recomputed in the backward pass asks the other ranks again.
    forwards = 2 if options.get('use_reentrant') is False else 1
    return ranks, assert_equals_one_process(ranks, state, steps, broadcasts, forwards)


WITH_IDLE = dict(has_idle=True)
DDP = {
    'default': dict(),
    'broadcast_buffers=False': dict(kwargs=dict(broadcast_buffers=False)),
    'gradient_as_bucket_view': dict(kwargs=dict(gradient_as_bucket_view=True)),
    'static_graph': dict(kwargs=dict(static_graph=True), options=WITH_IDLE),
    'find_unused_parameters': dict(kwargs=dict(find_unused_parameters=True), options=WITH_IDLE),
    'non-reentrant, static_graph': dict(
        kwargs=dict(static_graph=True), options=dict(use_reentrant=False, has_idle=True)
    ),
    'reentrant, static_graph': dict(
        kwargs=dict(static_graph=True), options=dict(use_reentrant=True, has_idle=True)
    ),
    'non-reentrant, find_unused_parameters': dict(
        kwargs=dict(find_unused_parameters=True), options=dict(use_reentrant=False, has_idle=True)
    ),
}


@pytest.mark.parametrize('case', DDP.values(), ids=DDP.keys())
def test_distributed_data_parallel(case):
    assert_ddp_equals_one_process(in_steps(make_batches(5), 1), **case)


@pytest.mark.parametrize('broadcast_buffers', [False, True])
def test_branch_that_one_rank_leaves_out(broadcast_buffers):
    steps = in_steps(make_batches(5), 1)
    # First on both ranks, then on one, then on the other, then on none.
    for i, uses_side in {1: (False, True), 2: (True, False), 3: (False, False)}.items():
        steps[i][0] = steps[i][0]._replace(uses_side=uses_side)
    kwargs = dict(find_unused_parameters=True, broadcast_buffers=broadcast_buffers)
    ranks, _ = assert_ddp_equals_one_process(steps, kwargs, WITH_IDLE)
    has_gradient = ['side.1.center_weight' in step['gradients'] for step in ranks[0]]
    assert has_gradient == [True, True, True, False, True]


ACCUMULATION = {
    'default': dict(),
    'gradient_as_bucket_view': dict(kwargs=dict(gradient_as_bucket_view=True)),
    'reentrant': dict(options=dict(use_reentrant=True)),
    'non-reentrant': dict(options=dict(use_reentrant=False)),
}


@pytest.mark.parametrize('case', ACCUMULATION.values(), ids=ACCUMULATION.keys())
def test_no_sync(case):
    # Of the forwards of one step, DDP broadcasts buffers before the first one only.
    kwargs = dict(case.get('kwargs', {}), broadcast_buffers=False)
    steps = in_steps(make_batches(6), 3)
    ranks, _ = assert_ddp_equals_one_process(steps, kwargs, case.get('options'))
    # DDP itself has communicated once in a step: a bucket, which is larger than SyncUBN's.
    for *_, step in ranks:
        assert sum(name == 'all_reduce' and n > 2 * C for name, n in step['collectives']) == 1


@pytest.mark.parametrize('broadcast_buffers', [False, True])
def test_several_forwards_before_one_backward(broadcast_buffers):
    # The gates of the second are closed: the third moves what has normalized it.
    kwargs = dict(broadcast_buffers=broadcast_buffers)
    assert_ddp_equals_one_process(in_steps(make_batches(6), 3), kwargs, at_once=True)


def train_bn(rank, steps, use_reentrant):
    block = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)).double()
    model = DistributedDataParallel(Checkpointed(block, use_reentrant))
    for (batch,) in steps:
        model(batch.xs[rank].clone().requires_grad_()).sum().backward()
    return block[1].num_batches_tracked.item()


class Checkpointed(nn.Module):
    def __init__(self, block, use_reentrant):
        super().__init__()
        self.block = block
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_recomputed_forward_counts_once_and_twice_with_bn(use_reentrant):
    steps = in_steps(make_batches(5), 1)
    _, reference = assert_ddp_equals_one_process(steps, options=dict(use_reentrant=use_reentrant))
    norm = reference.norms['first.1'][0]
    assert norm.num_batches_tracked + norm.num_batches_condensed == 5
    # BN's known flaw: the running statistics move twice.
    assert distributed.run(2, train_bn, steps, use_reentrant) == [10, 10]


# torch's fully_shard.


def shard(net):
    mesh = init_device_mesh('cpu', (2,))
    for block in (net.first, net.second, net.side):
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train_sharded(rank, state, steps):
    model = shard(make_net(state))
    assert model.first[1].center_weight.to_local().numel() == (3, 2)[rank]
    found = train(model, rank, steps)

    options = StateDictOptions(full_state_dict=True)
    whole = get_model_state_dict(model, options=options)
    # Buffers in it are the model's own.
    whole = {name: t.clone() for name, t in whole.items()}
    plain = Net().double()
    plain.load_state_dict(whole)
    others = [shard(Net().double()) for _ in range(2)]
    # It puts shards into the dict.
    set_model_state_dict(others[0], dict(whole), options=options)
    others[1].load_state_dict(copy.deepcopy(model.state_dict()))
    for other in (plain, *others):
        states = [{name: full(t) for name, t in m.state_dict().items()} for m in (model, other)]
        assert_same_values(*states, 'state', EXACT)
    # They go on as one.
    y, *again = (train(m, rank, steps[:1])[0]['outputs'][0] for m in (model, *others))
    assert all(torch.equal(y, other) for other in again)
    return found, whole, plain.eval()(steps[0][0].xs[0])


def test_fully_shard():
    state = make_state()
    steps = in_steps(make_batches(5), 1)
    ranks = distributed.run(2, train_sharded, state, steps)
    reference = assert_equals_one_process([found for found, _, _ in ranks], state, steps)
    for rank, (_, whole, y) in enumerate(ranks):
        expected = reference.params | reference.buffers(rank)
        assert_same_values(whole, expected, f'state of rank {rank}')
        expected = reference.evaluate(steps[0][0].xs[0], rank)
        torch.testing.assert_close(y, expected, **CLOSE)


# mmengine's Runner, with its wrapper of the model and of the optimizer, and its hooks.


class Model(BaseModel):
    """The network as mmengine wants one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, target, scale, mode):
        assert mode == 'loss'
        return dict(loss=scale * (self.net(inputs) - target).square().sum())


ACCUMULATIVE_COUNTS = 3
MAX_NORM = 1.5
EMA_MOMENTUM = 0.3
NUM_EPOCHS = 2


@mock.patch.dict(os.environ)
def run_in_runner(rank, work_dir, state, batches, update_buffers):
    data = [
        dict(inputs=batch.xs[rank], target=batch.targets[rank], scale=batch.scale)
        for batch in batches
    ]
    # As a launcher sets it.
    os.environ['LOCAL_RANK'] = str(rank)
    runner = Runner(
        model=Model(make_net(state)),
        work_dir=work_dir,
        experiment_name=str(uuid.uuid4()),
        train_dataloader=DataLoader(data, collate_fn=operator.itemgetter(0)),
        train_cfg=dict(by_epoch=True, max_epochs=NUM_EPOCHS),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=LEARNING_RATE, momentum=MOMENTUM),
            accumulative_counts=ACCUMULATIVE_COUNTS,
            clip_grad=dict(max_norm=MAX_NORM),
        ),
        custom_hooks=[
            dict(type='SyncBuffersHook'),
            dict(type='EMAHook', momentum=EMA_MOMENTUM, update_buffers=update_buffers),
            dict(type='CondensationHook'),
        ],
        launcher='pytorch',
        # A CPU build of torch takes no device index.
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
            )
        ),
    )
    try:
        runner.train()
    finally:
        for logger in MMLogger._instance_dict.values():
            for handler in logger.handlers:
                handler.close()
        for kind in (MMLogger, Visualizer, DefaultScope, MessageHub):
            kind._instance_dict.clear()
    assert {SyncBuffersHook, EMAHook} < {type(hook) for hook in runner.hooks}
    (ema,) = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
    final = copy.deepcopy(runner.model.module.net.state_dict())
    averaged = copy.deepcopy(ema.module.net.state_dict())
    with torch.no_grad():
        y = ema.module.net.eval()(batches[0].xs[0])
    return final, averaged, ema.steps.item(), y


def clip(gradients):
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    factor = min(1, MAX_NORM / (norm + 1e-6))
    return {name: factor * g for name, g in gradients.items()}, factor < 1


def average_over_ranks(norms):
    """Do what SyncBuffersHook does: integers lose what is behind the point."""
    for name in BUFFERS:
        values = [getattr(norm, name) for norm in norms]
        mean = sum(values) / len(values)
        for norm in norms:
            setattr(norm, name, int(mean) if name in COUNTERS else copy.copy(mean))


@pytest.mark.parametrize('update_buffers', [True, False])
def test_runner(tmp_path, update_buffers):
    state = make_state()
    batches = make_batches(4)
    ranks = distributed.run(2, run_in_runner, str(tmp_path), state, batches, update_buffers)

    reference = Reference(state, 2)
    num_iters = NUM_EPOCHS * len(batches)
    num_left = num_iters % ACCUMULATIVE_COUNTS
    assert num_left
    accumulated, averages, clipped, uneven = {}, [None, None], [], []
    for i in range(num_iters):
        batch = batches[i % len(batches)]
        gradients = reference.gradients(reference.loss(batch, reference(batch)))
        # The last step is on fewer batches.
        count = ACCUMULATIVE_COUNTS if i < num_iters - num_left else num_left
        for name, gradient in gradients.items():
            accumulated[name] = accumulated.get(name, 0) + gradient / count
        if (i + 1) % ACCUMULATIVE_COUNTS == 0 or i + 1 == num_iters:
            accumulated, is_clipped = clip(accumulated)
            clipped.append(is_clipped)
            reference.descend(accumulated)
            accumulated = {}
        for rank in range(2):
            now = {name: p.detach().clone() for name, p in reference.params.items()}
            averages[rank] = average(averages[rank], now, reference.buffers(rank), update_buffers)
        if (i + 1) % len(batches) == 0:
            counts = [norm.num_batches_tracked for norm in reference.norms['side.1']]
            uneven.append(counts[0] != counts[1])
            average_over_ranks(reference.norms['side.1'])
    assert any(clipped)
    assert any(uneven)
    reference.assert_gates_moved()

    for rank, (final, averaged, num_averaged, y) in enumerate(ranks):
        assert num_averaged == num_iters
        expected = reference.params | reference.buffers(rank)
        assert_same_values(final, expected, f'rank {rank}')
        for name, t in final.items():
            assert torch.equal(t, ranks[0][0][name]), name
        assert_same_values(averaged, averages[rank], f'average of rank {rank}')
        assert torch.isfinite(y).all()
        expected = reference.evaluate(batches[0].xs[0], rank, averages[rank], averages[rank])
        torch.testing.assert_close(y, expected, **CLOSE)


def average(old, params, buffers, update_buffers):
    """Return the moving average after one more iteration, ``old`` None before the first."""
    if old is None:
        return params | buffers
    new = {}
    for name, t in (params | buffers).items():
        if name in buffers and not update_buffers:
            new[name] = t
        elif t.dtype.is_floating_point:
            new[name] = (1 - EMA_MOMENTUM) * old[name] + EMA_MOMENTUM * t
        else:
            # Copied once, in the first iteration.
            new[name] = old[name]
    return new

"""SyncGroupHook on real processes: blocks of ranks against one process a block."""

import logging
from types import SimpleNamespace

import distributed
import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import SyncBuffersHook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from reference import random_params
from sync_reference import SyncReference
from torch import nn

from ubn_det import UBN, SyncUBN
from ubn_det.engine import SyncGroupHook

C = 4
WORLD_SIZE = 4
GROUP_SIZE = 2
# Both sides compute in float64 and differ in the order of their sums only.
EXACT = dict(rtol=1e-10, atol=1e-10)


class Logger(logging.Logger):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__('test')
        self.messages = []

    def handle(self, record):
        self.messages.append((record.levelno, record.getMessage()))


def make_runner(model):
    return SimpleNamespace(model=model, logger=Logger())


def make_model(params):
    # Scores of noise are never over the threshold; a gate that closes has tests of its own.
    model = nn.Sequential(SyncUBN(C, condensation_threshold=None).double())
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            parameter.copy_(params[name])
    return model


def make_batches():
    """Make a batch a rank, of different sizes, each with statistics of its own."""
    return [
        (rank + 1) * torch.randn(2 + rank % 2, C, 3, 4 + rank, dtype=torch.float64) + rank
        for rank in range(WORLD_SIZE)
    ]


def train(rank, params, steps, wrap):
    model = make_model(params)
    if wrap:
        model = MMDistributedDataParallel(model, broadcast_buffers=False)
    runner = make_runner(model)
    hook = SyncGroupHook(GROUP_SIZE)
    hook.before_train(runner)
    layer = (model.module if wrap else model)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for xs, dys in steps:
        optimizer.zero_grad()
        y = model(xs[rank])
        (y * dys[rank]).sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    group = layer.process_group
    # A second start of the same runner finds its own group.
    hook.before_train(runner)
    assert layer.process_group is group
    return dict(
        outputs=outputs,
        parameters=[p.detach().clone() for p in layer.parameters()],
        running=(layer.running_mean.clone(), layer.running_var.clone()),
        ranks=dist.get_process_group_ranks(group),
        messages=runner.logger.messages,
    )


def blocks():
    return [list(range(i, i + GROUP_SIZE)) for i in range(0, WORLD_SIZE, GROUP_SIZE)]


def make_steps(number):
    return [
        (xs, [torch.randn_like(x) for x in xs]) for xs in (make_batches() for _ in range(number))
    ]


def test_statistics_are_those_of_a_block():
    params = random_params(C, 2, 3)
    ((xs, dys),) = steps = make_steps(1)
    ranks = distributed.run(WORLD_SIZE, train, params, steps, False)
    running = []
    for block in blocks():
        norm = SyncReference(C, threshold=None)
        outputs = norm([xs[rank] for rank in block], params)
        for rank, output in zip(block, outputs, strict=True):
            assert ranks[rank]['ranks'] == block
            torch.testing.assert_close(ranks[rank]['outputs'][0], output, **EXACT)
            for found, expected in zip(
                ranks[rank]['running'], (norm.running_mean, norm.running_var), strict=True
            ):
                torch.testing.assert_close(found, expected, **EXACT)
        running.append(norm.running_mean)
    assert not torch.allclose(*running, atol=1e-2), 'the blocks cannot be told apart'


def test_one_line_is_logged():
    ranks = distributed.run(WORLD_SIZE, train, random_params(C, 2, 3), [], False)
    # Twice, as training starts twice.
    line = 'SyncUBN: 1 layers share their statistics within blocks of 2 of 4 ranks'
    assert ranks[0]['messages'] == [(logging.INFO, line)] * 2


def test_parameters_stay_equal_under_ddp():
    params = random_params(C, 2, 3)
    steps = make_steps(3)
    ranks = distributed.run(WORLD_SIZE, train, params, steps, True)
    parameters = list(params.values())
    assert len(parameters) == len(ranks[0]['parameters'])
    for rank in ranks[1:]:
        for found, first in zip(rank['parameters'], ranks[0]['parameters'], strict=True):
            assert torch.equal(found, first)
    # The names' order is the layer's: weight, bias and the extras.
    for found, old in zip(ranks[0]['parameters'], parameters, strict=True):
        assert not torch.allclose(found, old)

    # What all ranks share after three steps of one process a block, gradients averaged.
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.1)
    norms = [SyncReference(C, threshold=None) for _ in blocks()]
    for xs, dys in steps:
        optimizer.zero_grad()
        for norm, block in zip(norms, blocks(), strict=True):
            outputs = norm([xs[rank] for rank in block], leaves)
            sum((y * dys[r]).sum() / WORLD_SIZE for y, r in zip(outputs, block)).backward()
        optimizer.step()
    for found, (name, expected) in zip(ranks[0]['parameters'], leaves.items(), strict=True):
        torch.testing.assert_close(found, expected.detach(), msg=name, **EXACT)
    means = [rank['running'][0] for rank in ranks]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[2], means[3])
    assert not torch.allclose(means[0], means[2], atol=1e-2)


def train_and_average(rank, params, xs):
    model = make_model(params)
    SyncGroupHook(GROUP_SIZE).before_train(make_runner(model))
    model(xs[rank])
    before = model[0].running_var.clone()
    SyncBuffersHook().after_train_epoch(SimpleNamespace(model=model))
    return before, model[0].running_var, model[0].num_batches_tracked.item()


def test_sync_buffers_hook_averages_the_blocks():
    ranks = distributed.run(WORLD_SIZE, train_and_average, random_params(C, 2, 3), make_batches())
    assert not torch.allclose(ranks[0][0], ranks[2][0], atol=1e-2)
    average = (ranks[0][0] + ranks[2][0]) / 2
    for _, found, tracked in ranks:
        torch.testing.assert_close(found, average, **EXACT)
        assert tracked == 1


def start(rank, group_size, case):
    """Return the error that starting a training raises, as (its class, its text)."""
    model = nn.Sequential(UBN(C) if case == 'no layer' else SyncUBN(C))
    if case == 'other group':
        model[0].process_group, _ = dist.new_subgroups(2)
    before = dist.distributed_c10d._world.group_count
    error = None
    try:
        SyncGroupHook(group_size).before_train(make_runner(model))
    except (RuntimeError, ValueError) as raised:
        error = type(raised).__name__, str(raised)
    # Groups hold sockets and threads: none is made for a run that cannot start.
    assert error is None or dist.distributed_c10d._world.group_count == before
    return error


@pytest.mark.parametrize(
    'group_size, case, kind, parts',
    [
        (3, 'plain', 'ValueError', ('group_size=3', '4')),
        (8, 'plain', 'ValueError', ('group_size=8', '4')),
        (2, 'no layer', 'RuntimeError', ('no SyncUBN',)),
        (2, 'other group', 'RuntimeError', ('0 has a process_group already',)),
    ],
)
def test_errors_at_the_start(group_size, case, kind, parts):
    for error in distributed.run(WORLD_SIZE, start, group_size, case):
        assert error is not None
        assert error[0] == kind
        assert all(part in error[1] for part in parts)


@pytest.mark.parametrize('group_size', [1, 4])
def test_block_of_one_rank_and_of_all(group_size):
    assert distributed.run(WORLD_SIZE, start, group_size, 'plain') == [None] * WORLD_SIZE


@pytest.mark.parametrize('group_size', [2.0, '8', None, True])
def test_group_size_of_wrong_type(group_size):
    with pytest.raises(TypeError, match='group_size'):
        SyncGroupHook(group_size)


@pytest.mark.parametrize('group_size', [0, -8])
def test_group_size_out_of_range(group_size):
    with pytest.raises(ValueError, match=f'group_size.*{group_size}'):
        SyncGroupHook(group_size)


def start_alone():
    layer = SyncUBN(C)
    runner = make_runner(nn.Sequential(layer))
    SyncGroupHook(8).before_train(runner)
    return layer.process_group, runner.logger.messages


def test_nothing_to_do_without_a_group():
    assert not dist.is_initialized()
    assert start_alone() == (None, [])


@pytest.mark.usefixtures('process_group')
def test_nothing_to_do_with_one_rank():
    assert start_alone() == (None, [])


def test_is_registered():
    assert isinstance(HOOKS.build(dict(type='SyncGroupHook', group_size=8)), SyncGroupHook)

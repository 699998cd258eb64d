"""Tests of NonFiniteStepHook in real runs on CPU."""

import json
import math
import uuid

import pytest
import torch
from distributed import run
from inject_faults import CPUAmpOptimWrapper
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ubn_det.engine import NonFiniteStepHook


class Model(BaseModel):
    """A loss whose gradients are the batch: weight * mean, and nothing for ``unused``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.empty = nn.Parameter(torch.ones(0))

    def forward(self, inputs, mode='loss'):
        return dict(loss=(self.weight * inputs).sum() + self.empty.sum())


class Recorder(Hook):
    """Keeps weight and momentum after each iteration."""

    def __init__(self):
        self.states = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            wrapper = wrapper['first']
        weight = runner.model.weight
        momentum = wrapper.optimizer.state.get(weight, {}).get('momentum_buffer')
        self.states.append(
            (weight.detach().clone(), None if momentum is None else momentum.clone())
        )


def make_runner(work_dir, batches, hook=None, model=None, wrapper=None, **kwargs):
    model = model or Model()
    if wrapper is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        wrapper = OptimWrapper(optimizer, **kwargs.pop('wrapper_kwargs', {}))
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=DataLoader(
            [dict(inputs=torch.as_tensor(batch)) for batch in batches],
            batch_size=1,
            collate_fn=lambda items: items[0],
        ),
        train_cfg=dict(by_epoch=False, max_iters=kwargs.pop('max_iters', len(batches))),
        optim_wrapper=wrapper,
        custom_hooks=[hook or NonFiniteStepHook(), Recorder()],
        default_hooks=dict(
            checkpoint=kwargs.pop('checkpoint', None),
            logger=dict(type='LoggerHook', interval=1),
        ),
        experiment_name=str(uuid.uuid4()),
        **kwargs,
    )
    (runner.recorder,) = (h for h in runner.hooks if isinstance(h, Recorder))
    return runner


def expected_states(batches, is_skipped):
    """SGD with momentum and weight decay by hand, that leaves out the skipped batches."""
    weight, momentum, states = torch.ones(3), None, []
    for batch, skipped in zip(batches, is_skipped, strict=True):
        if not skipped:
            gradient = torch.as_tensor(batch) + 0.1 * weight
            momentum = gradient if momentum is None else 0.9 * momentum + gradient
            weight = weight - 0.1 * momentum
        states.append((weight, momentum))
    return states


def assert_states(found, expected):
    for (weight, momentum), (expected_weight, expected_momentum) in zip(
        found, expected, strict=True
    ):
        torch.testing.assert_close(weight, expected_weight)
        assert (momentum is None) == (expected_momentum is None)
        if momentum is not None:
            torch.testing.assert_close(momentum, expected_momentum)


def scalars(work_dir):
    rows = [
        json.loads(line)
        for log in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in log.read_text().splitlines()
    ]
    return {row['step']: row['skipped_steps'] for row in rows if 'skipped_steps' in row}


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_bad_step_changes_nothing(tmp_path, bad):
    # The very first step, when there is no momentum yet, and some in the middle.
    batches = [[bad, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 1.0, bad], [bad] * 3, [1.0, 0.0, -1.0]]
    is_skipped = [True, False, True, True, False]
    runner = make_runner(tmp_path, batches)
    runner.train()
    assert_states(runner.recorder.states, expected_states(batches, is_skipped))
    assert scalars(tmp_path) == {1: 1, 3: 2, 4: 3}
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert (
        'Iteration 4: gradients are not finite, the optimizer step is skipped (3 so far, 2 '
        in (log)
    )
    assert torch.equal(runner.model.unused, torch.ones(2))


def test_large_gradients_are_no_reason(tmp_path):
    """The squares of these overflow, they do not."""
    batches = [[3e38, 1.0, 1.0], [1e30, -3e38, 0.0]]
    optimizer = torch.optim.SGD((model := Model()).parameters(), lr=1e-38)
    make_runner(tmp_path, batches, model=model, wrapper=OptimWrapper(optimizer)).train()
    assert scalars(tmp_path) == {}
    assert model.weight[0] < -1.9


def test_clipping_spreads_nan_over_all_gradients_and_changes_nothing(tmp_path):
    batches = [[1.0, 2.0, 3.0], [math.nan, 0.0, 0.0], [0.0, 1.0, 0.0]]
    runner = make_runner(tmp_path, batches, wrapper_kwargs=dict(clip_grad=dict(max_norm=1000.0)))
    runner.train()
    assert_states(runner.recorder.states, expected_states(batches, [False, True, False]))


def test_accumulated_steps_are_skipped_as_one(tmp_path):
    batches = [[2.0] * 3, [2.0] * 3, [math.nan] * 3, [2.0] * 3, [2.0] * 3, [4.0] * 3]
    runner = make_runner(tmp_path, batches, wrapper_kwargs=dict(accumulative_counts=2))
    runner.train()
    found = runner.recorder.states[1::2]
    assert_states(found, expected_states([[2.0] * 3, [0.0], [3.0] * 3], [False, True, False]))
    assert scalars(tmp_path) == {4: 1}


@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_steps_that_the_gradient_scaler_skips_are_counted(tmp_path, accumulative_counts):
    batches = [[1.0] * 3] * accumulative_counts
    batches = batches + [[1e9] * 3] * accumulative_counts + batches
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    wrapper = CPUAmpOptimWrapper(
        optimizer=optimizer, accumulative_counts=accumulative_counts, init_scale=2.0**100
    )
    runner = make_runner(tmp_path, batches, model=model, wrapper=wrapper)
    runner.train()
    assert scalars(tmp_path) == {2 * accumulative_counts: 1}
    found = runner.recorder.states[accumulative_counts - 1 :: accumulative_counts]
    assert_states(found, expected_states([[1.0] * 3] * 3, [False, True, False]))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'the gradient scale falls to {2.0**99:g}' in log


class TwoSteps(Model):
    """Steps two optimizers by itself, as models with several losses do."""

    def train_step(self, data, optim_wrapper):
        losses = self(**data)
        optim_wrapper['first'].update_params(losses['loss'])
        optim_wrapper['second'].update_params((self.unused * torch.ones(2)).sum())
        return losses


def test_several_optimizers_are_each_looked_at(tmp_path):
    model = TwoSteps()
    wrapper = OptimWrapperDict(
        first=OptimWrapper(
            torch.optim.SGD([model.weight], lr=0.1, momentum=0.9, weight_decay=0.1)
        ),
        second=OptimWrapper(torch.optim.SGD([model.unused], lr=0.1)),
    )
    batches = [[1.0] * 3, [math.nan] * 3, [2.0] * 3]
    runner = make_runner(tmp_path, batches, model=model, wrapper=wrapper)
    runner.train()
    assert_states(runner.recorder.states, expected_states(batches, [False, True, False]))
    torch.testing.assert_close(model.unused.detach(), torch.full((2,), 0.7))
    assert scalars(tmp_path) == {2: 1}


class SecondIsBad(TwoSteps):
    """The second optimizer's gradients are never finite, the first one's always."""

    def train_step(self, data, optim_wrapper):
        losses = self(**data)
        optim_wrapper['first'].update_params(losses['loss'])
        optim_wrapper['second'].update_params((self.unused * math.nan).sum())
        return losses


def test_optimizer_that_does_not_recover_ends_the_run_beside_one_that_does(tmp_path):
    model = SecondIsBad()
    wrapper = OptimWrapperDict(
        first=OptimWrapper(torch.optim.SGD([model.weight], lr=0.1)),
        second=OptimWrapper(torch.optim.SGD([model.unused], lr=0.1)),
    )
    hook = NonFiniteStepHook(patience=3)
    runner = make_runner(tmp_path, [[1.0] * 3] * 20, hook=hook, model=model, wrapper=wrapper)
    with pytest.raises(RuntimeError, match="4 optimizer steps of 'second' in a row were skipped"):
        runner.train()
    assert scalars(tmp_path) == {step: step for step in range(1, 5)}


def test_run_that_does_not_recover_ends(tmp_path):
    bad = [math.nan] * 3
    batches = [bad, bad, [1.0] * 3, bad, bad, bad, bad]
    runner = make_runner(tmp_path, batches, hook=NonFiniteStepHook(patience=2))
    with pytest.raises(RuntimeError, match='3 optimizer steps in a row were skipped'):
        runner.train()
    # Two in a row before the good one were no reason to.
    assert scalars(tmp_path) == {1: 1, 2: 2, 4: 3, 5: 4, 6: 5}


def test_count_goes_on_in_a_resumed_run(tmp_path):
    bad = [math.nan] * 3
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    make_runner(tmp_path, [[1.0] * 3, bad], checkpoint=checkpoint).train()
    runner = make_runner(
        tmp_path, [[1.0] * 3, bad], max_iters=4, checkpoint=checkpoint, resume=True
    )
    runner.train()
    assert scalars(tmp_path) == {2: 1, 4: 2}


def test_hook_leaves_the_optimizer_as_it_was(tmp_path):
    runner = make_runner(tmp_path, [[1.0] * 3])
    runner.train()
    model, optimizer = runner.model, runner.optim_wrapper.optimizer
    model.weight.grad = torch.full((3,), math.nan)
    optimizer.step()
    assert torch.isnan(model.weight).all()


def step_on_rank(rank, gradients, work_dir):
    """Step once with gradients of the rank's own, as a sharded model has them."""
    model = Model()
    runner = make_runner(f'{work_dir}/{rank}', [gradients[rank]], model=model)
    runner.train()
    return model.weight.detach(), runner.message_hub.runtime_info.get('num_skipped_steps', 0)


def test_ranks_decide_together(tmp_path):
    """The second rank has nothing but finite gradients."""
    gradients = [[math.nan, 1.0, 1.0], [1.0, 1.0, 1.0]]
    for weight, num_skipped in run(2, step_on_rank, gradients, str(tmp_path)):
        assert torch.equal(weight, torch.ones(3))
        assert num_skipped == 1


@pytest.mark.parametrize(
    ('patience', 'error'), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_patience_is_refused(patience, error):
    with pytest.raises(error, match='patience'):
        NonFiniteStepHook(patience=patience)

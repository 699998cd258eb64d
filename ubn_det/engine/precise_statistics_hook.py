"""Recompute the running statistics of norm layers before they are used for evaluation."""

import bisect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, broadcast, get_rank
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det.layers import UBN
from ubn_det.reliability import ListedHook

from .condensation_hook import unwrap
from .population_statistics import PopulationStatistics

_END = object()


@HOOKS.register_module()
class PreciseStatisticsHook(ListedHook):
    """Set the running statistics of BN, SyncBN, UBN and SyncUBN to those of many training batches.

    The running average is one over batches that earlier weights have seen. Before an evaluation
    and before a checkpoint is saved, this hook runs the training forward of the model as it is
    then on ``num_batches`` batches, without gradient, and sets the running statistics of each
    layer to the mean and the variance of all that it was called with, on all ranks together; see
    ``PopulationStatistics``. Training goes on with them.

    In these forwards layers normalize by the batch, as in training; the gate of UBN does not look
    at the condensation score, for at inference the statistics serve condensed images as well.
    Layers in evaluation mode (``norm_eval``, frozen stages), with ``momentum=0`` or without
    running statistics stay as they are; so does a layer that no batch reaches, with a warning.
    Counters, scores, all other buffers and attributes of the modules and the random state are
    those from before. The batches come from a data loader of their own, on the data set and with
    the samplers of the training one, so that the order of the training data stays as it is. They
    are others each time and the same in a resumed run.

    With EMAHook the statistics are those of the averaged weights, which are what is evaluated and
    saved for it; the model in training keeps its running averages.

    Every rank takes as many batches as the one that has the fewest.

    Args:
        num_batches (int): Batches on each rank; fewer where the loader ends before.
        interval (int, optional): Iterations (epochs, with EpochBasedTrainLoop) from one time to
            the next. None: whenever an evaluation follows or CheckpointHook saves. At the end of
            training in any case.

    Raises:
        TypeError: ``num_batches`` or ``interval`` is no integer.
        ValueError: ``num_batches`` or ``interval`` is not positive; or at the start of training,
            the loop is none of mmengine's and ``interval`` is None, the training data loader was
            not given as a config, or an EMAHook evaluates the model in training as well.
    """

    # After EMAHook has averaged, before CheckpointHook saves.
    priority = 'LOW'

    def __init__(self, num_batches: int = 200, interval: int | None = None) -> None:
        for name, value in dict(num_batches=num_batches, interval=interval).items():
            if name == 'interval' and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f'{name} must be an integer, got {value!r}')
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        self.num_batches = num_batches
        self.interval = interval
        # Iterations after which the statistics were set last.
        self._set_at = -1
        # Layers that evaluate with the averaged weights but not with the averaged buffers.
        self._exchanged: list[tuple[_BatchNorm, _BatchNorm]] = []

    def before_run(self, runner: Runner) -> None:
        """Forget the run before; EMAHook does so as well."""
        super().before_run(runner)
        self._set_at = -1
        self._exchanged = []

    def before_train(self, runner: Runner) -> None:
        """Check that this hook knows the loop and can build a data loader."""
        loop = runner.train_loop
        if self.interval is None and not isinstance(
            loop, (EpochBasedTrainLoop, IterBasedTrainLoop)
        ):
            raise ValueError(
                f'PreciseStatisticsHook does not know when {type(loop).__name__} evaluates: set '
                'its interval'
            )
        if not isinstance(runner._train_dataloader, dict):
            raise ValueError(
                'PreciseStatisticsHook builds a data loader like the training one, and needs '
                'train_dataloader as a config, got a '
                f'{type(runner._train_dataloader).__name__}: give the Runner a dict'
            )
        # As mmpretrain's EMAHook has it.
        if any(getattr(hook, 'evaluate_on_origin', False) for hook in runner.hooks):
            raise ValueError(
                'PreciseStatisticsHook sets the statistics of the averaged weights only: leave '
                'out evaluate_on_origin of EMAHook, or this hook'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Set the statistics where an evaluation or a checkpoint by iteration is due."""
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if self.interval is not None:
            is_due = not by_epoch and self.every_n_train_iters(runner, self.interval)
        else:
            is_due = any(
                self.every_n_train_iters(runner, hook.interval, hook.save_begin)
                for hook in _checkpoint_hooks(runner, by_epoch=False)
            )
            is_due |= not by_epoch and _evaluates_after(runner, runner.iter + 1)
        if is_due or self.is_last_train_iter(runner):
            self._set_statistics(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Set the statistics where an evaluation or a checkpoint by epoch is due."""
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if self.interval is not None:
            is_due = by_epoch and self.every_n_epochs(runner, self.interval)
        else:
            is_due = any(
                self.every_n_epochs(runner, hook.interval, hook.save_begin)
                for hook in _checkpoint_hooks(runner, by_epoch=True)
            )
            is_due |= by_epoch and _evaluates_after(runner, runner.epoch + 1)
        if is_due:
            self._set_statistics(runner, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """Evaluate averaged weights with their own statistics."""
        self._exchange()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Give the model in training its statistics back."""
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for pair in self._exchanged:
            for name in ('running_mean', 'running_var'):
                one, other = (getattr(layer, name) for layer in pair)
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    def _set_statistics(self, runner: Runner, num_iters: int) -> None:
        if num_iters == self._set_at:
            return
        self._set_at = num_iters
        source = unwrap(runner.model)
        layers = {
            name: module
            for name, module in source.named_modules()
            if isinstance(module, _BatchNorm)
            and module.training
            and module.running_mean is not None
            and module.momentum != 0
        }
        if not layers:
            runner.logger.warning(
                'PreciseStatisticsHook has nothing to do: no norm layer of the model trains its '
                'running statistics. Look for norm_eval=True'
            )
            return
        model = runner.model
        ema = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if ema is not None:
            model = ema.ema_model.module
            averaged = {name: model.get_submodule(name) for name in layers}
            if not ema.ema_model.update_buffers:
                # EMAHook evaluates the averaged weights with the buffers of the other model.
                self._exchanged = [(averaged[name], layers[name]) for name in layers]
            layers = averaged

        seed = torch.tensor(runner.seed + num_iters)
        # Samplers need the same on all ranks, whatever diff_rank_seed says.
        broadcast(seed)
        statistics = PopulationStatistics(layers)
        with _preserved(unwrap(model)), _seeded(seed.item() + get_rank()):
            for module, counterpart in zip(unwrap(model).modules(), source.modules(), strict=True):
                module.training = counterpart.training
                if isinstance(module, UBN):
                    module.condensation_threshold = None
            with statistics, torch.no_grad():
                num_batches = 0
                for batch in self._batches(runner, seed.item()):
                    _forward(runner, model, batch)
                    num_batches += 1
        not_reached = statistics.write()
        if num_batches == 0:
            runner.logger.warning(
                'PreciseStatisticsHook left all running statistics as they are: the data loader '
                'of a rank has no batch'
            )
        elif not_reached:
            runner.logger.warning(
                f'PreciseStatisticsHook left the running statistics of {len(not_reached)} layers '
                f'as they are, which none of {num_batches} batches reached: '
                f'{", ".join(not_reached)}'
            )
        runner.logger.info(
            f'Precise statistics: {len(layers) - len(not_reached)} layers, {num_batches} batches '
            'a rank'
        )

    def _batches(self, runner: Runner, seed: int) -> Iterator[Any]:
        """Yield training batches, equally many on all ranks."""
        dataset = runner.train_dataloader.dataset
        cfg = dict(runner._train_dataloader)
        # It is in the data set already.
        cfg.pop('num_batch_per_epoch', None)
        # A function, since the config is copied with all that is in it.
        cfg.update(dataset=dict(type=lambda: dataset))
        if cfg.get('persistent_workers'):
            cfg['persistent_workers'] = False
        iterator = iter(runner.build_dataloader(cfg, seed=seed))
        for _ in range(self.num_batches):
            batch = next(iterator, _END)
            has_batch = torch.tensor(float(batch is not _END))
            # Collectives of layers and losses wait for all ranks.
            all_reduce(has_batch, 'min')
            if not has_batch:
                return
            yield batch


def _checkpoint_hooks(runner: Runner, by_epoch: bool) -> Iterator[CheckpointHook]:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.by_epoch == by_epoch:
            yield hook


def _evaluates_after(runner: Runner, count: int) -> bool:
    """Whether the loop evaluates after ``count`` iterations or epochs, whichever it counts."""
    loop = runner.train_loop
    if runner.val_loop is None or count < loop.val_begin:
        return False
    # As the loop looks it up, after it has counted on.
    interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, count + 1) - 1]
    last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
    return count % interval == 0 or count == last


def _forward(runner: Runner, model: nn.Module, batch: Any) -> None:
    """Run the model as its ``train_step`` does, without the step."""
    with runner.optim_wrapper.optim_context(model):
        data = unwrap(model).data_preprocessor(batch, True)
        if isinstance(data, dict):
            model(**data, mode='loss')
        else:
            model(*data, mode='loss')


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Give all modules back their attributes, buffers, lists and dicts as they were.

    A forward may change more than running statistics: YOLOX draws the size of its next images in
    it, losses count. Parameters are left to the lack of gradients.
    """
    kept = [
        (container, container.copy())
        for module in model.modules()
        for container in (vars(module), *vars(module).values())
        if type(container) in (dict, list, set)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for container, content in kept:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed`` on, and from where they were again afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Skip optimizer steps that would destroy the weights."""

import functools
import math
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.distributed.tensor import DTensor

from .listed_hook import ListedHook

_INFO = 'num_skipped_steps'


@HOOKS.register_module()
class NonFiniteStepHook(ListedHook):
    """Skip optimizer steps whose gradients are not finite; count and log them.

    One NaN or infinity in a sample reaches every weight through the gradients, those of all ranks
    through their average. UBN keeps it out of the running statistics; this hook keeps it out of
    the weights and of the optimizer's state. In mixed precision the gradient scaler skips such
    steps by itself, which is counted and logged as well.

    Where there are several optimizers, each counts its own steps in a row: one that never recovers
    ends the run, however well the others do.

    The ranks decide together: one number is reduced per step, and the host waits for it.

    The count is in ``scalars.json`` and TensorBoard as ``skipped_steps``, from the first one on,
    and goes on in a resumed run.

    Args:
        patience (int): Steps in a row that may be skipped of one optimizer, >= 1.

    Raises:
        TypeError: ``patience`` is no integer.
        ValueError: ``patience`` is not positive.
        RuntimeError: In training: more than ``patience`` steps of an optimizer in a row were
            skipped.
    """

    def __init__(self, patience: int = 50) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f'patience must be an integer, got {patience!r}')
        if patience < 1:
            raise ValueError(f'patience must be at least 1, got {patience}')
        self.patience = patience
        self._has_stepped = False
        # Steps in a row that were skipped, by the name of the optimizer; a single one has none.
        self._consecutive: dict[str, int] = {}
        self._runner: Runner | None = None
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        """Look at the gradients before every step of every optimizer."""
        self._runner = runner
        wrappers = runner.optim_wrapper
        wrappers = (
            dict(wrappers.items()) if isinstance(wrappers, OptimWrapperDict) else {'': wrappers}
        )
        self._consecutive = dict.fromkeys(wrappers, 0)
        self._handles = [
            wrapper.optimizer.register_step_pre_hook(functools.partial(self._before_step, name))
            for name, wrapper in wrappers.items()
        ]

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._runner = None

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Count a step that the gradient scaler left out."""
        wrapper = runner.optim_wrapper
        # A model that has several steps them when it wants.
        scaler = getattr(wrapper, 'loss_scaler', None)
        if scaler is not None and wrapper.should_update() and not self._has_stepped:
            self._skip('', f'the gradient scale falls to {scaler.get_scale():g}')
        self._has_stepped = False

    def _before_step(self, name: str, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._has_stepped = True
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        is_finite = torch.ones((), device=parameters[0].device)
        if gradients:
            # The largest value does not overflow where the sum of squares would.
            norms = torch._foreach_norm(gradients, math.inf)
            norms = torch.stack([norm.to(is_finite) for norm in norms])
            is_finite = torch.isfinite(norms).all().to(is_finite)
        # Shards differ from rank to rank.
        all_reduce(is_finite, 'min')
        if is_finite.item():
            self._consecutive[name] = 0
            return
        for parameter in parameters:
            # An optimizer leaves alone what has no gradient: weights, momentum and weight decay.
            parameter.grad = None
        self._skip(name, 'gradients are not finite')

    def _skip(self, name: str, reason: str) -> None:
        runner = self._runner
        self._consecutive[name] += 1
        consecutive = self._consecutive[name]
        count = runner.message_hub.runtime_info.get(_INFO, 0) + 1
        runner.message_hub.update_info(_INFO, count)
        if is_main_process():
            runner.visualizer.add_scalar('skipped_steps', count, step=runner.iter + 1)
        whose = f' of {name!r}' if name else ''
        runner.logger.warning(
            f'Iteration {runner.iter + 1}: {reason}, the optimizer step{whose} is skipped '
            f'({count} so far, {consecutive} in a row)'
        )
        if consecutive > self.patience:
            raise RuntimeError(
                f'{consecutive} optimizer steps{whose} in a row were skipped since the gradients '
                'are not finite: training does not recover. Look for NaN in the data and in the '
                'weights, lower the learning rate, or resume from an earlier checkpoint'
            )

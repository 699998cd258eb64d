"""Share SyncUBN's statistics within blocks of ranks instead of over all of them."""

import torch.distributed as dist
from mmengine.dist import get_world_size
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ubn_det.layers import SyncUBN
from ubn_det.reliability import ListedHook

from .condensation_hook import unwrap


@HOOKS.register_module()
class SyncGroupHook(ListedHook):
    """Let SyncUBN share its statistics within blocks of ``group_size`` consecutive ranks.

    Launchers number the ranks node by node, so that a block of as many ranks as a node has GPUs is
    that node, and no statistics cross the network. At the start of training the ranks are split
    with ``torch.distributed.new_subgroups`` and ``process_group`` of every SyncUBN of the model is
    set. Gradients are averaged over all ranks as before, and parameters stay equal on them.

    What differs from statistics over all ranks:

    - A batch that normalizes has ``group_size`` times the samples of a rank, however many ranks
      there are.
    - Running statistics, scores, gates and their counters are those of the block, and differ
      between blocks. Each rank evaluates with its own, and what is saved is rank 0's. Use
      mmengine's SyncBuffersHook to average the running statistics over all ranks at the end of
      every epoch, before evaluation and saving. ``broadcast_buffers=True`` of
      DistributedDataParallel, which mmengine does not set, would overwrite them with rank 0's.

    With one rank, or where torch.distributed is not initialised, there is nothing to do.

    Args:
        group_size (int): Number of ranks of a block, a divisor of the number of all ranks.

    Raises:
        TypeError: ``group_size`` is no integer.
        ValueError: ``group_size`` is not positive, or at the start of training, does not divide
            the number of ranks.
        RuntimeError: At the start of training: the model has no SyncUBN, or one that shares its
            statistics with a process group already.
    """

    def __init__(self, group_size: int) -> None:
        if not isinstance(group_size, int) or isinstance(group_size, bool):
            raise TypeError(f'group_size must be an integer, got {group_size!r}')
        if group_size < 1:
            raise ValueError(f'group_size must be positive, got {group_size}')
        self.group_size = group_size
        self._group: dist.ProcessGroup | None = None

    def before_train(self, runner: Runner) -> None:
        """Form the blocks and hand them to the layers."""
        world_size = get_world_size()
        if world_size == 1:
            return
        if world_size % self.group_size:
            raise ValueError(
                f'group_size={self.group_size} of SyncGroupHook does not divide the number of '
                f'ranks, {world_size}'
            )
        layers = {
            name: m for name, m in unwrap(runner.model).named_modules() if isinstance(m, SyncUBN)
        }
        if not layers:
            raise RuntimeError(
                'SyncGroupHook found no SyncUBN in the model: set norm_cfg=dict(type="SyncUBN"), '
                'or remove the hook'
            )
        for name, layer in layers.items():
            # A group of this hook is there where the same runner trains once more.
            if layer.process_group not in (None, self._group):
                raise RuntimeError(
                    f'{name} has a process_group already. Set it there or use SyncGroupHook, '
                    'not both'
                )
        if self._group is None:
            self._group, _ = dist.new_subgroups(self.group_size)
        for layer in layers.values():
            layer.process_group = self._group
        runner.logger.info(
            f'SyncUBN: {len(layers)} layers share their statistics within blocks of '
            f'{self.group_size} of {world_size} ranks'
        )

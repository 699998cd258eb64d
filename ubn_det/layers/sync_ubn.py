"""Unified Batch Normalization with statistics and decisions over all ranks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import Tensor

from .ubn import UBN, Batch


@MODELS.register_module()
class SyncUBN(UBN):
    """UBN whose statistics, condensation score and decision are those of the batch over all ranks.

    K ranks equal one process with the whole batch: output, gradients and running statistics,
    whatever the batch size and the map size of each rank. Only the score differs: it is taken over
    pairs of samples on one rank, since map sizes differ between ranks, and averaged over all such
    pairs. An empty rank takes part in both collectives and adds nothing.

    One collective each way: an all_gather of 2 C + 3 numbers a rank forward, an all_reduce of 2 C
    backward. Runs on gloo (CPU) and NCCL. Where torch.distributed is not initialised, with one
    rank, and in evaluation it is UBN and communicates nothing.

    Parameter gradients are those of the rank's own samples, as in ``nn.SyncBatchNorm``;
    DistributedDataParallel averages them.

    Args:
        *args: As in UBN.
        process_group (ProcessGroup, optional): Ranks that share the statistics; None for all. As
            in ``nn.SyncBatchNorm``, a copy of the layer keeps it. A pickled layer cannot: loaded
            again, it raises an error in training until ``process_group`` is set.
        **kwargs: As in UBN.

    Raises:
        RuntimeError: This rank is not in ``process_group``, or the group was lost in pickling.
    """

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the statistics, None for all."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group = _GroupHandle(group)

    def _world_size(self) -> int:
        """Return the number of ranks that share this forward's statistics."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return 1
        if self._group.lost:
            raise RuntimeError(
                'process_group of this SyncUBN did not survive pickling: set '
                'layer.process_group, None for all ranks'
            )
        size = dist.get_world_size(self.process_group)
        if size < 1:
            raise RuntimeError('process_group of this SyncUBN does not contain this rank')
        return size

    def _gather(self, batch: Batch) -> Batch:
        world_size = self._world_size()
        if world_size == 1:
            return super()._gather(batch)
        mean = batch.mean
        # Filled on the device: a tensor made of Python numbers would wait for it.
        numbers = [mean.new_full((1,), number) for number in (batch.count, batch.num_pairs)]
        local = torch.cat([mean, batch.var * batch.count, *numbers, batch.pair_sum.view(1)])
        # gloo has no all_gather into one tensor.
        gathered = local.new_empty(world_size, local.numel())
        dist.all_gather(list(gathered.unbind()), local, group=self.process_group)

        # Chan's formula. An empty rank has zeros everywhere.
        means, deviations, rest = gathered.split([len(mean), len(mean), 3], dim=1)
        counts, num_pairs, pair_sums = rest.unbind(1)
        count = counts.sum()
        counts, divisor = counts.unsqueeze(1), count.clamp_min(1)
        mean = (counts * means).sum(0) / divisor
        var = (deviations + counts * (means - mean).square()).sum(0) / divisor
        return Batch(count, mean, var, pair_sums.sum(), num_pairs.sum())

    def _gradient_all_reduce(self) -> Callable[[Tensor], None] | None:
        if self._world_size() == 1:
            return None
        return functools.partial(dist.all_reduce, group=self.process_group)

    def extra_repr(self) -> str:
        """Return UBN's arguments and the process group where it is not all ranks."""
        if self.process_group is None:
            return super().extra_repr()
        return f'{super().extra_repr()}, process_group={self.process_group}'


class _GroupHandle:
    """Holds a process group, so that a layer that has one can be copied and pickled."""

    def __init__(self, group: dist.ProcessGroup | None, lost: bool = False) -> None:
        self.group = group
        self.lost = lost

    def __deepcopy__(self, memo: dict[int, Any]) -> '_GroupHandle':
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _GroupHandle, (None, self.lost or self.group is not None)

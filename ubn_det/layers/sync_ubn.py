"""Unified Batch Normalization with statistics and decisions over all ranks."""

from typing import Any

import torch.distributed as dist
from mmengine.registry import MODELS

from ubn_det.ops.collectives import check_exists

from .ubn import UBN


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
        process_group (ProcessGroup, optional): Ranks that share the statistics; None for all. A
            copy of the layer keeps it, where ``nn.SyncBatchNorm`` cannot be copied. A pickled
            layer cannot: loaded again, it raises an error in training until ``process_group`` is
            set.
        **kwargs: As in UBN.

    Raises:
        TypeError: ``process_group`` is no group.
        RuntimeError: This rank is not in ``process_group``, or the group was destroyed or lost in
            pickling.
    """

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._group = _GroupHandle(process_group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the statistics, None for all."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group = _GroupHandle(group)

    def _group_name(self) -> str | None:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self._group
        if group.lost:
            raise RuntimeError(
                'process_group of this SyncUBN did not survive pickling: set '
                'layer.process_group, None for all ranks'
            )
        check_exists(group.group)
        world_size = dist.get_world_size(group.group)
        if world_size < 1:
            raise RuntimeError('process_group of this SyncUBN does not contain this rank')
        return group.name if world_size > 1 else None

    def extra_repr(self) -> str:
        """Return UBN's arguments and the process group where it is not all ranks."""
        if self.process_group is None:
            return super().extra_repr()
        return f'{super().extra_repr()}, process_group={self.process_group}'


def _is_group(group: Any) -> bool:
    if group is None or not dist.is_available():
        return group is None
    # What a rank outside of a group has instead of it.
    outside = dist.GroupMember.NON_GROUP_MEMBER
    return isinstance(group, dist.ProcessGroup) or (
        type(group) is type(outside) and group == outside
    )


class _GroupHandle:
    """Holds a process group, so that a layer that has one can be copied and pickled."""

    def __init__(self, group: dist.ProcessGroup | None, lost: bool = False) -> None:
        if not _is_group(group):
            raise TypeError(f'process_group must be a ProcessGroup or None, got {group!r}')
        self.group = group
        # A rank outside of it has a placeholder without a name.
        self.name = '' if group is None else getattr(group, 'group_name', None)
        self.lost = lost

    def __deepcopy__(self, memo: dict[int, Any]) -> '_GroupHandle':
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _GroupHandle, (None, self.lost or self.group is not None)

"""Process groups by name: what an operator's schema can hold of one."""

import torch
import torch.distributed as dist

_DESTROYED = (
    'process_group of this SyncUBN was destroyed: set layer.process_group to another group, None '
    'for all ranks'
)


def resolve(name: str) -> dist.ProcessGroup:
    """Return the group called ``name``, '' for all ranks.

    Raises:
        RuntimeError: There is no such group any more.
    """
    if not name:
        return dist.group.WORLD
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError as error:
        raise RuntimeError(_DESTROYED) from error


def check_exists(group: dist.ProcessGroup | None) -> None:
    """Raise an error where the name of ``group`` leads to none any more, or to another group.

    Once the default group is made anew, torch gives later groups the names of earlier ones.

    Raises:
        RuntimeError: ``group`` was destroyed.
    """
    # What is compiled holds the name alone, and resolves it in every call.
    if torch.compiler.is_compiling() or not isinstance(group, dist.ProcessGroup):
        return
    if resolve(group.group_name) is not group:
        raise RuntimeError(_DESTROYED)

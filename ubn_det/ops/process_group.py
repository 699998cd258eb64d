"""Process groups by name: what an operator's schema can hold of one."""

import torch.distributed as dist


def resolve(name: str) -> dist.ProcessGroup:
    """Return the group called ``name``, '' for all ranks.

    Raises:
        RuntimeError: There is no such group any more.
    """
    if not name:
        return dist.group.WORLD
    return dist.distributed_c10d._resolve_process_group(name)

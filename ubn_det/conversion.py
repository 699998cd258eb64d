"""Turn the norm layers of a model into others."""

import torch.distributed as dist
from torch import nn

from .layers import UBN, SyncUBN


def convert_sync_ubn(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Turn every UBN of a model into SyncUBN.

    What ``nn.SyncBatchNorm.convert_sync_batchnorm`` is to BN. Parameters and buffers are kept as
    the same objects, so that an optimizer goes on with them. Other norm layers stay as they are.
    UBN1d, UBN2d and UBN3d become a SyncUBN of the same kernel.

    Args:
        module (nn.Module): Model, changed in place unless it is a UBN itself.
        process_group (ProcessGroup, optional): Ranks that share the statistics; None for all.

    Returns:
        nn.Module: ``module``, or the SyncUBN that takes its place.

    Raises:
        ValueError: A layer has a 1-d or 3-d ``affine_kernel``, which SyncUBN lacks.
    """
    return _convert(module, process_group, {})


def _convert(
    module: nn.Module,
    process_group: dist.ProcessGroup | None,
    converted: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module in converted:
        # Two names of one module stay that.
        return converted[module]
    converted[module] = module
    if isinstance(module, UBN) and not isinstance(module, SyncUBN):
        if module.affine_kernel > 1 and module._kernel_dims != SyncUBN._kernel_dims:
            raise ValueError(
                f'affine_kernel={module.affine_kernel} of a {type(module).__name__} has no '
                f'SyncUBN: SyncUBN has a {SyncUBN._kernel_dims}-d neighbourhood'
            )
        sync = SyncUBN.__new__(SyncUBN)
        sync.__setstate__(module.__getstate__())
        sync.process_group = process_group
        converted[module] = sync
        return sync
    for name, child in module._modules.items():
        if child is not None:
            replacement = _convert(child, process_group, converted)
            if replacement is not child:
                setattr(module, name, replacement)
    return module

"""What a layer takes a state dict for, when it loads one.

The keys say, since many loaders drop the versions that torch keeps beside them:

- All that BN shares with the layer and nothing that it lacks: plain BN. The rest starts at 0, so
  that the layer is that BN.
- All parameters and running statistics: UBN. Buffers of the gate that it lacks, as that of another
  version of this package may, start at 0.
- Anything else is part of a layer: what is not there is missing, and stays as it is.

One thing only the version says, ``UBN._version``: rectifiers count RECTIFIER_GAIN times since
version 0.2 of this package, and entries of 0.1 look like those of 0.2 and 0.3. All three have BN's
version, 2. So rectifiers of a version below ``GAIN_VERSION``, or of none, are loaded as they are
with a warning, unless they are 0 or what the layer has already.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

EXTRA_PARAMETERS = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
GATE_COUNTERS = (
    'num_batches_condensed',
    'num_batches_readmitted',
    'consecutive_condensed',
    'num_batches_scored',
)
GATE_BUFFERS = ('condensation', 'condensation_mean', 'condensation_var', *GATE_COUNTERS)
# The first that only layers with the gain have.
GAIN_VERSION = 3

# The counter is younger than BN.
_BN = ('weight', 'bias', 'running_mean', 'running_var')


def prepare(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> dict[str, Any]:
    """Change the entries of a UBN so that torch loads all of them, or none where one is wrong.

    Args:
        layer (nn.Module): The layer.
        state_dict (dict): Gets what starts at 0. Where an entry is wrong, gets what the layer has
            already, and torch still looks for missing and unexpected keys.
        prefix (str): Of the layer's keys.
        local_metadata (dict): Of the layer, from the state dict.
        error_msgs (list[str]): Gets what is wrong.

    Returns:
        dict: ``local_metadata`` for torch to go on with.
    """
    is_assigned = local_metadata.get('assign_to_params_buffers', False)
    own = {
        name: tensor
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items())
        if tensor is not None
    }
    entries = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
    is_bn = not any(prefix + name in state_dict for name in EXTRA_PARAMETERS + GATE_BUFFERS)
    fresh = _find_fresh(own, entries, is_bn)

    errors = list(_find_errors(own, entries, prefix, is_assigned))
    if errors:
        error_msgs.extend(errors)
        for name in (*entries, *fresh):
            state_dict[prefix + name] = own[name].detach().clone()
        return {**local_metadata, 'assign_to_params_buffers': False}

    for name in fresh:
        like = own[name]
        if is_assigned:
            # Assigned entries stay where and of what type they are.
            entry = next(entries[name] for name in _BN if name in entries)
            dtype = entry.dtype if name in EXTRA_PARAMETERS else like.dtype
            state_dict[prefix + name] = torch.zeros_like(like, device=entry.device, dtype=dtype)
        else:
            state_dict[prefix + name] = torch.zeros_like(like)
    if fresh and is_bn:
        _log_filled_once(type(layer).__name__)
    if (local_metadata.get('version') or 0) < GAIN_VERSION and _depends_on_gain(own, entries):
        warn_of_gain_once()
    return local_metadata


def _find_fresh(own: dict[str, Tensor], entries: dict[str, Any], is_bn: bool) -> list[str]:
    """Return what is not in a state dict and starts at 0."""
    shared = own.keys() & _BN
    if not shared or not shared <= entries.keys():
        return []
    absent = own.keys() - entries.keys()
    if not is_bn and absent & {*EXTRA_PARAMETERS}:
        return []
    return [name for name in EXTRA_PARAMETERS + GATE_BUFFERS if name in absent]


def _find_errors(
    own: dict[str, Tensor], entries: dict[str, Any], prefix: str, is_assigned: bool
) -> Iterator[str]:
    """Yield what is wrong with the entries of a layer."""
    for name, entry in entries.items():
        key, like = prefix + name, own[name]
        if not torch.overrides.is_tensor_like(entry):
            yield f'{key} must be a Tensor, got {type(entry).__name__}'
        elif entry.shape != like.shape and not (like.dim() == 0 and entry.shape == (1,)):
            yield (
                f'size mismatch for {key}: it has shape {tuple(entry.shape)}, the layer '
                f'{tuple(like.shape)}'
            )
        elif entry.layout is not torch.strided:
            yield f'{key} must be dense, got {entry.layout}'
        elif entry.is_meta and not (like.is_meta or is_assigned):
            yield f'{key} is on the meta device and has no values'
        elif not (_is_real(entry) if like.is_floating_point() else _is_count(entry, is_assigned)):
            yield f'{key} must be {like.dtype}, got {entry.dtype} that it cannot be made of'


def _is_real(entry: Tensor) -> bool:
    """Whether a parameter or a statistic can be made of ``entry``: of 16 bits at least."""
    return entry.is_floating_point() and entry.itemsize > 1


def _is_count(entry: Tensor, is_assigned: bool) -> bool:
    """Whether a counter can be made of ``entry``.

    It may be a float, as in a checkpoint that was cast as a whole, and have a fraction, as
    mmdet's SyncNormHook loads the mean over ranks.
    """
    if is_assigned:
        return entry.dtype == torch.long
    if _is_real(entry):
        return bool(entry.abs() < 2**63)
    return entry.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _depends_on_gain(own: dict[str, Tensor], entries: dict[str, Tensor]) -> bool:
    """Whether there are rectifiers to load that were others without the gain."""
    for name in EXTRA_PARAMETERS:
        if name in entries and not entries[name].is_meta:
            entry, like = _local(entries[name]), _local(own[name])
            if entry.any() and not _is_there(entry, like):
                return True
    return False


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part where ranks share a tensor, as those of fully_shard are."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def _is_there(entry: Tensor, like: Tensor) -> bool:
    """Whether a layer has what it loads, up to rounding: SyncNormHook loads means over ranks."""
    if like.is_meta or entry.shape != like.shape:
        return False
    return torch.allclose(entry.to(like), like, rtol=0.01, equal_nan=True)


@functools.cache
def warn_of_gain_once() -> None:
    """Warn that rectifiers may be of version 0.1."""
    print_log(
        'Loaded rectifiers of UBN from a state dict that does not say which version of ubn_det it '
        'is of. Version 0.2 and later take them times 10, version 0.1 took them as they are: if '
        'it is of 0.1, divide center_weight, scale_weight, scale_bias and neighbour_weight by 10 '
        'and load it again; if not, nothing is wrong. What is saved from now on says so.',
        logger='current',
        level=logging.WARNING,
    )


@functools.cache
def _log_filled_once(name: str) -> None:
    print_log(
        f'Loaded weights of plain BN into {name}: its rectifiers and counters start at 0, so '
        'that it equals that BN.',
        logger='current',
    )

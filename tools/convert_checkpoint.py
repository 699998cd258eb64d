"""Turn the BN layers of a checkpoint file into UBN, or UBN back into BN.

What ``ubn_det.convert`` does to a model. It takes plain state dicts and files that hold them:
checkpoints of mmengine (with optimizer, schedulers and EMA), Detectron2, timm and torchvision. A
layer is known by its ``running_mean``: norms without one, GroupNorm and LayerNorm among them,
stay. To start UBN from BN weights none of this is needed, for UBN loads them as they are; to
resume a run of BN as UBN, and to use a UBN elsewhere as BN, it is.

A checkpoint is unpickled: convert only files that you trust.
"""

import argparse
import copy
import io
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction
from torch import Tensor, nn

from ubn_det import convert
from ubn_det.layers.ubn import EXTRA_PARAMETERS, GATE_BUFFERS
from ubn_det.reliability import AtomicLocalBackend

StateDict = dict[str, Tensor]

_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
_SCHEDULERS = ('param_schedulers', 'lr_scheduler', 'scheduler')


class ConversionError(Exception):
    """A reason, in a sentence for the user, why a checkpoint cannot be converted."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Turn the BN layers of a checkpoint into UBN')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', help='file for the converted checkpoint')
    parser.add_argument(
        '--norm-cfg',
        nargs='+',
        action=DictAction,
        default={},
        help='type and arguments of the new layers, for example type=UBN affine_kernel=3; '
        'type=BN turns UBN back into BN',
    )
    parser.add_argument(
        '--select',
        nargs='+',
        metavar='GLOB',
        help='which layers, by their names in the model; all by default',
    )
    parser.add_argument(
        '--frozen',
        nargs='+',
        default=[],
        metavar='GLOB',
        help='parameters that the optimizer does not have: mmengine leaves out frozen ones where '
        'there is a paramwise_cfg',
    )
    parser.add_argument(
        '--no-optimizer',
        action='store_true',
        help='leave out the state of the optimizer and of its schedulers',
    )
    return parser.parse_args()


def load(path: Path) -> Any:
    try:
        return torch.load(path, map_location='cpu', weights_only=False)
    except FileNotFoundError:
        raise ConversionError(f'{path} does not exist') from None
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f'{path} is no checkpoint that torch.load can read: {reason[0] if reason else error!r}'
        ) from error


def convert_checkpoint(
    checkpoint: Any,
    norm_cfg: dict[str, Any],
    select: list[str] | None = None,
    frozen: list[str] | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Convert all state dicts of a checkpoint, and the optimizer of the model's.

    Args:
        checkpoint (Any): What the file holds; stays as it is.
        norm_cfg (dict): As in ``ubn_det.convert``.
        select (list[str], optional): Globs, of which a layer's name has to match one.
        frozen (list[str], optional): Globs of the parameters that the optimizer does not have;
            None to leave out the optimizer and its schedulers.

    Returns:
        tuple[dict, dict[str, int]]: The new checkpoint, and the number of converted layers by the
        key of the state dict, '' where the checkpoint is one itself.

    Raises:
        ConversionError: There is nothing to convert, or it cannot be converted.
    """
    try:
        # There is nothing to convert in it: this only looks at norm_cfg.
        convert(nn.Identity(), norm_cfg)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from error
    if not isinstance(checkpoint, Mapping):
        raise ConversionError(f'it holds a {type(checkpoint).__name__} and no state dict')
    if _is_state_dict(checkpoint):
        converted, num_layers = _convert_state_dict(checkpoint, norm_cfg, select)
        return converted, _check_found({'': num_layers}, norm_cfg, select)

    result = dict(checkpoint)
    counts = {}
    for key, value in checkpoint.items():
        if _is_state_dict(value):
            result[key], counts[key] = _convert_state_dict(value, norm_cfg, select)
    _check_found(counts, norm_cfg, select)
    if frozen is None:
        for key in ('optimizer', *_SCHEDULERS):
            result.pop(key, None)
    elif 'optimizer' in checkpoint:
        key = next((k for k in ('state_dict', 'model') if k in counts), next(iter(counts)))
        _convert_optimizer(result, checkpoint[key], result[key], frozen)
    return result, counts


def _check_found(
    counts: dict[str, int], norm_cfg: dict[str, Any], select: list[str] | None
) -> dict[str, int]:
    if not any(counts.values()):
        what = 'UBN' if _is_way_back(norm_cfg) else 'BN'
        chosen = '' if select is None else f' whose name matches {" or ".join(select)}'
        raise ConversionError(f'no layer of {what}{chosen} was found')
    return counts


def _is_way_back(norm_cfg: dict[str, Any]) -> bool:
    return 'UBN' not in norm_cfg.get('type', 'UBN')


# ------------------------------------------------------------------------------------------
# State dicts
# ------------------------------------------------------------------------------------------


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(True for _ in _find_prefixes(value))


def _find_prefixes(state_dict: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in state_dict.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            prefix, dot, name = key.rpartition('.')
            if name == 'running_mean':
                yield prefix + dot


def _convert_state_dict(
    state_dict: StateDict, norm_cfg: dict[str, Any], select: list[str] | None
) -> tuple[StateDict, int]:
    """Return the converted state dict and the number of converted layers."""
    is_way_back = _is_way_back(norm_cfg)
    layers = {}
    for prefix in _find_prefixes(state_dict):
        # Wrappers, an averaged model among them, put a name before those of the model.
        name = prefix.removeprefix('module.').rstrip('.')
        is_ubn = any(prefix + extra in state_dict for extra in EXTRA_PARAMETERS + GATE_BUFFERS)
        is_chosen = select is None or any(fnmatchcase(name, glob) for glob in select)
        if is_chosen and is_ubn == is_way_back:
            convert_layer = _layer_to_bn if is_way_back else _layer_to_ubn
            layers[prefix] = convert_layer(state_dict, prefix, name, norm_cfg)

    result = type(state_dict)()
    if hasattr(state_dict, '_metadata'):
        result._metadata = state_dict._metadata
    own = {*EXTRA_PARAMETERS, *GATE_BUFFERS, *_STATISTICS, 'weight', 'bias'}
    for key, value in state_dict.items():
        prefix, dot, name = key.rpartition('.')
        prefix += dot
        if prefix in layers and name in own:
            # All at once, in the order in which a model has them.
            result.update(layers[prefix])
        else:
            result[key] = value
    return result, len(layers)


def _layer_to_ubn(
    state_dict: StateDict, prefix: str, name: str, norm_cfg: dict[str, Any]
) -> StateDict:
    mean = state_dict[prefix + 'running_mean']
    weight = state_dict.get(prefix + 'weight')
    # The class that may become any.
    bn = nn.SyncBatchNorm(
        len(mean), affine=weight is not None, dtype=(mean if weight is None else weight).dtype
    )
    if prefix + 'bias' not in state_dict:
        bn.bias = None
    try:
        fresh = convert(bn, norm_cfg).state_dict()
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix('(the module itself): ')
        raise ConversionError(f'{name}: {message}') from error
    return {prefix + key: state_dict.get(prefix + key, value) for key, value in fresh.items()}


def _layer_to_bn(
    state_dict: StateDict, prefix: str, name: str, norm_cfg: dict[str, Any]
) -> StateDict:
    for extra in EXTRA_PARAMETERS:
        if prefix + extra in state_dict and state_dict[prefix + extra].any():
            raise ConversionError(f'{name}: its {extra} is not 0, so that no BN is equal to it')
    names = ('weight', 'bias', *_STATISTICS)
    return {prefix + n: state_dict[prefix + n] for n in names if prefix + n in state_dict}


# ------------------------------------------------------------------------------------------
# The optimizer
# ------------------------------------------------------------------------------------------


def _convert_optimizer(
    result: dict[str, Any], old: StateDict, new: StateDict, frozen: list[str]
) -> None:
    """Give the parameters in an optimizer's state the numbers that they have in the new model.

    An optimizer knows its parameters by their position in the model. New ones have no state yet,
    as before a first step, and the settings of their layer's weight.
    """
    optimizer = result['optimizer']
    old_names, new_names = (_find_parameters(state_dict, frozen) for state_dict in (old, new))
    if not isinstance(optimizer, Mapping) or not {'state', 'param_groups'} <= optimizer.keys():
        raise _no_optimizer('is not that of one optimizer')
    groups, states = optimizer['param_groups'], optimizer['state']
    if len(groups) > 1 and any(len(group['params']) != 1 for group in groups):
        raise _no_optimizer('has several groups of several parameters')
    numbers = [number for group in groups for number in group['params']]
    if numbers != list(range(len(old_names))):
        raise _no_optimizer(f'has {len(numbers)} parameters and the model {len(old_names)}')
    for number, state in states.items():
        name = old_names[number]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != old[name].shape:
                raise _no_optimizer(f'has a {key} of shape {tuple(value.shape)} for {name}')

    number_of = {name: number for number, name in enumerate(old_names)}
    converted = dict(optimizer)
    converted['state'] = {
        number: states[number_of[name]]
        for number, name in enumerate(new_names)
        if number_of.get(name) in states
    }
    if len(groups) == 1:
        converted['param_groups'] = [{**groups[0], 'params': list(range(len(new_names)))}]
    else:
        sources = []
        for name in new_names:
            weight = name.rpartition('.')[0] + '.weight'
            if name not in number_of and weight not in number_of:
                raise _no_optimizer(f'has no settings for {name}, whose layer has no weight')
            sources.append(number_of.get(name, number_of.get(weight)))
        converted['param_groups'] = [
            {**copy.deepcopy(groups[source]), 'params': [number]}
            for number, source in enumerate(sources)
        ]
        # mmengine's schedulers count settings of its own as one more group, the last.
        if 'base_param_settings' in optimizer:
            sources.append(len(groups))
        num_groups = len(groups) + ('base_param_settings' in optimizer)
        for key in _SCHEDULERS:
            if key in result:
                result[key] = _reorder(result[key], sources, num_groups)
    result['optimizer'] = converted


def _no_optimizer(reason: str) -> ConversionError:
    return ConversionError(
        f'the state of the optimizer {reason}, so that its parameters cannot be told apart. Name '
        'those that it does not have in --frozen, or leave it out with --no-optimizer: then a run '
        'can start from the file, but not resume'
    )


def _find_parameters(state_dict: StateDict, frozen: list[str]) -> list[str]:
    """Return the names of what an optimizer may have, in a model's order."""
    buffers = {*_STATISTICS, *GATE_BUFFERS}
    names: dict[Any, str] = {}
    for name, tensor in state_dict.items():
        if (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and name.rpartition('.')[2] not in buffers
            and not any(fnmatchcase(name, glob) for glob in frozen)
        ):
            # A parameter of two names is one.
            place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
            names.setdefault(place, name)
    return list(names.values())


def _reorder(state: Any, sources: list[int], num_groups: int) -> Any:
    """Give every list that has one number a group the numbers of the new groups."""
    if isinstance(state, Mapping):
        return {key: _reorder(value, sources, num_groups) for key, value in state.items()}
    if isinstance(state, list):
        if len(state) == num_groups and all(isinstance(value, Number) for value in state):
            return [state[source] for source in sources]
        return [_reorder(value, sources, num_groups) for value in state]
    return state


def main() -> None:
    args = parse_args()
    try:
        converted, counts = convert_checkpoint(
            load(Path(args.checkpoint)),
            args.norm_cfg,
            args.select,
            None if args.no_optimizer else args.frozen,
        )
        file = io.BytesIO()
        torch.save(converted, file)
        AtomicLocalBackend().put(file.getvalue(), args.out)
    except (ConversionError, OSError) as error:
        sys.exit(f'convert_checkpoint.py: error: {args.checkpoint}: {error}')
    for key, num_layers in counts.items():
        print(f'{num_layers} layers{f" of {key}" if key else ""} converted')
    print(f'saved to {args.out}')


if __name__ == '__main__':
    main()

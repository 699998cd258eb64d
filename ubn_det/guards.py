"""Raise where other libraries would silently replace a UBN or drop its rectifiers.

torch, mmengine and mmcv treat whatever is an instance of ``_BatchNorm`` as plain BN when they
convert or fuse it. UBN has to be one (``norm_eval``, weight decay and more depend on it), so these
entry points are wrapped: they raise if they meet a UBN and otherwise do what they did. Those of
mmcv are where it is installed.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import mmengine.model
import mmengine.runner
import torch.nn.utils.fusion
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn

from .layers import UBN

_INSTEAD = {
    'convert': (
        'would replace UBN by plain SyncBatchNorm and drop its rectifiers and its gate. Use '
        "norm_cfg=dict(type='SyncUBN') or ubn_det.convert_sync_ubn(model) instead; in a config "
        'remove sync_bn, and set use_syncbn=False where a detector has it (RTMDet has it on by '
        'default)'
    ),
    'fuse': (
        'would fold UBN into its convolution as if it were BN and drop its rectifiers. Use '
        'ubn_det.fuse(model) instead, which folds what is exact and keeps the rest, and leave out '
        '--fuse-conv-bn and efficient_conv_bn_eval'
    ),
}


def _find_ubn(objects: Iterable[Any]) -> Iterator[str]:
    for obj in objects:
        if isinstance(obj, nn.Module):
            for name, module in obj.named_modules():
                if isinstance(module, UBN):
                    yield f'{type(module).__name__} {name or "(the module itself)"}'


def _guard(function: Callable, kind: str) -> Callable:
    """Wrap a function so that it raises if a module among its arguments is or contains a UBN."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        found = next(_find_ubn([*args, *kwargs.values()]), None)
        if found is not None:
            raise RuntimeError(f'{function.__qualname__} {_INSTEAD[kind]}. Found: {found}')
        return function(*args, **kwargs)

    guarded._ubn_guard = True
    return guarded


def _replace_everywhere(function: Callable, kind: str) -> None:
    """Put the guarded function in the place of every by-name copy that a loaded module holds."""
    if getattr(function, '_ubn_guard', False):
        return
    guarded = _guard(function, kind)
    for module in list(sys.modules.values()):
        namespace = getattr(module, '__dict__', {})
        if namespace.get(function.__name__) is function:
            setattr(module, function.__name__, guarded)


def _guard_efficient_conv_bn_eval(function: Callable) -> Callable:
    """Wrap the method of ConvModule, which is called with False as well."""

    @functools.wraps(function)
    def guarded(self: nn.Module, efficient_conv_bn_eval: bool = True) -> None:
        if efficient_conv_bn_eval and isinstance(self.norm, UBN):
            raise RuntimeError(f'efficient_conv_bn_eval=True of ConvModule {_INSTEAD["fuse"]}')
        function(self, efficient_conv_bn_eval)

    guarded._ubn_guard = True
    return guarded


def _import_mmcv() -> ModuleType | None:
    """Return mmcv.cnn, None where mmcv is not installed."""
    try:
        return importlib.import_module('mmcv.cnn')
    except ModuleNotFoundError as error:
        if error.name != 'mmcv':
            raise
        return None


def install() -> None:
    """Install the guards; once, however often it is called."""
    _replace_everywhere(mmengine.model.convert_sync_batchnorm, 'convert')
    _replace_everywhere(torch.nn.utils.fusion.fuse_conv_bn_eval, 'fuse')
    _replace_everywhere(turn_on_efficient_conv_bn_eval_for_single_model, 'fuse')

    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if not getattr(convert, '_ubn_guard', False):
        nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(_guard(convert.__func__, 'convert'))

    cnn = _import_mmcv()
    if cnn is not None:
        _replace_everywhere(cnn.fuse_conv_bn, 'fuse')
        turn_on = cnn.ConvModule.turn_on_efficient_conv_bn_eval
        if not getattr(turn_on, '_ubn_guard', False):
            cnn.ConvModule.turn_on_efficient_conv_bn_eval = _guard_efficient_conv_bn_eval(turn_on)

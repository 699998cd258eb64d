"""Turn the norm layers of a model into others."""

import inspect
import weakref
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import UBN, SyncUBN, UBN1d, UBN2d, UBN3d
from .layers.ubn import EXTRA_PARAMETERS, GATE_BUFFERS

_UBN = {None: UBN, 1: UBN1d, 2: UBN2d, 3: UBN3d}
# What takes any number of dimensions becomes what mmcv calls 'BN'.
_BN = {None: nn.BatchNorm2d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MMCV_SYNC_BN = 'mmcv.ops.sync_bn.SyncBatchNorm'
_TIMM_BN = 'timm.layers.norm_act.BatchNormAct2d'
_TIMM_SYNC_BN = 'timm.layers.norm_act.SyncBatchNormAct'

# Every layer has these.
_KEPT = ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats', 'device', 'dtype')
# Attributes that one class has and the other gives another meaning or lacks.
_OWN_ATTRIBUTES = {
    *(name for name in inspect.signature(UBN).parameters if name not in _KEPT),
    *('_group', 'process_group', 'group', 'group_size', 'stats_mode'),
}
# What a subclass may define and still be the class it derives from. Who overrides the check of
# the input takes other dimensions.
_HARMLESS = {
    *('__module__', '__qualname__', '__doc__', '__annotations__', '__init__', '__constants__'),
    *('__static_attributes__', '__firstlineno__', '__parameters__', '_version', '_abbr_'),
    *('__annotate__', '__annotations_cache__', '__annotate_func__', '__classdictcell__'),
    *('_check_input_dim', 'extra_repr', '__repr__'),
}
_ITSELF = '(the module itself)'
_PARALLEL = {'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule'}

Select = str | Callable[[str, nn.Module], bool]


class UBNAct2d(UBN2d):
    """UBN2d that its children ``drop`` and ``act`` follow, as in timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop and activate ``input``, (N, C, H, W)."""
        return self.act(self.drop(super().forward(input)))


class SyncUBNAct(SyncUBN):
    """SyncUBN that its children ``drop`` and ``act`` follow, as in timm's SyncBatchNormAct."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop and activate ``input``, (N, C, ...)."""
        return self.act(self.drop(super().forward(input)))


class Kind(NamedTuple):
    """What a norm layer is.

    Args:
        is_ubn (bool): Whether it is UBN or BN.
        is_sync (bool): Whether ranks share its statistics.
        num_dims (int, optional): After (N, C); None for any.
        has_act (bool): Whether it has timm's ``drop`` and ``act``.
    """

    is_ubn: bool
    is_sync: bool
    num_dims: int | None
    has_act: bool = False

    def find_class(self) -> type[nn.Module]:
        """Return the class of such a layer."""
        if self.is_ubn:
            plain = UBNAct2d if self.has_act else _UBN[self.num_dims]
            sync = SyncUBNAct if self.has_act else SyncUBN
        elif self.has_act:
            from timm.layers import norm_act

            plain, sync = norm_act.BatchNormAct2d, norm_act.SyncBatchNormAct
        else:
            plain, sync = _BN[self.num_dims], nn.SyncBatchNorm
        return sync if self.is_sync else plain


_TYPES = {
    **{cls.__name__: Kind(True, False, num_dims) for num_dims, cls in _UBN.items()},
    'SyncUBN': Kind(True, True, None),
    'BN': Kind(False, False, None),
    **{f'BN{num_dims}d': Kind(False, False, num_dims) for num_dims in (1, 2, 3)},
    'SyncBN': Kind(False, True, None),
}


def convert(
    module: nn.Module,
    norm_cfg: dict[str, Any] | None = None,
    *,
    select: Select | None = None,
) -> nn.Module:
    """Turn the BN layers of any model into UBN, or UBN back into BN.

    To UBN, a model computes in evaluation what it computed before: rectifiers start at the
    identity. BatchNorm1d, 2d and 3d become UBN1d, 2d and 3d; nn.SyncBatchNorm and mmcv's become
    SyncUBN with the same process group, or plain UBN if ``norm_cfg`` says so; timm's
    BatchNormAct2d and SyncBatchNormAct keep their drop and activation. FrozenBatchNorm layers are
    no BN any more and stay, as do layers that are UBN already.

    A converted layer has the same parameters and buffers as objects, so that an optimizer goes on
    with them, the same training flag, ``requires_grad``, hooks and arguments of BN. Two names of
    one layer stay that. Convert before the optimizer is made, and before the model is wrapped for
    parallel training: neither would know of the new parameters. These are frozen in a layer whose
    parameters all are, so that it stays what it is. ``num_batches_tracked`` is kept: in a trained
    model ``warmup`` is over.

    Back to BN (types 'BN' and 'SyncBN') only what is exact in evaluation is converted: every
    rectifier is absent or 0, so that both compute the same for every input. In training the two
    differ still: BN has no gate, and no rectifiers to move.

    Args:
        module (nn.Module): Model, changed in place unless it is itself a layer to convert.
        norm_cfg (dict, optional): ``type`` and arguments of the new layers, as in a config of
            mmdet. 'UBN' and 'SyncUBN', and 'BN' and 'SyncBN', mean the class of the layer's number
            of dimensions; where the layer takes any, a number can be given ('UBN1d', 'BN3d') and
            'BN' means BatchNorm2d. Without ``type``, BN becomes UBN and SyncBN SyncUBN.
        select (str | Callable, optional): Which layers: a glob that the layer's dotted name has to
            match (as of ``fnmatch.fnmatchcase``: ``*`` matches dots too), or a function of name
            and layer. Of a layer that has several names one is enough. None for all.

    Returns:
        nn.Module: ``module``, or the layer that takes its place.

    Raises:
        TypeError: ``norm_cfg`` or ``select`` has the wrong type, an argument is unknown, or a
            layer is of a class that does more than BN.
        ValueError: An argument is out of range or one that every layer keeps, ``select`` chooses
            no layer, a layer has another number of dimensions, or is no exact BN.
        RuntimeError: The model is wrapped for parallel training, or something else than its
            modules refers to a layer or runs in its place.

    All errors name the layer and leave the model as it was.
    """
    if not (select is None or isinstance(select, str) or callable(select)):
        raise TypeError(f'select must be a glob or a function, got {select!r}')
    arguments = dict(norm_cfg or {})
    kind = _find_target(arguments)
    places = _find_places(module)
    candidates = {
        layer: [place.name for place in found]
        for layer, found in places.items()
        if is_bn(layer) and isinstance(layer, UBN) != kind.is_ubn
    }
    chosen = {
        layer: names[0] or _ITSELF
        for layer, names in candidates.items()
        if select is None or any(_is_selected(select, name, layer) for name in names)
    }
    if select is not None and not chosen:
        names = [names[0] for names in candidates.values()]
        raise ValueError(
            f'select={select!r} chooses none of the {len(names)} layers that could be converted'
            + (f': {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}' if names else '')
        )
    if chosen:
        _check_model(module, chosen)
    replacements = {}
    for layer, name in chosen.items():
        try:
            replacements[layer] = _convert(layer, kind, 'type' in (norm_cfg or {}), arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f'{name}: {error}') from error
    return _replace(module, places, replacements)


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
        TypeError: A layer is of a subclass of UBN, which may do more.
        ValueError: A layer has a 1-d or 3-d ``affine_kernel``, which SyncUBN lacks.
        RuntimeError: Something else than the layer runs in its place.

    All errors name the layer and leave the model as it was.
    """
    places = _find_places(module)
    replacements = {}
    for layer, found in places.items():
        if not isinstance(layer, UBN) or isinstance(layer, SyncUBN):
            continue
        try:
            replacements[layer] = _make_sync(layer, process_group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f'{found[0].name or _ITSELF}: {error}') from error
    return _replace(module, places, replacements)


# ------------------------------------------------------------------------------------------
# What is asked for
# ------------------------------------------------------------------------------------------


def _find_target(arguments: dict[str, Any]) -> Kind:
    """Take the type out of the arguments of norm_cfg, and check the rest."""
    name = arguments.pop('type', 'UBN')
    name = name.__name__ if inspect.isclass(name) else name
    if name not in _TYPES:
        raise ValueError(f'type of norm_cfg must be one of {", ".join(_TYPES)}, got {name!r}')
    kind = _TYPES[name]
    kept = [key for key in arguments if key in _KEPT]
    if kept:
        raise ValueError(f'{kept[0]} in norm_cfg: each layer keeps its own')
    known = set(inspect.signature(UBN).parameters) if kind.is_ubn else set()
    known |= {'process_group'} if kind.is_sync else set()
    for key in arguments:
        if key not in known:
            raise TypeError(f'{key} in norm_cfg is no argument of {name}')
    return kind


def _is_selected(select: Select, name: str, layer: nn.Module) -> bool:
    if isinstance(select, str):
        return fnmatchcase(name, select)
    return bool(select(name, layer))


# ------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    name: str
    parent: nn.Module | None
    key: str


def _find_places(module: nn.Module) -> dict[nn.Module, list[_Place]]:
    """Return every module of a model with all the places where its parents have it."""
    places = {module: [_Place('', None, '')]}

    def walk(parent: nn.Module, prefix: str) -> None:
        for key, child in parent._modules.items():
            if child is None:
                continue
            is_new = child not in places
            places.setdefault(child, []).append(_Place(prefix + key, parent, key))
            if is_new:
                walk(child, f'{prefix}{key}.')

    walk(module, '')
    return places


def _replace(
    module: nn.Module,
    places: dict[nn.Module, list[_Place]],
    replacements: dict[nn.Module, nn.Module],
) -> nn.Module:
    for old, new in replacements.items():
        for place in places[old]:
            if place.parent is not None:
                setattr(place.parent, place.key, new)
        # The only hooks that hold the module that they were registered on.
        for hook in new._load_state_dict_pre_hooks.values():
            if getattr(hook, 'with_module', False):
                hook.module = weakref.ref(new)
    return replacements.get(module, module)


def _check_model(model: nn.Module, chosen: dict[nn.Module, str]) -> None:
    """Raise where a replaced layer would still run, or its new parameters would not train."""
    for name, module in model.named_modules():
        what = f'{type(module).__name__} {name}'.rstrip()
        if _PARALLEL & {cls.__name__ for cls in type(module).__mro__}:
            raise RuntimeError(
                f'{what} is wrapped for parallel training and would not share the gradients of '
                'new parameters: convert the model before it is wrapped'
            )
        runner = getattr(vars(module).get('forward'), '__self__', None)
        if (
            isinstance(runner, nn.Module)
            and runner is not module
            and any(layer in chosen for layer in runner.modules())
        ):
            raise RuntimeError(
                f'forward of {what} runs a {type(runner).__name__} that would keep its layers: '
                'convert the model before its forward is replaced'
            )
        if (
            getattr(module, 'efficient_conv_bn_eval_forward', None) is not None
            and getattr(module, 'norm', None) in chosen
        ):
            raise RuntimeError(
                f'efficient_conv_bn_eval of {what} would go on with plain BN: call '
                'turn_on_efficient_conv_bn_eval(False) before'
            )
        for attribute, value in vars(module).items():
            values = value.values() if isinstance(value, dict) else value
            if attribute == '_modules' or not isinstance(value, (dict, list, tuple, nn.Module)):
                continue
            for item in [value] if isinstance(value, nn.Module) else values:
                if isinstance(item, nn.Module) and item in chosen:
                    raise RuntimeError(
                        f'{chosen[item]} is in the attribute {attribute} of {what} too, which is '
                        'no module of the model and would keep the old layer'
                    )


# ------------------------------------------------------------------------------------------
# The layers
# ------------------------------------------------------------------------------------------


def _qualified_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


def is_bn(layer: nn.Module) -> bool:
    """Whether a module is BN of any class, UBN among them."""
    return isinstance(layer, _BatchNorm) or _qualified_name(type(layer)) == _MMCV_SYNC_BN


def find_kind(layer: nn.Module) -> Kind:
    """Return what a layer is.

    Raises:
        TypeError: It is of a class that does more than BN.
    """
    cls = type(layer)
    if isinstance(layer, UBN):
        has_act = cls in (UBNAct2d, SyncUBNAct)
        dims = {UBN1d: 1, UBN2d: 2, UBN3d: 3, UBNAct2d: 2, SyncUBNAct: 2}
        if cls in (UBN, SyncUBN, *dims):
            return Kind(True, isinstance(layer, SyncUBN), dims.get(cls), has_act)
        raise TypeError(f'{cls.__name__} is a subclass of UBN and may do more')
    name = _qualified_name(cls)
    if name == _MMCV_SYNC_BN:
        return Kind(False, True, None)
    if name == _TIMM_BN:
        return Kind(False, False, 2, has_act=True)
    if name == _TIMM_SYNC_BN:
        # Without its children it is a plain SyncBatchNorm.
        has_act = {'drop', 'act'} <= layer._modules.keys()
        return Kind(False, True, 2 if has_act else None, has_act)
    num_dims: dict[type, int | None] = {
        nn.BatchNorm1d: 1,
        nn.BatchNorm2d: 2,
        nn.BatchNorm3d: 3,
        nn.SyncBatchNorm: None,
        _BatchNorm: None,
    }
    defined: set[str] = set()
    for base in cls.__mro__:
        if base in num_dims:
            break
        defined |= set(vars(base))
    if not defined <= _HARMLESS:
        more = ', '.join(sorted(defined - _HARMLESS))
        raise TypeError(
            f'{cls.__name__} is a {base.__name__} with a {more} of its own, and would lose it. '
            'Leave the layer out by select, or turn it into BN before'
        )
    is_sync = issubclass(cls, nn.SyncBatchNorm)
    return Kind(False, is_sync, None if '_check_input_dim' in defined else num_dims[base])


def _convert(
    layer: nn.Module, target: Kind, is_explicit: bool, arguments: dict[str, Any]
) -> nn.Module:
    """Make the layer that takes another's place."""
    own = find_kind(layer)
    _check_unchanged(layer)
    if target.num_dims not in (None, own.num_dims) and own.num_dims is not None:
        raise ValueError(
            f'a {type(layer).__name__} has {own.num_dims} dimensions after (N, C), and '
            f'norm_cfg asks for {target.num_dims}'
        )
    kind = Kind(
        target.is_ubn,
        target.is_sync if is_explicit else own.is_sync,
        target.num_dims or own.num_dims,
        own.has_act,
    )
    arguments = dict(arguments)
    if kind.is_sync:
        group = getattr(layer, 'process_group', getattr(layer, 'group', None))
        is_all = dist.is_available() and group is dist.group.WORLD
        arguments.setdefault('process_group', None if is_all else group)
        if isinstance(layer, SyncUBN) and layer._group.lost:
            raise RuntimeError('process_group of this SyncUBN was lost in pickling: set it before')
    if kind.is_ubn:
        _check_kernel(layer, kind, arguments)
    else:
        _check_exact(layer)
    return _build(layer, kind.find_class(), arguments)


def _make_sync(layer: UBN, process_group: dist.ProcessGroup | None) -> SyncUBN:
    """Make the SyncUBN that takes a UBN's place."""
    kind = find_kind(layer)
    _check_unchanged(layer)
    if layer.affine_kernel > 1 and layer._kernel_dims != SyncUBN._kernel_dims:
        raise ValueError(
            f'affine_kernel={layer.affine_kernel} of a {type(layer).__name__} has no SyncUBN: '
            f'SyncUBN has a {SyncUBN._kernel_dims}-d neighbourhood'
        )
    cls = kind._replace(is_sync=True).find_class()
    sync = cls.__new__(cls)
    sync.__setstate__(layer.__getstate__())
    sync.process_group = process_group
    return sync


def _check_unchanged(layer: nn.Module) -> None:
    """Raise where a layer runs something else than the forward of its class."""
    for name in ('forward', '_compiled_call_impl'):
        if vars(layer).get(name) is not None:
            raise RuntimeError(f'{name} of this {type(layer).__name__} was replaced')


def _check_kernel(layer: nn.Module, kind: Kind, arguments: dict[str, Any]) -> None:
    size = arguments.get('affine_kernel')
    if size is None and not isinstance(layer, UBN):
        # The default where it has a meaning.
        lacks_bias = layer.weight is not None and layer.bias is None
        if lacks_bias or (kind.is_sync and kind.num_dims not in (None, SyncUBN._kernel_dims)):
            arguments['affine_kernel'] = 1
    if size in (None, 1):
        return
    if layer.weight is not None and layer.bias is None:
        raise ValueError('affine_kernel needs a bias, and this layer has none')
    if kind.is_sync and kind.num_dims not in (None, SyncUBN._kernel_dims):
        raise ValueError(
            f'affine_kernel of SyncUBN is a {SyncUBN._kernel_dims}-d neighbourhood, and a '
            f'{type(layer).__name__} has {kind.num_dims} dimensions after (N, C)'
        )


def _check_exact(layer: UBN) -> None:
    """Raise unless a UBN computes in evaluation what BN computes, whatever its input."""
    for name in EXTRA_PARAMETERS:
        extra = getattr(layer, name)
        if extra is not None and extra.any():
            raise ValueError(
                f'{name} of this {type(layer).__name__} is not 0, so that no BN is equal to it. '
                'Leave the layer out by select'
            )


def _build(layer: nn.Module, cls: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """Make a layer of another class that has the same tensors, hooks and flags."""
    like = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    factory = {} if like is None else dict(device=like.device, dtype=like.dtype)
    new = cls(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        **arguments,
        **factory,
    )
    is_frozen = list(layer.parameters(recurse=False)) and not any(
        parameter.requires_grad for parameter in layer.parameters(recurse=False)
    )
    parameters, buffers = new._parameters, new._buffers
    state = {key: value for key, value in vars(layer).items() if key not in _OWN_ATTRIBUTES}
    vars(new).update(state)
    foreign = () if isinstance(new, UBN) else (*EXTRA_PARAMETERS, *GATE_BUFFERS)
    for key, made in dict(_parameters=parameters, _buffers=buffers).items():
        vars(new)[key] = made
        for name, tensor in vars(layer)[key].items():
            # Models of an old torch have no counter.
            if name not in foreign and (name != 'num_batches_tracked' or tensor is not None):
                made[name] = tensor
    for name in EXTRA_PARAMETERS:
        if is_frozen and getattr(new, name, None) is not None:
            getattr(new, name).requires_grad_(False)
    return new

"""Fold the norm layers of a model into its convolutions."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from .conversion import find_kind, is_bn
from .layers import UBN
from .layers.ubn import RECTIFIER_GAIN
from .ops import Parameters
from .ops.reference import apply_gain

# Convolutions whose output is linear in their weight and bias, whatever their forward does to the
# input before: by their qualified names, as not all of their packages are there.
_CONVOLUTIONS = {
    *(f'torch.nn.modules.conv.Conv{n}d' for n in (1, 2, 3)),
    *(f'torch.nn.modules.conv.ConvTranspose{n}d' for n in (1, 2, 3)),
    *(
        f'mmcv.cnn.bricks.wrappers.{name}{n}d'
        for name in ('Conv', 'ConvTranspose')
        for n in (2, 3)
    ),
    'timm.layers.conv2d_same.Conv2dSame',
}
_DEPTHWISE = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class Fusion(NamedTuple):
    """What became of a norm layer.

    Args:
        name (str): Of the norm layer in the model.
        kind (str): Its class.
        convolution (str, optional): Name of the convolution that it was folded into; None where
            the layer was kept.
        note (str): What is in its place, or why it was kept.
    """

    name: str
    kind: str
    convolution: str | None
    note: str


class FusionReport(tuple[Fusion, ...]):
    """What became of all the norm layers of a model; printed, a table."""

    @property
    def folded(self) -> list[Fusion]:
        """The layers that are in a convolution now."""
        return [fusion for fusion in self if fusion.convolution is not None]

    @property
    def kept(self) -> list[Fusion]:
        """The layers that are where they were."""
        return [fusion for fusion in self if fusion.convolution is None]

    def __str__(self) -> str:
        lines = [f'{len(self.folded)} norm layers folded, {len(self.kept)} kept']
        for name, kind, convolution, note in self:
            what = 'kept' if convolution is None else f'folded into {convolution}'
            lines.append(f'{name} ({kind}): {what}: {note}')
        return '\n'.join(lines)


@torch.no_grad()
def fuse(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> FusionReport:
    r"""Fold BN and UBN into the convolutions before them, where that is exact in evaluation.

    A norm layer with running statistics is one scale and one shift per channel, and becomes part
    of the convolution, unless its rectifiers depend on the instance. So a UBN is folded if its
    ``center_weight`` and ``scale_weight`` are absent or 0; its gate is then the constant
    :math:`2 \sigma(b_s)`. Its neighbourhood, where it is not 0, stays as a depthwise convolution
    in the layer's place, which ``weight`` and ``bias`` go into:

    .. math::
        h &= r g (x - \mu)              && \text{folded into the convolution before} \\
        y &= (weight + neighbour) * h + bias && \text{the depthwise convolution}

    The two are not multiplied to one, since zeros are put around h and not around the input of the
    convolution. All other layers are kept as they are.

    Which convolution a norm follows is not guessed from names: the forward of every module is
    traced symbolically, and a pair is folded only if the norm gets the very output of the
    convolution, nothing else does, both are called once and have one place in the model, and
    nothing hooks into them. A module whose forward cannot be traced keeps its norms. Where an
    argument of a forward decides whether the norm is called, as ``norm`` of ConvModule does,
    the pair is folded for its default, and a call with another value raises an error.

    Args:
        model (nn.Module): In evaluation mode; changed in place. Its modules have to be called as
            a whole: code that calls a convolution of another module's by itself would get the
            norm's part too.
        example_inputs (tuple, optional): Arguments of a call of the model. Its output is compared
            before and after. Not needed, but a proof. What calls do to its buffers is undone.

    Returns:
        FusionReport: What became of each norm layer, and why.

    Raises:
        TypeError: ``example_inputs`` is no tuple.
        ValueError: The model, or a norm layer in it, is in training mode.
        RuntimeError: The outputs for ``example_inputs`` differ; the model is as it was before.
    """
    norms = {m: name for name, m in model.named_modules() if is_bn(m)}
    training = [name for m, name in [(model, ''), *norms.items()] if m.training]
    if training:
        raise ValueError(
            f'{training[0] or "the model"} is in training mode: fusing holds in evaluation alone, '
            'call model.eval() before'
        )
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(f'example_inputs must be a tuple, got {type(example_inputs).__name__}')
    before = None if example_inputs is None else _run(model, example_inputs)

    plan = _Plan(model)
    found = {norm: plan.find(norm) for norm in norms}
    pairs = [pair for pair in found.values() if isinstance(pair, _Pair)]
    parameters = [dict(pair.convolution._parameters) for pair in pairs]
    notes = {}
    for pair in pairs:
        replacement, notes[pair.norm] = _fold(pair.convolution, pair.norm)
        setattr(pair.parent, pair.key, replacement)
    if before is not None:
        try:
            _compare(before, _run(model, example_inputs))
        except Exception:
            for pair, kept in zip(pairs, parameters):
                pair.convolution._parameters.update(kept)
                setattr(pair.parent, pair.key, pair.norm)
            raise
    plan.guard(pairs)
    return FusionReport(
        Fusion(name, type(norm).__name__, pair.convolution_name, notes[norm])
        if isinstance(pair := found[norm], _Pair)
        else Fusion(name, type(norm).__name__, None, pair)
        for norm, name in norms.items()
    )


# ------------------------------------------------------------------------------------------
# Which convolution a norm follows
# ------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """A norm that gets the output of a convolution.

    Args:
        parent (nn.Module): Has the norm as its child.
        key (str): Under this name.
        norm (nn.Module): The norm.
        convolution (nn.Module): The convolution.
        convolution_name (str): Its name in the model.
        owner (nn.Module): The module whose forward calls both.
        required (dict): Arguments of its forward that have to have these values.
    """

    parent: nn.Module
    key: str
    norm: nn.Module
    convolution: nn.Module
    convolution_name: str
    owner: nn.Module
    required: dict[str, Any]


class _Tracer(fx.Tracer):
    """Sees the calls of a module's children and nothing of what they do."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class _Forward:
    """What can be seen of a module's forward: a graph of its calls, or why there is none.

    Args:
        owner (nn.Module): The module.
        what (str): Its class and name.
    """

    def __init__(self, owner: nn.Module, what: str) -> None:
        self.owner = owner
        self.defaults: dict[str, Any] = {}
        self.graph: fx.Graph | None = None
        self.reason = ''
        if 'forward' in vars(owner) or isinstance(owner, torch.jit.ScriptModule):
            self.reason = f'the forward of {what} was replaced'
            return
        self.defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(owner).forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        try:
            self.graph = self._trace(self.defaults)
        # Whatever a forward does with what is no tensor.
        except Exception as error:
            message = (str(error).strip().splitlines() or [''])[0]
            self.reason = (
                f'the forward of {what} cannot be traced ({type(error).__name__}: {message})'
            )

    def calls_of(self, module: nn.Module) -> list[fx.Node]:
        """Return the calls of a module."""
        return [] if self.graph is None else self._find_calls(self.graph, module)

    def required(self, convolution: nn.Module, norm: nn.Module) -> dict[str, Any]:
        """Return the arguments that a pair depends on, with the values that it has been seen for.

        Each is tried with another value, a flag with its opposite and the rest with whatever there
        may be.
        """
        required = {}
        for name, default in self.defaults.items():
            others = {key: value for key, value in self.defaults.items() if key != name}
            if isinstance(default, bool):
                others[name] = not default
            try:
                graph = self._trace(others)
            except Exception:
                required[name] = default
                continue
            calls = [self._find_calls(graph, module) for module in (convolution, norm)]
            if [len(found) for found in calls] != [1, 1] or not _follows(*calls[1], *calls[0]):
                required[name] = default
        return required

    def _trace(self, arguments: dict[str, Any]) -> fx.Graph:
        with _undone(self.owner), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return _Tracer().trace(self.owner, concrete_args=arguments)

    def _find_calls(self, graph: fx.Graph, module: nn.Module) -> list[fx.Node]:
        return [
            node
            for node in graph.nodes
            if node.op == 'call_module' and self.owner.get_submodule(node.target) is module
        ]


def _follows(norm: fx.Node, convolution: fx.Node) -> bool:
    """Whether a norm gets the output of a convolution, and nothing else gets it."""
    return norm.args == (convolution,) and not norm.kwargs and list(convolution.users) == [norm]


class _Plan:
    """What can be seen of the calls in a model.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in self._names:
            for key, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, []).append((parent, key))
        self._forwards = {
            module: _Forward(module, f'{type(module).__name__} {name}'.rstrip())
            for module, name in self._names.items()
            if any(module.children()) and _has_forward(module) and not is_bn(module)
        }

    def find(self, norm: nn.Module) -> _Pair | str:
        """Return the pair that a norm and a convolution make, or why there is none."""
        refusal = _refuse_norm(norm) or self._refuse_place(norm)
        if refusal:
            return refusal
        callers = [f for f in self._forwards.values() if f.calls_of(norm)]
        calls = [node for forward in callers for node in forward.calls_of(norm)]
        if len(calls) != 1:
            return f'{len(calls)} calls of it were found'
        (forward,), (node,) = callers, calls
        source = node.args[0] if len(node.args) == 1 else None
        if not (isinstance(source, fx.Node) and source.op == 'call_module'):
            return 'no convolution is directly before it'
        convolution = forward.owner.get_submodule(source.target)
        if not isinstance(convolution, _ConvNd):
            return 'no convolution is directly before it'
        name = self._names[convolution]
        refusal = self._refuse_place(convolution) or _refuse_convolution(convolution, norm)
        if refusal:
            return f'{name}: {refusal}'
        if sum(len(f.calls_of(convolution)) for f in self._forwards.values()) != 1:
            return f'{name}: it is called several times'
        if not _follows(node, source):
            return f'{name}: its output is used elsewhere too'
        ((parent, key),) = self._places[norm]
        required = forward.required(convolution, norm)
        return _Pair(parent, key, norm, convolution, name, forward.owner, required)

    def guard(self, pairs: list[_Pair]) -> None:
        """Make modules refuse calls in which a pair that was folded would not be one."""
        required: dict[nn.Module, dict[str, Any]] = {}
        for pair in pairs:
            required.setdefault(pair.owner, {}).update(pair.required)
        for owner, values in required.items():
            if values:
                guard = _Guard(self._names[owner], type(owner), values)
                owner.register_forward_pre_hook(guard, with_kwargs=True)

    def _refuse_place(self, module: nn.Module) -> str | None:
        """Return why not all calls of a module may be known, if so."""
        parent = module
        while parent is module or not _has_forward(parent):
            places = self._places.get(parent, [])
            if not places:
                return 'no forward calls it'
            if len(places) > 1:
                return 'it has several places in the model'
            parent = places[0][0]
        forward = self._forwards.get(parent)
        return 'no forward calls it' if forward is None else forward.reason or None


def _has_forward(module: nn.Module) -> bool:
    """Whether a module is more than a container of others, as ModuleList is one."""
    return type(module).forward is not nn.Module.forward or 'forward' in vars(module)


class _Guard:
    """A hook that raises where a forward is given a value that it was not fused for."""

    def __init__(self, name: str, cls: type[nn.Module], required: dict[str, Any]) -> None:
        self.what = f'{cls.__name__} {name}'.rstrip()
        self.names = list(inspect.signature(cls.forward).parameters)[1:]
        self.required = required

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in (*zip(self.names, args), *kwargs.items()):
            if name not in self.required:
                continue
            required = self.required[name]
            is_plain = isinstance(value, (bool, int, float, str))
            if not (value is required or (is_plain and value == required)):
                raise RuntimeError(
                    f'{name} of the fused {self.what} has to be {required!r}: its norm is a part '
                    f'of its convolution. Call it so, or leave the model unfused'
                )


def _refuse_norm(norm: nn.Module) -> str | None:
    """Return why a norm is no constant scale and shift per channel in evaluation, if so."""
    try:
        find_kind(norm)
    except TypeError as error:
        return str(error).split('. ')[0]
    if _is_changed(norm):
        return 'it has hooks or a forward of its own'
    if norm.running_mean is None or norm.running_var is None:
        return 'it has no running statistics'
    if isinstance(norm, UBN):
        if norm.center_weight is not None and norm.center_weight.any():
            return 'center_weight is not 0: it adds the mean of the instance'
        if norm.scale_weight is not None and norm.scale_weight.any():
            return 'scale_weight is not 0: its gate depends on the instance'
    return None


def _refuse_convolution(convolution: nn.Module, norm: nn.Module) -> str | None:
    """Return why a norm's scale and shift cannot become part of a convolution, if so."""
    cls = type(convolution)
    if f'{cls.__module__}.{cls.__qualname__}' not in _CONVOLUTIONS:
        return f'a {cls.__name__} may do more than a convolution'
    if _is_changed(convolution):
        return 'it has hooks or a forward of its own'
    if convolution.out_channels != norm.num_features:
        return f'it has {convolution.out_channels} channels and the norm {norm.num_features}'
    kernel = getattr(norm, 'neighbour_weight', None)
    if kernel is not None and kernel.any() and kernel.dim() != convolution.weight.dim():
        return f'it has {convolution.weight.dim() - 2} dimensions and the neighbourhood more'
    return None


def _is_changed(module: nn.Module) -> bool:
    return 'forward' in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Leave attributes and buffers of a model as they were, whatever its forward does to them."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            # By attribute: a scripted module has them elsewhere.
            for name, buffer in buffers.items():
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
        for buffer, value in values:
            # Graphs may have kept those that did not move. Sparse ones cannot be compared.
            if buffer.layout is not torch.strided or not torch.equal(buffer, value):
                buffer.copy_(value)


# ------------------------------------------------------------------------------------------
# Folding
# ------------------------------------------------------------------------------------------


def _fold(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Module, str]:
    """Fold a norm into a convolution; return what takes the norm's place, and a note on it."""
    rectifiers: dict[str, Tensor | None] = {}
    if isinstance(norm, UBN):
        parameters = Parameters(*(getattr(norm, name) for name in Parameters._fields))
        rectifiers = apply_gain(parameters, RECTIFIER_GAIN, torch.float64)._asdict()
    kernel = rectifiers.get('neighbour_weight')
    has_kernel = kernel is not None and bool(kernel.any())
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if rectifiers.get('scale_bias') is not None:
        scale = scale * 2 * rectifiers['scale_bias'].double().sigmoid()
    if norm.weight is not None and not has_kernel:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None and not has_kernel:
        shift = shift + norm.bias.double()

    weight, bias = convolution.weight, convolution.bias
    if bias is not None:
        shift = shift + bias.double() * scale
    if isinstance(convolution, _ConvTransposeNd):
        # (in, out / groups, *k): the output channels of a group lie beside each other.
        groups = convolution.groups
        grouped = weight.double().unflatten(0, (groups, -1))
        per_output = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (grouped * per_output).flatten(0, 1)
    else:
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    convolution.weight = _like(folded, weight)
    convolution.bias = _like(shift, weight)

    replacement: nn.Module = nn.Identity()
    note = 'nothing is left of it'
    if has_kernel:
        replacement = _make_depthwise(norm, kernel)
        note = (
            f'its {"x".join(map(str, kernel.shape[2:]))} neighbourhood is a depthwise convolution'
        )
    rest = [norm._modules[name] for name in ('drop', 'act') if name in norm._modules]
    if rest:
        replacement = nn.Sequential(replacement, *rest)
        note += ', drop and act are left'
    return replacement.train(False), note


def _make_depthwise(norm: UBN, kernel: Tensor) -> nn.Module:
    cls = _DEPTHWISE[kernel.dim()]
    size = kernel.shape[-1]
    channels = norm.num_features
    convolution = cls(
        *(channels, channels, size),
        padding=size // 2,
        groups=channels,
        device=kernel.device,
        dtype=kernel.dtype,
    )
    merged = kernel.double().clone()
    merged.flatten(1)[:, kernel[0].numel() // 2] += norm.weight.double()
    convolution.weight = _like(merged, kernel)
    convolution.bias = _like(norm.bias.double(), kernel)
    return convolution


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)


# ------------------------------------------------------------------------------------------
# Comparing
# ------------------------------------------------------------------------------------------


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with _undone(model):
        leaves = pytree.tree_leaves(model(*inputs))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after)):
        raise RuntimeError('fused, the model returns other shapes for example_inputs')
    for a, b in zip(before, after):
        if not a.is_floating_point() or not a.numel():
            continue
        # Half of the digits: folding rounds each weight once.
        allowed = torch.finfo(a.dtype).eps ** 0.5 * float(a.abs().max())
        difference = float((a - b).abs().max())
        if not difference <= allowed:
            raise RuntimeError(
                f'fused, the model returns other values for example_inputs: they differ by '
                f'{difference:.2g}, and rounding explains {allowed:.2g}. It was restored'
            )

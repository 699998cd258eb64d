"""The namespace ``torch.ops.ubn_det``, and the gradient of what is in it.

torch.compile, torch.export and autocast see four operators whole: ``train``, ``evaluate``,
``backward`` and ``update``. Below autograd each calls the kernels of its device, which all have
the same steps: ``moments``, ``normalize``, ``reduce``, ``input_gradient``; between these a SyncUBN
has its collectives.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library, fallthrough_kernel

from . import checkpointing, dispatch, gate
from .collectives import combine, gather, resolve
from .gate import Buffers, Rule
from .reference import Parameters, accumulate_dtype

# Instance means that are a larger part of the features than this are not kept for the backward
# pass but taken again there.
_MAX_KEPT = 1 / 128

_library = Library('ubn_det', 'DEF')


def _define(schema: str, implementation: Any, fake: Any) -> Any:
    """Register an operator; a custom_op would take 20 microseconds more of every call."""
    name = schema.split('(')[0]
    _library.define(schema)
    _library.impl(name, implementation, 'CompositeExplicitAutograd')
    # The gradient is that of the functions below.
    _library.impl(name, fallthrough_kernel, 'Autograd')
    torch.library.register_fake(f'ubn_det::{name}', fake, lib=_library)
    return getattr(torch.ops.ubn_det, name).default


# ------------------------------------------------------------------------------------------
# Operators
# ------------------------------------------------------------------------------------------


def _train(
    x: Tensor,
    parameters: list[Tensor | None],
    eps: float,
    gain: float,
    is_scored: bool,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = dispatch.kernels_of(x)
    if x.numel() == 0:
        y, m, summary = _fake_train(x, parameters)
        summary.zero_()
    elif group is None:
        return kernels.train(x, parameters, eps, gain, is_scored)
    else:
        m, summary = kernels.moments(x, Parameters(*parameters).center_weight, gain, is_scored)
    if group is not None:
        summary = combine(gather(summary, group))
    if x.numel():
        y = kernels.normalize(x, m, *_split(summary), parameters, eps, gain)
    return y, m, summary


def _fake_train(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    m = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    return torch.empty_like(x), m, m.new_empty(2 * x.shape[1] + 3)


def _evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    parameters: list[Tensor | None],
    eps: float,
    gain: float,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return dispatch.kernels_of(x).evaluate(x, mean, var, parameters, eps, gain)


def _fake_evaluate(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(
    dy: Tensor,
    x: Tensor,
    m: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    parameters: list[Tensor | None],
    eps: float,
    gain: float,
    has_input_gradient: bool,
    group: str | None,
) -> list[Tensor]:
    """Return the gradient of x, empty without ``has_input_gradient``, then those of parameters.

    ``count`` is the number of values per channel in the statistics, None where they are constants.
    """
    kernels = dispatch.kernels_of(x)
    is_empty, is_batch = x.numel() == 0, count is not None
    if group is None and not is_empty:
        dx, gradients = kernels.backward(
            *(dy, x, m, mean, var, parameters, is_batch, has_input_gradient, eps, gain)
        )
        return [dx, *(g for g in gradients if g is not None)]

    if is_empty:
        dx, *gradients = (t.zero_() for t in _empty_gradients(x, parameters, True))
        d_statistics = mean.new_zeros(2, len(mean))
    else:
        m, sums, d_statistics, *gradients = kernels.reduce(
            dy, x, m, mean, var, parameters, eps, gain
        )
    if group is not None:
        dist.all_reduce(d_statistics, group=resolve(group))
    if not is_empty:
        share = count.clamp_min(1).reciprocal()
        dx, d_center_weight = kernels.input_gradient(
            *(dy, x, m, mean, var, parameters, sums, d_statistics, share, eps, gain)
        )
        gradients.insert(Parameters._fields.index('center_weight'), d_center_weight)
        if not has_input_gradient:
            dx = x.new_empty(0)
    return [dx, *(g for g in gradients if g is not None)]


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    m: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    parameters: list[Tensor | None],
    eps: float,
    gain: float,
    has_input_gradient: bool,
    group: str | None,
) -> list[Tensor]:
    return _empty_gradients(x, parameters, has_input_gradient)


def _empty_gradients(
    x: Tensor, parameters: list[Tensor | None], has_input_gradient: bool
) -> list[Tensor]:
    dx = torch.empty_like(x) if has_input_gradient else x.new_empty(0)
    return [dx, *(torch.empty_like(p) for p in parameters if p is not None)]


def _update(
    buffers: list[Tensor],
    summary: Tensor,
    momentum: float | None,
    condensation_threshold: float | None,
    warmup: int,
    patience: int,
    z: float | None,
    weight: float,
) -> None:
    if checkpointing.is_second_run():
        # Counted before.
        return
    rule = Rule(momentum, condensation_threshold, warmup, patience, z, weight)
    kernels = dispatch.kernels_of(summary)
    if kernels is None:
        gate.update(Buffers(*buffers), summary, rule)
    else:
        kernels.update(buffers, summary, *rule)


def _split(summary: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and var of a summary."""
    mean, var = summary[:-3].chunk(2)
    return mean, var


_train_operator = _define(
    'train(Tensor x, Tensor?[] parameters, float eps, float gain, bool is_scored, str? group) '
    '-> (Tensor, Tensor, Tensor)',
    _train,
    _fake_train,
)
_evaluate_operator = _define(
    'evaluate(Tensor x, Tensor mean, Tensor var, Tensor?[] parameters, float eps, float gain) '
    '-> Tensor',
    _evaluate,
    _fake_evaluate,
)
_backward_operator = _define(
    'backward(Tensor dy, Tensor x, Tensor? m, Tensor mean, Tensor var, Tensor? count, '
    'Tensor?[] parameters, float eps, float gain, bool has_input_gradient, str? group) '
    '-> Tensor[]',
    _backward,
    _fake_backward,
)
_update_operator = _define(
    'update(Tensor(a!)[] buffers, Tensor summary, float? momentum, '
    'float? condensation_threshold, int warmup, int patience, float? z, float weight) -> ()',
    _update,
    lambda *_: None,
)


# ------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------


class _Normalization(torch.autograd.Function):
    """What the gradients of train and evaluate have in common."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, m, mean, var, count, *parameters = ctx.saved_tensors
        if dy is None:
            # Ranks that share the statistics wait for this one.
            dy = torch.zeros_like(x)
        # As x is stored, whatever the order of the next layer's gradient.
        dy = dy.contiguous(memory_format=dispatch.memory_format_of(x))
        dx, *rest = _backward_operator(
            *(dy, x, m, mean, var, count, _widened(x, parameters), ctx.eps, ctx.gain),
            *(ctx.needs_input_grad[0], ctx.group),
        )
        gradients = [None if p is None else rest.pop(0).to(p.dtype) for p in parameters]
        others = [None] * (len(ctx.needs_input_grad) - 1 - len(gradients))
        return dx if ctx.needs_input_grad[0] else None, *gradients, *others


class _Train(_Normalization):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        neighbour_weight: Tensor | None,
        eps: float,
        gain: float,
        is_scored: bool,
        group: str | None,
    ) -> tuple[Tensor, Tensor]:
        # One by one: torch.compile counts the arguments. With a setup_context torch would look up
        # this signature in every call, which takes longer than the kernels of a small map.
        parameters = [weight, bias, center_weight, scale_weight, scale_bias, neighbour_weight]
        y, m, summary = _train_operator(x, _widened(x, parameters), eps, gain, is_scored, group)
        ctx.eps, ctx.gain, ctx.group = eps, gain, group
        ctx.mark_non_differentiable(summary)
        ctx.set_materialize_grads(False)
        # What is compiled keeps m of any map: to ask for the size would fix its range.
        num_values = x.shape[2] * x.shape[3]
        is_kept = torch.compiler.is_compiling() or (
            m.element_size() <= _MAX_KEPT * num_values * x.element_size()
        )
        mean, var = _split(summary)
        ctx.save_for_backward(x, m if is_kept else None, mean, var, summary[-3], *parameters)
        return y, summary


class _Evaluate(_Normalization):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        neighbour_weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        gain: float,
    ) -> Tensor:
        # As above.
        parameters = [weight, bias, center_weight, scale_weight, scale_bias, neighbour_weight]
        ctx.eps, ctx.gain, ctx.group = eps, gain, None
        ctx.set_materialize_grads(False)
        # A training forward before the backward pass moves the running statistics in place.
        mean, var = (t.to(accumulate_dtype(x.dtype), copy=True) for t in (mean, var))
        ctx.save_for_backward(x, None, mean, var, None, *parameters)
        return _evaluate_operator(x, mean, var, _widened(x, parameters), eps, gain)


def _widened(x: Tensor, parameters: list[Tensor | None]) -> list[Tensor | None]:
    """Return parameters as the kernels take them: dense, and of the type of sums."""
    dtype = accumulate_dtype(x.dtype)
    return [
        p if p is None or (p.dtype == dtype and p.is_contiguous()) else p.to(dtype).contiguous()
        for p in parameters
    ]


def train(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    gain: float,
    is_scored: bool,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the operator with its gradient; returns y and summary."""
    return _Train.apply(x, *parameters, eps, gain, is_scored, group)


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, parameters: Parameters, eps: float, gain: float
) -> Tensor:
    """Run the operator, with its gradient where one may be asked for."""
    if torch.is_grad_enabled():
        return _Evaluate.apply(x, *parameters, mean, var, eps, gain)
    mean, var = _widened(x, [mean, var])
    return _evaluate_operator(x, mean, var, _widened(x, list(parameters)), eps, gain)


def describe(x: Tensor, center_weight: Tensor | None, gain: float, is_scored: bool) -> Tensor:
    """Return the summary of a batch on this process, without a gradient."""
    if x.numel() == 0:
        return x.new_zeros(2 * x.shape[1] + 3, dtype=accumulate_dtype(x.dtype))
    (center_weight,) = _widened(x, [center_weight])
    return dispatch.kernels_of(x).moments(x, center_weight, gain, is_scored)[1]


def update(buffers: Buffers, summary: Tensor, rule: Rule) -> None:
    """Run the operator."""
    _update_operator(list(buffers), summary, *rule)

r"""UBN as one operator each way.

.. math::
    x' &= x + w_c m                                  && centering \\
    z  &= (x' - \mu) r, \quad r = (var + eps)^{-1/2}  && normalization \\
    g  &= 2 \sigma(w_s k + b_s), \quad k = (m' - \mu) r && scaling \\
    y  &= (weight + neighbour * )(g z) + bias        && affine

Glossary: m is the mean of an instance channel, (N, C), and m' = (1 + w_c) m that of x'; mu and var
are the statistics that normalize, (C,); k is the mean of z, (N, C); neighbour is a depthwise k x k
convolution, absent for a kernel of 1.

Sources: centering and scaling from RBN, Gao et al., CVPR 2021 (with its gate doubled, so that
zeros are the identity); the neighbourhood from BNET, Xu et al., arXiv 2011.14150.

Up to the neighbourhood, z and y are affine in x - m with one scale and one shift per instance
channel. So the forward is one pass over x after that for its moments, the backward one pass for
the sums of dy and dy (x - m) and one for dx; all the rest is algebra on (N, C) and (C,) tensors,
and x is the only activation kept.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import planes
from .batch_statistics import Buffers, Rule, choose_statistics
from .library import Operator
from .process_group import resolve

_aten = torch.ops.aten

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

# Instance means that are a larger part of the features than this are not kept but taken again in
# the backward pass.
_MAX_KEPT = 1 / 128


class Parameters(NamedTuple):
    """All that is learnt; None for what a layer lacks.

    Args:
        weight (Tensor, optional): (C,); None for 1.
        bias (Tensor, optional): (C,); None for 0.
        center_weight (Tensor, optional): w_c, (C,); None for no centering.
        scale_weight (Tensor, optional): w_s, (C,); None for no scaling.
        scale_bias (Tensor, optional): b_s, (C,); given with ``scale_weight``.
        neighbour_weight (Tensor, optional): (C, 1, k, ...), one k for each dimension of S; needs
            ``weight`` and ``bias``.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    center_weight: Tensor | None = None
    scale_weight: Tensor | None = None
    scale_bias: Tensor | None = None
    neighbour_weight: Tensor | None = None


class Statistics(NamedTuple):
    """What normalizes.

    Args:
        mean (Tensor): mu, (C,).
        var (Tensor): var, (C,), biased.
        share (Tensor, optional): 0-dim. Given where ``mean`` and ``var`` are functions of the
            input (and of ``center_weight``): the share of one value in them, as
            ``choose_statistics`` gives it. Their gradient then flows although they enter as plain
            numbers. None where they are constants.
        group (str, optional): Name of the process group that shares them, '' for all ranks; None
            for this process alone.
    """

    mean: Tensor
    var: Tensor
    share: Tensor | None = None
    group: str | None = None


def unified_batch_norm(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    statistics: Statistics,
    instance_mean: Tensor,
) -> Tensor:
    """Apply UBN's centering, normalization, scaling and affine step with the given statistics.

    Args:
        x (Tensor): (N, C, *S), best contiguous; may be empty.
        parameters (Parameters): What is learnt.
        eps (float): Added to the variance.
        statistics (Statistics): What normalizes.
        instance_mean (Tensor): m, (N, C), in float32 at least, as ``planes.instance_mean`` gives
            it.

    Returns:
        Tensor: y, contiguous, of the shape and type of ``x``. Differentiable once.
    """
    return _operator(x, *parameters, eps, instance_mean, *statistics)


def unified_batch_norm_plain(
    x: Tensor, parameters: Parameters, eps: float, statistics: Statistics
) -> Tensor:
    """Do what :func:`unified_batch_norm` does in PyTorch's own operators alone.

    For graphs that have to run where this package is not installed.

    Args:
        x (Tensor): (N, C, *S).
        parameters (Parameters): What is learnt.
        eps (float): Added to the variance.
        statistics (Statistics): What normalizes; constants.

    Returns:
        Tensor: y, of the shape and type of ``x``. Differentiable by autograd.
    """
    dtype = planes.accumulate_dtype(x.dtype)
    spatial = tuple(range(2, x.dim()))
    m = x.mean(dim=spatial, dtype=dtype) if spatial else x.to(dtype)
    scale, shift = _scale_and_shift(parameters, eps, m, statistics.mean, statistics.var)
    # Without a word on sizes, which a graph may leave open.
    column = (..., *[None] * (x.dim() - 2))
    y = (x - m[column]) * scale[column] + shift[column]
    y = y.to(x.dtype)
    neighbour_weight = parameters.neighbour_weight
    if neighbour_weight is None:
        return y
    padding = neighbour_weight.shape[-1] // 2
    centre = parameters.weight[(..., *[None] * (neighbour_weight.dim() - 1))]
    kernel = neighbour_weight + F.pad(centre, [padding] * (2 * (x.dim() - 2)))
    groups = neighbour_weight.shape[0]
    bias = parameters.bias.to(x.dtype)
    return _CONVOLUTIONS[x.dim()](y, kernel.to(x.dtype), bias, padding=padding, groups=groups)


def unified_batch_norm_training(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    buffers: Buffers | None,
    rule: Rule,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Statistics]:
    """Apply UBN with the statistics that ``choose_statistics`` takes from the batch itself.

    Args:
        x (Tensor): (N, C, *S), best contiguous; may be empty.
        parameters (Parameters): What is learnt.
        eps (float): Added to the variance.
        buffers (Buffers, optional): Moved in place; None: nothing is kept.
        rule (Rule): When the gate closes.
        group (str, optional): As in ``Statistics``.

    Returns:
        tuple[Tensor, Tensor, Statistics]: y, contiguous, of the shape and type of ``x``,
        differentiable once; m, (N, C), and what normalized, both without a gradient.

    Raises:
        ValueError: There is a single value per channel, so that no variance is defined.
    """
    kept = (None,) * len(Buffers._fields) if buffers is None else buffers
    y, m, *chosen = _training_operator(x, *parameters, eps, *kept, *rule, group)
    return y, m, Statistics(*chosen, group)


def _forward(x: Tensor, *args) -> Tensor:
    *parameters, eps, m, mean, var, share, group = args
    if x.numel() == 0:
        return _empty_like(x)
    return _apply(x.contiguous(), Parameters(*parameters), eps, m, mean, var, None)


def _forward_training(x: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = Parameters(*args[:_NUM_PARAMETERS])
    eps, *kept, momentum, threshold, warmup, patience, freeze, group = args[_NUM_PARAMETERS:]
    buffers = None if kept[0] is None else Buffers(*kept)
    rule = Rule(momentum, threshold, warmup, patience, freeze)
    x = x.contiguous()
    m, v, standardized = planes.moments(x)
    mean, var, share = choose_statistics(x, m, v, parameters.center_weight, buffers, rule, group)
    if x.numel() == 0:
        y = _empty_like(x)
    else:
        y = _apply(x, parameters, eps, m, mean, var, standardized)
    return y, m, mean, var, share


def _apply(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    m: Tensor,
    mean: Tensor,
    var: Tensor,
    standardized: planes.Standardized | None,
) -> Tensor:
    scale, shift = _scale_and_shift(parameters, eps, m, mean, var)
    if standardized is None:
        y = planes.affine(x, m, scale, shift)
    else:
        y = planes.rescale_(standardized, scale, shift)
    neighbour_weight = parameters.neighbour_weight
    if neighbour_weight is None:
        return y
    kernel = _centre_added(neighbour_weight, parameters.weight)
    return _depthwise(y, kernel.to(x.dtype), parameters.bias.to(x.dtype))


def _scale_and_shift(
    parameters: Parameters, eps: float, m: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """Return A and B, both (N, C), of y = A (x - m) + B, the neighbourhood's step left out."""
    weight, bias, center_weight, scale_weight, scale_bias, neighbour_weight = parameters
    dtype = m.dtype
    r, k, half_gate = _normalized(m, center_weight, scale_weight, scale_bias, mean, var, eps)
    # The factors that only depend on the channel go together first: (C,) is less than (N, C).
    factor = _cast(weight, dtype) if neighbour_weight is None and weight is not None else None
    scale = r if factor is None else r * factor
    if half_gate is None:
        scale = scale.expand_as(k)
        shift = k if factor is None else k * factor
    else:
        scale = half_gate * (2 * scale)
        shift = (half_gate * k).mul_(2 if factor is None else 2 * factor)
    if neighbour_weight is None and bias is not None:
        shift = shift + _cast(bias, dtype)
    return scale, shift


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    neighbour_weight: Tensor | None,
    m: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    share: Tensor | None,
    group: str | None,
    input_grad: bool,
) -> list[Tensor]:
    """Return the gradients of x (empty without ``input_grad``), weight, bias and the extras.

    Those of x, ``weight`` and ``bias`` always, then those of the extras that there are.
    """
    dy, x = dy.contiguous(), x.contiguous()
    if m is None:
        m = planes.instance_mean(x)
    dtype = m.dtype
    r, k, half_gate = _normalized(m, center_weight, scale_weight, scale_bias, mean, var, eps)
    if half_gate is None:
        g, gr = None, r.expand_as(k)
    else:
        g = half_gate.mul_(2)
        gr = g * r

    # The factor per channel between g z and y. It is left out of the sums and applied last, for it
    # may be 0 and affine_backward wants it apart.
    w = None
    d_neighbour = None
    if neighbour_weight is not None:
        # From here on dy is the gradient of g z itself.
        if x.numel():
            h = planes.affine(x, m, gr, k if g is None else g * k)
            kernel = _centre_added(neighbour_weight, weight).to(x.dtype)
            dy, d_neighbour, d_bias = _depthwise_backward(dy, h, kernel)
            d_neighbour, d_bias = d_neighbour.to(dtype), d_bias.to(dtype)
        else:
            d_neighbour = torch.zeros_like(neighbour_weight, dtype=dtype)
            d_bias = torch.zeros_like(r)
        d_weight = _centre(d_neighbour).clone()
    elif weight is not None:
        w = _cast(weight, dtype)

    if x.numel():
        sum_dy, sum_dy_xmu = planes.reduce(dy, x, m)
    else:
        sum_dy, sum_dy_xmu = torch.zeros_like(m), torch.zeros_like(m)
    d_g = torch.addcmul(sum_dy * k, sum_dy_xmu, r)
    # What is summed over the samples, (N, C) each, goes together: on small maps the number of
    # operators is what costs.
    terms = {}
    if neighbour_weight is None:
        terms['weight'] = d_g if g is None else d_g * g
        terms['bias'] = sum_dy
    if g is None:
        d_k = sum_dy
    else:
        # sigma' = sigma (1 - sigma), g = 2 sigma
        d_logit = d_g.mul_(torch.addcmul(g, g, g, value=-0.5))
        d_k = torch.addcmul(g * sum_dy, d_logit, _cast(scale_weight, dtype))
        terms['scale_weight'] = d_logit * k
        terms['scale_bias'] = d_logit
    if share is not None:
        terms['mean'] = d_k
        terms['var'] = torch.addcmul(d_k * k, gr, sum_dy_xmu)
    sums = dict(zip(terms, torch.stack(list(terms.values())).sum(1).unbind())) if terms else {}
    if neighbour_weight is None:
        d_weight, d_bias = sums['weight'].clone(), sums['bias'].clone()
    extras = [] if g is None else [_times(sums[n], w) for n in ('scale_weight', 'scale_bias')]

    slope = None
    d_centered = d_k * r
    if share is not None:
        d_mean_var = torch.stack([sums['mean'], sums['var'].mul_(r).mul_(0.5)]).mul_(-r)
        if group is not None:
            dist.all_reduce(d_mean_var, group=resolve(group))
        # Not a product alone: what is not finite would come through a share of 0.
        d_mean, d_var = torch.where(share > 0, d_mean_var * share, 0.0).unbind()
        slope = 2 * d_var
        num_values = x.shape[2:].numel()
        d_centered.add_(torch.addcmul(d_mean, k, slope / r), alpha=num_values)
    d_m = d_centered
    if center_weight is not None:
        extras.insert(0, _times((d_centered * m).sum(0), w))
        d_m = torch.addcmul(d_centered, d_centered, _cast(center_weight, dtype))
    if d_neighbour is not None:
        extras.append(d_neighbour)

    d_x = x.new_empty(0)
    if input_grad and x.numel() == 0:
        d_x = _empty_like(x)
    elif input_grad:
        shift = torch.addcmul(d_m, gr, sum_dy, value=-1).div_(x.shape[2:].numel())
        d_x = planes.affine_backward(dy, x, m, gr, slope, shift, w)
    return [d_x, d_weight, d_bias, *extras]


class _UnifiedBatchNorm(torch.autograd.Function):
    """The gradient of both forward operators, by closed formulas."""

    @staticmethod
    def forward(ctx, operator, x, *args):
        results = operator.below_autograd(x, *args)
        weight, bias, *extras = args[:_NUM_PARAMETERS]
        ctx.eps, ctx.group = args[_NUM_PARAMETERS], args[-1]
        ctx.num_args = len(args)
        if operator is _training_operator:
            _, m, mean, var, share = results
            ctx.mark_non_differentiable(m, mean, var, share)
        else:
            m, mean, var, share = args[_NUM_PARAMETERS + 1 : -1]
            if share is None:
                # A training forward before the backward pass moves running statistics in place.
                mean, var = mean.clone(), var.clone()
        num_values = math.prod(x.shape[2:])
        # Whether to keep m is never asked of a symbolic shape, which would fix its range.
        is_kept = isinstance(num_values, torch.SymInt) or (
            m.element_size() <= _MAX_KEPT * num_values * x.element_size()
        )
        ctx.save_for_backward(x, weight, *extras, m if is_kept else None, mean, var, share)
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, *extras)]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        *saved, share = ctx.saved_tensors
        if dy is None:
            # Undefined stands for zero; the ranks that share the statistics wait for this one.
            dy = torch.zeros_like(saved[0])
        input_grad = ctx.needs_input_grad[1]
        d_x, *rest = _backward_operator(dy, *saved, ctx.eps, share, ctx.group, input_grad)
        gradients: list[Tensor | None] = []
        for index, dtype in enumerate(ctx.dtypes):
            # Those of weight and bias are always there.
            gradient = rest.pop(0) if index < 2 or dtype is not None else None
            gradients.append(None if dtype is None else _cast(gradient, dtype))
        others = [None] * (ctx.num_args - _NUM_PARAMETERS)
        return None, d_x if input_grad else None, *gradients, *others


def _normalized(m, center_weight, scale_weight, scale_bias, mean, var, eps):
    """Return r, (C,), k and g / 2, (N, C); the last is None without scaling."""
    dtype = m.dtype
    r = (_cast(var, dtype) + eps).rsqrt_()
    centered = m if center_weight is None else torch.addcmul(m, m, _cast(center_weight, dtype))
    k = (centered - _cast(mean, dtype)).mul_(r)
    if scale_weight is None:
        return r, k, None
    half_gate = torch.addcmul(_cast(scale_bias, dtype), _cast(scale_weight, dtype), k).sigmoid_()
    return r, k, half_gate


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _times(t: Tensor, w: Tensor | None) -> Tensor:
    """Return a new ``t * w``: what an operator returns shares no memory."""
    return t.clone() if w is None else t * w


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t.to(dtype)``, without the microsecond that it takes to do nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _centre(kernel: Tensor) -> Tensor:
    """View the middle value of each channel's kernel of (C, 1, k, ...) as (C,)."""
    return kernel.flatten(1)[:, kernel[0].numel() // 2]


def _centre_added(neighbour_weight: Tensor, weight: Tensor) -> Tensor:
    """Return the kernel that does ``weight * h + neighbour * h`` in one convolution."""
    kernel = neighbour_weight.detach().clone(memory_format=torch.contiguous_format)
    _centre(kernel).add_(weight.detach())
    return kernel


def _depthwise(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    convolution = _CONVOLUTIONS[h.dim()]
    # The layer's own type holds: autocast would round a float32 input here.
    with torch.autocast(h.device.type, enabled=False):
        return convolution(h, kernel, bias, padding=kernel.shape[-1] // 2, groups=h.shape[1])


def _depthwise_backward(dy: Tensor, h: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_dims = h.dim() - 2
    return _aten.convolution_backward(
        dy,
        h,
        kernel,
        [h.shape[1]],
        stride=[1] * num_dims,
        padding=[kernel.shape[-1] // 2] * num_dims,
        dilation=[1] * num_dims,
        transposed=False,
        output_padding=[0] * num_dims,
        groups=h.shape[1],
        output_mask=[True, True, True],
    )


def _fake_forward(x: Tensor, *rest) -> Tensor:
    return _empty_like(x)


def _fake_forward_training(x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m = x.new_empty(x.shape[:2], dtype=planes.accumulate_dtype(x.dtype))
    vectors = (m.new_empty(x.shape[1]) for _ in range(2))
    return _empty_like(x), m, *vectors, m.new_empty(())


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, *rest) -> list[Tensor]:
    *extras, m, mean, var, eps, share, group, input_grad = rest
    dtype = planes.accumulate_dtype(x.dtype)
    return [
        _empty_like(x) if input_grad else x.new_empty(0),
        *[x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)],
        *[torch.empty_like(e, dtype=dtype) for e in extras if e is not None],
    ]


_NUM_PARAMETERS = len(Parameters._fields)
_EXTRAS = (
    'Tensor? center_weight, Tensor? scale_weight, Tensor? scale_bias, Tensor? neighbour_weight'
)
_operator = Operator(
    f'unified_batch_norm(Tensor x, Tensor? weight, Tensor? bias, {_EXTRAS}, float eps, '
    'Tensor instance_mean, Tensor mean, Tensor var, Tensor? share, str? group) -> Tensor',
    _forward,
    _fake_forward,
    _UnifiedBatchNorm,
)
_training_operator = Operator(
    f'unified_batch_norm_training(Tensor x, Tensor? weight, Tensor? bias, {_EXTRAS}, float eps, '
    'Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, '
    'Tensor(d!)? condensation, Tensor(e!)? num_batches_condensed, '
    'Tensor(f!)? num_batches_readmitted, Tensor(g!)? consecutive_condensed, float? momentum, '
    'float? condensation_threshold, int warmup, int patience, bool freeze, str? group) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _forward_training,
    _fake_forward_training,
    _UnifiedBatchNorm,
)
_backward_operator = Operator(
    f'unified_batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, {_EXTRAS}, Tensor? '
    'instance_mean, Tensor mean, Tensor var, float eps, Tensor? share, str? group, '
    'bool input_grad) -> Tensor[]',
    _backward,
    _fake_backward,
)

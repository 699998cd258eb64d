r"""The differentiable part of UBN in one function.

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
channel. So the forward is one pass over x, the backward one pass for the sums of dy and dy (x - m)
and one for dx; all the rest is algebra on (N, C) and (C,) tensors, and x is the only activation
kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import planes

_aten = torch.ops.aten


class BatchStatistics(NamedTuple):
    """How mu and var came from the batch, which decides the gradient that flows through them.

    Args:
        count (int | Tensor): Values per channel that the statistics were taken over, on all ranks.
        gate (Tensor, optional): 0-dim bool; False means that running statistics normalize after
            all and no gradient flows through them. None means that gradient flows.
        all_reduce (Callable, optional): Sums a tensor over the ranks that share the statistics, in
            place.
    """

    count: int | Tensor
    gate: Tensor | None = None
    all_reduce: Callable[[Tensor], None] | None = None


class _UnifiedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        neighbour_weight: Tensor | None,
        instance_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        statistics: BatchStatistics | None,
    ) -> Tensor:
        m = instance_mean
        dtype = m.dtype
        r = torch.rsqrt(var.to(dtype) + eps)
        centered = m if center_weight is None else torch.addcmul(m, m, center_weight.to(dtype))
        k = (centered - mean.to(dtype)) * r
        g = _gate(k, scale_weight, scale_bias)

        ctx.statistics = statistics
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x, weight, center_weight, scale_weight, scale_bias, neighbour_weight, m, r, k
        )
        if x.numel() == 0:
            return torch.empty_like(x)

        scale, shift = (r.expand_as(k), k) if g is None else (g * r, g * k)
        if neighbour_weight is None:
            if weight is not None:
                scale, shift = scale * weight.to(dtype), shift * weight.to(dtype)
            if bias is not None:
                shift = shift + bias.to(dtype)
            return planes.affine(x, m, scale, shift)
        h = planes.affine(x, m, scale, shift)
        kernel = _centre_added(neighbour_weight, weight).to(x.dtype)
        return _depthwise(h, kernel, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, center_weight, scale_weight, scale_bias, neighbour_weight, m, r, k = (
            ctx.saved_tensors
        )
        dtype, statistics = m.dtype, ctx.statistics
        dy = dy.contiguous()
        g = _gate(k, scale_weight, scale_bias)
        gr, gk = (r.expand_as(k), k) if g is None else (g * r, g * k)

        # The factor per channel between g z and y. It is left out of the sums and applied last,
        # for it may be 0 and affine_backward wants it apart.
        w = torch.ones_like(r)
        d_neighbour = None
        if neighbour_weight is not None:
            # From here on dy is the gradient of g z itself.
            if x.numel():
                h = planes.affine(x, m, gr, gk)
                kernel = _centre_added(neighbour_weight, weight).to(x.dtype)
                dy, d_neighbour, d_bias = _depthwise_backward(dy, h, kernel)
            else:
                d_neighbour, d_bias = torch.zeros_like(neighbour_weight), torch.zeros_like(r)
            d_weight = _centre(d_neighbour)
        elif weight is not None:
            w = weight.to(dtype)

        if x.numel():
            sum_dy, sum_dy_xmu = planes.reduce(dy, x, m)
        else:
            sum_dy, sum_dy_xmu = torch.zeros_like(m), torch.zeros_like(m)
        d_g = sum_dy_xmu * r + sum_dy * k
        if neighbour_weight is None:
            d_weight = (d_g if g is None else d_g * g).sum(0)
            d_bias = sum_dy.sum(0)
        d_scale_weight = d_scale_bias = None
        if g is None:
            d_k = sum_dy
        else:
            d_logit = d_g * g * (1 - g / 2)
            d_scale_weight = w * (d_logit * k).sum(0)
            d_scale_bias = w * d_logit.sum(0)
            d_k = g * sum_dy + d_logit * scale_weight.to(dtype)

        d_centered = d_k * r
        d_var = None
        if statistics is not None:
            d_mean_var = torch.stack(
                [-r * d_k.sum(0), -0.5 * r * r * (gr * sum_dy_xmu + d_k * k).sum(0)]
            )
            if statistics.all_reduce is not None:
                statistics.all_reduce(d_mean_var)
            if statistics.gate is not None:
                d_mean_var = torch.where(statistics.gate, d_mean_var, 0.0)
            d_mean, d_var = d_mean_var / statistics.count
            num_values = x.shape[2:].numel()
            d_centered = d_centered + num_values * (d_mean + 2 * d_var * (k / r))
        d_center_weight = None
        d_m = d_centered
        if center_weight is not None:
            d_center_weight = w * (d_centered * m).sum(0)
            d_m = d_centered * (1 + center_weight.to(dtype))

        d_x = None
        if ctx.needs_input_grad[0] and x.numel() == 0:
            d_x = torch.empty_like(x)
        elif ctx.needs_input_grad[0]:
            slope = torch.zeros_like(r) if d_var is None else 2 * d_var
            shift = (d_m - gr * sum_dy) / x.shape[2:].numel()
            d_x = planes.affine_backward(dy, x, m, gr, slope, shift, w)

        return (
            d_x,
            None if weight is None else d_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype),
            None if center_weight is None else d_center_weight.to(center_weight.dtype),
            None if scale_weight is None else d_scale_weight.to(scale_weight.dtype),
            None if scale_bias is None else d_scale_bias.to(scale_bias.dtype),
            None if neighbour_weight is None else d_neighbour.to(neighbour_weight.dtype),
            *[None] * 5,
        )


def unified_batch_norm(
    x: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    center_weight: Tensor | None = None,
    scale_weight: Tensor | None = None,
    scale_bias: Tensor | None = None,
    neighbour_weight: Tensor | None = None,
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """Apply UBN's centering, normalization, scaling and affine step with the given statistics.

    Args:
        x (Tensor): Contiguous (N, C, *S); may be empty.
        instance_mean (Tensor): m, (N, C), in float32 at least, as ``planes.instance_mean`` gives
            it.
        mean (Tensor): mu, (C,).
        var (Tensor): var, (C,), biased.
        eps (float): Added to ``var``.
        weight (Tensor, optional): (C,); None for 1.
        bias (Tensor, optional): (C,); None for 0.
        center_weight (Tensor, optional): w_c, (C,); None for no centering.
        scale_weight (Tensor, optional): w_s, (C,); None for no scaling.
        scale_bias (Tensor, optional): b_s, (C,); given with ``scale_weight``.
        neighbour_weight (Tensor, optional): (C, 1, k, ...), one k for each dimension of S; needs
            ``weight`` and ``bias``.
        statistics (BatchStatistics, optional): Given where ``mean`` and ``var`` are functions of
            ``x`` (and of ``center_weight``); their gradient flows through this function although
            they enter as plain numbers. None where they are constants.

    Returns:
        Tensor: y, of the shape and type of ``x``. Differentiable once.
    """
    return _UnifiedBatchNorm.apply(
        x,
        weight,
        bias,
        center_weight,
        scale_weight,
        scale_bias,
        neighbour_weight,
        instance_mean,
        mean,
        var,
        eps,
        statistics,
    )


def _gate(k: Tensor, scale_weight: Tensor | None, scale_bias: Tensor | None):
    """Return g = 2 sigmoid(w_s k + b_s), (N, C), or None without scaling."""
    if scale_weight is None:
        return None
    logit = torch.addcmul(scale_bias.to(k.dtype), scale_weight.to(k.dtype), k)
    return 2 * torch.sigmoid(logit)


def _centre(kernel: Tensor) -> Tensor:
    """View the middle value of each channel's kernel of (C, 1, k, ...) as (C,)."""
    return kernel.flatten(1)[:, kernel[0].numel() // 2]


def _centre_added(neighbour_weight: Tensor, weight: Tensor) -> Tensor:
    """Return the kernel that does ``weight * h + neighbour * h`` in one convolution."""
    kernel = neighbour_weight.detach().clone(memory_format=torch.contiguous_format)
    _centre(kernel).add_(weight.detach())
    return kernel


def _depthwise(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[h.dim()]
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

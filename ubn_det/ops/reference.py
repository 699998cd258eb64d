"""UBN in PyTorch's own operators, differentiated by autograd.

It is the formula, and what runs where no kernels are: in graphs that are exported, on devices and
with kernel sizes that have none, and where the package was installed without a compiler. Several
times slower than the kernels, and the tests of both compare them with a third text of the formula.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .collectives import combine, gather, share_statistics

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

# Pairwise products read the batch N - 1 times, the sum of unit vectors reads it once.
_MAX_PAIRWISE = 4


class Parameters(NamedTuple):
    """All that is learnt; None for what a layer lacks.

    Args:
        weight (Tensor, optional): (C,); None for 1.
        bias (Tensor, optional): (C,); None for 0.
        center_weight (Tensor, optional): (C,); None for no centering.
        scale_weight (Tensor, optional): (C,); None for no scaling.
        scale_bias (Tensor, optional): (C,); given with ``scale_weight``.
        neighbour_weight (Tensor, optional): (C, 1, k, ...), one k for each dimension of S; needs
            ``weight`` and ``bias``.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    center_weight: Tensor | None = None
    scale_weight: Tensor | None = None
    scale_bias: Tensor | None = None
    neighbour_weight: Tensor | None = None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that statistics and sums of ``dtype`` are kept in: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def train(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    gain: float,
    is_scored: bool,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """Normalize a batch by its own statistics; see ``ubn_det.ops.train``."""
    widened = x.to(accumulate_dtype(x.dtype))
    effective = apply_gain(parameters, gain, widened.dtype)
    centered = _center(widened, effective)
    mean, var = _statistics(centered)
    with torch.no_grad():
        summary = _summarize(widened, mean, var, is_scored)
        if group is not None:
            gathered = gather(summary, group)
            count, summary = summary[-3], combine(gathered)
    if group is not None:
        mean, var = share_statistics(mean, var, count, summary, group)
    return _normalize(centered, mean, var, effective, eps).to(x.dtype), summary


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, parameters: Parameters, eps: float, gain: float
) -> Tensor:
    """Normalize by given statistics; see ``ubn_det.ops.evaluate``."""
    widened = x.to(accumulate_dtype(x.dtype))
    effective = apply_gain(parameters, gain, widened.dtype)
    mean, var = mean.to(widened.dtype), var.to(widened.dtype)
    return _normalize(_center(widened, effective), mean, var, effective, eps).to(x.dtype)


def describe(x: Tensor, center_weight: Tensor | None, gain: float, is_scored: bool) -> Tensor:
    """Return the summary of a batch; see ``ubn_det.ops.describe``."""
    x = x.detach().to(accumulate_dtype(x.dtype))
    effective = apply_gain(Parameters(center_weight=center_weight), gain, x.dtype)
    mean, var = _statistics(_center(x, effective))
    return _summarize(x, mean.detach(), var.detach(), is_scored)


def apply_gain(parameters: Parameters, gain: float, dtype: torch.dtype) -> Parameters:
    """Return what the formula takes: ``gain`` times each parameter that BN lacks.

    Their gradients are divided by the gain, where the derivative would multiply by it. So SGD
    moves what the formula takes as if it were the parameter, and an optimizer whose step does not
    depend on the scale of gradients moves it the gain times as far. A constant factor on the
    gradient is a choice of the step, not of the function that is learnt (unit scaling: Blake, Orr
    and Luschi, ICML 2023).
    """
    weight, bias, *rectifiers = parameters
    return Parameters(
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        *(None if p is None else _times_gain(p.to(dtype), gain) for p in rectifiers),
    )


def _times_gain(parameter: Tensor, gain: float) -> Tensor:
    fixed = parameter.detach()
    # The difference is 0, and carries the gradient.
    return fixed * gain + (parameter - fixed) / gain


def _center(x: Tensor, p: Parameters) -> Tensor:
    return x if p.center_weight is None else x + _per_channel(p.center_weight, x) * _plane_mean(x)


def _statistics(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of every channel, (C,) each, 0 without values."""
    if centered.numel() == 0:
        return centered.new_zeros(2, centered.shape[1]).unbind()
    dims = [0, *range(2, centered.dim())]
    mean = centered.mean(dims)
    return mean, (centered - _per_channel(mean, centered)).square().mean(dims)


def _normalize(centered: Tensor, mean: Tensor, var: Tensor, p: Parameters, eps: float) -> Tensor:
    """Do all that follows centering: normalize, scale, affine."""
    z = (centered - _per_channel(mean, centered)) * _per_channel(torch.rsqrt(var + eps), centered)
    if p.scale_weight is not None:
        logit = _per_channel(p.scale_weight, z) * _plane_mean(z) + _per_channel(p.scale_bias, z)
        z = 2 * torch.sigmoid(logit) * z
    if p.neighbour_weight is not None:
        return _affine_with_neighbours(z, p)
    if p.weight is not None:
        z = z * _per_channel(p.weight, z)
    return z if p.bias is None else z + _per_channel(p.bias, z)


def _affine_with_neighbours(z: Tensor, p: Parameters) -> Tensor:
    """Return weight z + neighbour * z + bias as one depthwise convolution."""
    half = p.neighbour_weight.shape[-1] // 2
    num_dims = z.dim() - 2
    centre = p.weight[(..., *[None] * (num_dims + 1))]
    kernel = p.neighbour_weight + F.pad(centre, [half] * (2 * num_dims))
    if _is_empty(z):
        # Convolutions refuse maps without values. This keeps the parameters in the graph.
        return z * _per_channel(kernel.flatten(1).sum(1), z) + _per_channel(p.bias, z)
    with _without_autocast(z):
        return _CONVOLUTIONS[z.dim()](z, kernel, p.bias, padding=half, groups=kernel.shape[0])


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keep the type of products and convolutions, which autocast would round to half precision."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t[(..., *[None] * (x.dim() - 2))]


def _plane_mean(x: Tensor) -> Tensor:
    dims = list(range(2, x.dim()))
    # Over no dimensions, mean() would be that over all, and of no values it would be NaN.
    return x.mean(dims, keepdim=True) if dims and not _is_empty(x) else x


def _is_empty(x: Tensor) -> bool:
    # What torch.jit traces has no branch for it.
    return not torch.jit.is_tracing() and x.numel() == 0


def _summarize(x: Tensor, mean: Tensor, var: Tensor, is_scored: bool) -> Tensor:
    num, count = x.shape[0], x.numel() // x.shape[1]
    num_pairs = num * (num - 1) if is_scored and count else 0
    # Filled on the device: a tensor made of Python's numbers would wait for it.
    pair_sum = condensation_score(x) * num_pairs if num_pairs else mean.new_zeros(())
    counts = (mean.new_full((1,), count), pair_sum.view(1), mean.new_full((1,), num_pairs))
    return torch.cat([mean, var, *counts])


def condensation_score(x: Tensor) -> Tensor:
    r"""Mean cosine similarity over all pairs of samples, each flattened to one vector.

    .. math:: s = \frac{1}{N (N - 1)} \sum_{i \ne j} \frac{<x_i, x_j>}{|x_i| |x_j|}

    A sample that is zero everywhere has similarity 0 to all others. Wang et al., Unified Batch
    Normalization, arXiv 2311.15993, name the phenomenon and the threshold on it; the formula is
    this project's reading of it.

    Args:
        x (Tensor): (N, C, *S) with N >= 2, float32 or float64.

    Returns:
        Tensor: The score, 0-dim, in [-1, 1] up to rounding; not finite where ``x`` is not.
    """
    num, flat = x.shape[0], x.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    inverse_norm = torch.where(norm == 0, 0.0, norm.reciprocal())
    if num <= _MAX_PAIRWISE:
        products = [
            torch.dot(flat[i], flat[j]) * inverse_norm[i] * inverse_norm[j]
            for i in range(1, num)
            for j in range(i)
        ]
        total = 2 * torch.stack(products).sum()
    else:
        # sum_{i != j} <u_i, u_j> of the unit vectors u as |sum_i u_i|^2 - sum_i |u_i|^2.
        with _without_autocast(x):
            total = (inverse_norm @ flat).square().sum() - (norm != 0).sum()
    return total / (num * (num - 1))

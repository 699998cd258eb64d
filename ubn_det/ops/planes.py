"""Passes over planes: one instance channel is one plane of M contiguous values.

An input (N, C, *S) is seen as (1, N*C, M), so that PyTorch's batch-norm kernels, which work per
channel, work per instance channel. Each function makes one pass over memory (``affine_backward``
two on CPU). On CUDA the kernels are those that ``nn.SyncBatchNorm`` calls.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten

# Below any product g * r of a working layer; keeps a fully closed scaling gate from dividing by
# zero on CUDA.
_TINY = 1e-20

# Keeps a constant instance channel from dividing by zero; far below any eps.
_TINY_VARIANCE = 1e-30


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that statistics of ``dtype`` are kept in: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def as_planes(x: Tensor) -> Tensor:
    """View a contiguous (N, C, *S) as (1, N*C, M); (N, C) has planes of one value."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


class Standardized(NamedTuple):
    """Features whose every instance channel has mean 0 and variance 1.

    Args:
        z (Tensor): (N, C, *S).
        inverse_std (Tensor): What ``x - mean`` was multiplied by, (N, C).
    """

    z: Tensor
    inverse_std: Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor, Standardized | None]:
    """Mean and biased variance of every instance channel, and what falls off on the way.

    On CPU the group-norm kernel takes them, Welford's algorithm in vectors, at 2 to 4 times the
    speed of the batch-norm kernel, which adds up value by value. It also writes the standardized
    features, into the memory that the layer's output needs in any case; from there
    :func:`rescale_` makes the output in place, for less than that memory's page faults cost.

    Args:
        x (Tensor): Contiguous (N, C, *S).

    Returns:
        tuple[Tensor, Tensor, Standardized | None]: Mean and variance, both (N, C), in float32 at
        least, 0 for an instance channel without values; and the standardized features, or None
        where only the moments were taken.
    """
    dtype = accumulate_dtype(x.dtype)
    shape = x.shape[:2]
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=dtype), x.new_zeros(shape, dtype=dtype), None
    planes = as_planes(x)
    if x.is_cuda or x.dtype != dtype:
        buffers = (None, None)
        if not x.is_cuda:
            # The CPU kernel returns its statistics in the type of the buffers it is given; half is
            # not enough for them. Two buffers, not one twice: the kernel writes to both.
            buffers = tuple(x.new_zeros(planes.shape[1], dtype=dtype) for _ in range(2))
        mean, var = torch.batch_norm_update_stats(planes, *buffers, 0.0)
        return mean.view(shape), var.view(shape), None
    num, size = planes.shape[1:]
    z, mean, inverse_std = _aten.native_group_norm(
        planes, None, None, 1, num, size, num, _TINY_VARIANCE
    )
    var = inverse_std.square().reciprocal_().sub_(_TINY_VARIANCE)
    # Where there is none, rounding leaves a millionth of what was added.
    torch.threshold_(var, 1e-3 * _TINY_VARIANCE, 0.0)
    standardized = Standardized(_aten._unsafe_view(z, x.shape), inverse_std.view(shape))
    return mean.view(shape), var.view(shape), standardized


def rescale_(standardized: Standardized, scale: Tensor, shift: Tensor) -> Tensor:
    """Make of standardized features, in place, ``scale * (x - mean) + shift``.

    Args:
        standardized (Standardized): Of x.
        scale (Tensor): (N, C).
        shift (Tensor): (N, C).

    Returns:
        Tensor: What was ``standardized.z``.
    """
    z, inverse_std = standardized
    scale = (scale / inverse_std).flatten()
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    planes = as_planes(z)
    _aten.native_batch_norm.out(
        *(planes, scale, shift.flatten(), zero, one, False, 0.0, 0.0),
        out=planes,
        save_mean=scale.new_empty(0),
        save_invstd=scale.new_empty(0),
    )
    return z


def instance_mean(x: Tensor) -> Tensor:
    """Mean of every instance channel, (N, C), as :func:`moments` returns it."""
    dtype = accumulate_dtype(x.dtype)
    if x.numel() == 0:
        return x.new_zeros(x.shape[:2], dtype=dtype)
    if x.dim() == 2:
        return x.to(dtype)
    return x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)


def affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute ``scale * (x - mean) + shift`` with one scale and shift per instance channel.

    Args:
        x (Tensor): Contiguous (N, C, *S), not empty.
        mean (Tensor): (N, C).
        scale (Tensor): (N, C).
        shift (Tensor): (N, C).

    Returns:
        Tensor: Shape and type of ``x``.
    """
    planes = as_planes(x)
    mean, scale, shift = mean.flatten(), scale.flatten(), shift.flatten()
    one = torch.ones_like(mean)
    if x.is_cuda:
        y = torch.batch_norm_elemt(planes, scale, shift, mean, one, 0.0)
    else:
        y = _aten.native_batch_norm(planes, scale, shift, mean, one, False, 0.0, 0.0)[0]
    # Not a view, which an in-place activation after the layer would refuse to write to.
    return _aten._unsafe_view(y, x.shape)


def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over every instance channel of ``dy`` and of ``dy * (x - mean)``.

    Args:
        dy (Tensor): Contiguous (N, C, *S), not empty.
        x (Tensor): Contiguous, the shape and type of ``dy``.
        mean (Tensor): (N, C).

    Returns:
        tuple[Tensor, Tensor]: The two sums, both (N, C), in the type of ``mean``.
    """
    planes, dy, flat = as_planes(x), as_planes(dy), mean.flatten()
    one = torch.ones_like(flat)
    if x.is_cuda:
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            dy, planes, flat, one, one, True, False, False
        )
    else:
        _, sum_dy_xmu, sum_dy = _aten.native_batch_norm_backward(
            dy, planes, one, flat, one, flat, one, False, 0.0, [False, True, True]
        )
    return sum_dy.view_as(mean), sum_dy_xmu.view_as(mean)


def affine_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    shift: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """Compute ``weight * (scale * dy + slope * (x - mean) + shift)``.

    ``weight`` stands apart since it may be exactly 0 (a zero-initialised residual branch) and the
    CUDA kernel wants the rest divided by ``scale``.

    Args:
        dy (Tensor): Contiguous (N, C, *S), not empty.
        x (Tensor): Contiguous, the shape and type of ``dy``.
        mean (Tensor): (N, C).
        scale (Tensor): (N, C), not negative.
        slope (Tensor, optional): (C,); None for 0.
        shift (Tensor): (N, C).
        weight (Tensor, optional): (C,); None for 1.

    Returns:
        Tensor: Shape and type of ``x``.
    """
    if slope is None:
        if weight is not None:
            scale, shift = weight * scale, weight * shift
        return affine(dy, torch.zeros_like(mean), scale, shift)
    if x.is_cuda:
        scale = scale.clamp_min(_TINY)
        dx = torch.batch_norm_backward_elemt(
            as_planes(dy),
            as_planes(x),
            mean.flatten(),
            torch.ones_like(mean).flatten(),
            (scale if weight is None else weight * scale).flatten(),
            (-shift / scale).flatten(),
            (-slope / scale).flatten(),
            torch.ones(1, dtype=torch.int32, device=x.device),
        )
        return dx.view(x.shape)

    if weight is not None:
        scale, slope, shift = weight * scale, weight * slope, weight * shift
    slope = slope.expand_as(mean)
    column = (1, -1, 1)
    if x.dtype == mean.dtype:
        dx = as_planes(affine(x, mean, slope, shift))
    else:
        # Half precision: the sum is formed in float32 and rounded once.
        dx = torch.addcmul(
            (shift - slope * mean).view(column), as_planes(x), slope.reshape(column)
        )
    dx.addcmul_(as_planes(dy), scale.reshape(column))
    return dx.to(x.dtype).view(x.shape)

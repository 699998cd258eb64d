"""The condensation score: how alike the samples of a batch are.

Source: Wang et al., Unified Batch Normalization, arXiv 2311.15993, name the phenomenon (the cosine
similarity of the features of different samples rises) and the threshold on it; the formula below
is this project's reading of it.
"""

import torch
from torch import Tensor

from .planes import accumulate_dtype

# Pairwise products read the batch N - 1 times, the sum of unit vectors reads it once but writes a
# vector of its own: on CPU the pairs are 4 times faster at N = 2 and equal at about N = 6.
_MAX_PAIRWISE = 4

# Half-precision features are widened in parts of this many values, so that the copy stays small.
_PART = 1 << 22


def condensation_score(x: Tensor, square_norm: Tensor) -> Tensor:
    r"""Mean cosine similarity over all pairs of samples, each flattened to one vector.

    .. math:: s = \frac{1}{N (N - 1)} \sum_{i \ne j} \frac{<x_i, x_j>}{|x_i| |x_j|}

    A sample that is zero everywhere has similarity 0 to all others.

    Args:
        x (Tensor): Contiguous (N, C, *S) with N >= 2.
        square_norm (Tensor): :math:`|x_i|^2`, (N,), in float32 at least.

    Returns:
        Tensor: The score, 0-dim, in [-1, 1] up to rounding; not finite where ``x`` is not.
    """
    num, flat, dtype = x.shape[0], x.flatten(1), accumulate_dtype(x.dtype)
    inverse_norm = torch.where(square_norm == 0, 0.0, square_norm.rsqrt())
    # sum_{i != j} <u_i, u_j> of the unit vectors u, directly or as |sum_i u_i|^2 - sum_i |u_i|^2.
    total = (
        -(square_norm != 0).sum().to(dtype) if num > _MAX_PAIRWISE else square_norm.new_zeros(())
    )
    for part in flat.split(flat.shape[1] if x.dtype == dtype else max(1, _PART // num), dim=1):
        part = part.to(dtype)
        if num > _MAX_PAIRWISE:
            # Autocast would round both to half precision.
            with torch.autocast(x.device.type, enabled=False):
                vector = inverse_norm @ part
                total = total + torch.dot(vector, vector)
            continue
        for i in range(1, num):
            for j in range(i):
                cosine = torch.dot(part[i], part[j]) * (inverse_norm[i] * inverse_norm[j])
                total = total + 2 * cosine
    return total / (num * (num - 1))

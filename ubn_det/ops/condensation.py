"""The condensation score: how alike the samples of a batch are.

Source: Wang et al., Unified Batch Normalization, arXiv 2311.15993, name the phenomenon (the cosine
similarity of the features of different samples rises) and the threshold on it; the formula below
is this project's reading of it.
"""

import itertools
import math

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
    if num <= _MAX_PAIRWISE and x.dtype == dtype and not x.is_cuda:
        return square_norm.new_full((), _score_on_host(flat, square_norm.tolist()))
    inverse_norm = torch.where(square_norm == 0, 0.0, square_norm.rsqrt())
    size = flat.shape[1] if x.dtype == dtype else max(1, _PART // num)
    # One part at a time is widened.
    parts = (p if p.dtype == dtype else p.to(dtype) for p in flat.split(size, dim=1))
    if num <= _MAX_PAIRWISE:
        total = sum(_pairs(part, inverse_norm) for part in parts).mul_(2)
    else:
        # sum_{i != j} <u_i, u_j> of the unit vectors u as |sum_i u_i|^2 - sum_i |u_i|^2.
        # Autocast would round both products to half precision.
        with torch.autocast(x.device.type, enabled=False):
            vectors = (inverse_norm @ part for part in parts)
            total = sum(torch.dot(vector, vector) for vector in vectors)
        total = total - (square_norm != 0).sum()
    return total / (num * (num - 1))


def _score_on_host(flat: Tensor, square_norms: list[float]) -> float:
    """Compute the score with Python's numbers: on CPU they are at hand, and cost less."""
    rows, num = flat.unbind(), len(square_norms)
    total = 0.0
    for i, j in itertools.combinations(range(num), 2):
        # Not the root of the product, which may overflow.
        norms = math.sqrt(square_norms[i]) * math.sqrt(square_norms[j])
        if norms:
            total += torch.dot(rows[i], rows[j]).item() / norms
    return 2 * total / (num * (num - 1))


def _pairs(part: Tensor, inverse_norm: Tensor) -> Tensor:
    """Sum of the products over the unordered pairs of samples of (N, D), each pair's scaled."""
    rows, scales = part.unbind(), inverse_norm.unbind()
    products = [
        torch.dot(rows[i], rows[j]).mul_(scales[i]).mul_(scales[j])
        for i in range(1, len(rows))
        for j in range(i)
    ]
    return products[0] if len(products) == 1 else torch.stack(products).sum()

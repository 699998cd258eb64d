r"""UBN on tensors: the formula by whatever implementation serves them.

.. math::
    x' &= x + w_c m                                  && centering \\
    z  &= (x' - \mu) r, \quad r = (var + eps)^{-1/2}  && normalization \\
    g  &= 2 \sigma(w_s k + b_s), \quad k = (m' - \mu) r && scaling \\
    y  &= (weight + neighbour * )(g z) + bias        && affine

Glossary: m is the mean of an instance channel, (N, C), and m' = (1 + w_c) m that of x'; mu and var
are the statistics that normalize, (C,); k is the mean of z, (N, C); neighbour is a depthwise k x k
convolution, absent for a kernel of 1. w_c, w_s, b_s and neighbour are ``gain`` times their
parameters, whose gradients are divided by it: see ``reference.apply_gain``.

Sources: centering and scaling from RBN, Gao et al., CVPR 2021 (with its gate doubled, so that
zeros are the identity); the neighbourhood from BNET, Xu et al., arXiv 2011.14150.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import dispatch, operators, reference
from .gate import Buffers, Rule
from .reference import Parameters


def train(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    gain: float,
    is_scored: bool = False,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize a batch by its own statistics.

    Args:
        x (Tensor): (N, C, *S), may be empty.
        parameters (Parameters): What is learnt.
        eps (float): Added to the variance.
        gain (float): How much all parameters but ``weight`` and ``bias`` count.
        is_scored (bool): Whether the condensation score is taken.
        group (str, optional): Name of the process group that shares the statistics, '' for all
            ranks; None for this process alone.

    Returns:
        tuple[Tensor, Tensor]: y, of the shape, type and memory format of ``x``, differentiable;
        and the summary of the batch over all ranks, as ``describe`` returns it.

    Raises:
        ValueError: There is a single value per channel, so that no variance is defined.
    """
    if group is None and x.numel() == x.shape[1]:
        raise ValueError(
            'Expected more than 1 value per channel when training, got a batch with a single '
            'one: its variance is undefined. Use more samples or larger maps, or SyncUBN, which '
            'counts over all ranks'
        )
    if (
        group is not None
        and torch.is_grad_enabled()
        and not any(t is not None and t.requires_grad for t in (x, *parameters))
    ):
        # Other ranks may go back through here, and wait for this one.
        x = x.detach().requires_grad_()
    maps, implementation = _prepare(x, parameters)
    y, summary = implementation.train(maps, parameters, eps, gain, is_scored, group)
    return y if y.dim() == x.dim() else y.view(x.shape), summary


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, parameters: Parameters, eps: float, gain: float
) -> Tensor:
    """Normalize by given statistics.

    Args:
        x (Tensor): (N, C, *S), may be empty.
        mean (Tensor): mu, (C,), of any floating point type.
        var (Tensor): var, (C,), likewise.
        parameters (Parameters): What is learnt.
        eps (float): Added to the variance.
        gain (float): How much all parameters but ``weight`` and ``bias`` count.

    Returns:
        Tensor: y, of the shape, type and memory format of ``x``, differentiable.
    """
    maps, implementation = _prepare(x, parameters)
    y = implementation.evaluate(maps, mean, var, parameters, eps, gain)
    return y if y.dim() == x.dim() else y.view(x.shape)


def describe(x: Tensor, center_weight: Tensor | None, gain: float) -> Tensor:
    """Say what a batch on this process is, without a gradient.

    Args:
        x (Tensor): (N, C, *S), may be empty.
        center_weight (Tensor, optional): (C,); None for no centering.
        gain (float): How much it counts.

    Returns:
        Tensor: Its summary, (2 C + 3,), in float32, float64 where ``x`` is: mean and biased
        variance of the centered input, the number of values per channel, the sum of the cosine
        similarities over ordered pairs of samples, and the number of pairs; the last two 0 where
        the score is not asked for, as here.
    """
    with torch.no_grad():
        maps, implementation = _prepare(x, Parameters(center_weight=center_weight))
        return implementation.describe(maps, center_weight, gain, False)


def update(buffers: Buffers, summary: Tensor, rule: Rule) -> None:
    """Let the gate decide, and move the running statistics in place; see ``gate.update``.

    Where activation checkpointing runs a forward again, nothing moves.
    """
    operators.update(buffers, summary, rule)


def _prepare(x: Tensor, parameters: Parameters) -> tuple[Tensor, ModuleType]:
    """Return the features as the implementation that serves them takes them, and that one."""
    neighbour_weight = parameters.neighbour_weight
    has_kernels = dispatch.has_kernels(x, parameters)
    if has_kernels:
        x = x.contiguous(memory_format=dispatch.memory_format_of(x))
        if x.dim() > 4:
            x = x.flatten(2, -2)
    num_dims = 4 if has_kernels else 0
    if neighbour_weight is not None:
        num_dims = neighbour_weight.dim()
    while x.dim() < num_dims:
        # A map of height 1.
        x = x.unsqueeze(2)
    return x, operators if has_kernels else reference

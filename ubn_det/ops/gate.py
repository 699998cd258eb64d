"""The gate: whether a batch moves the running statistics. It is normalized the same in any case.

The gate is closed if the batch's statistics are not finite, or if its samples are condensed: if
its score, the mean cosine similarity over pairs of samples, is over the threshold. That is a
number, or it follows the scores of the layer itself. Everything stays on the device: nothing waits
for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import accumulate_dtype


class Buffers(NamedTuple):
    """What a layer keeps from batch to batch, all moved in place; (C,) twice, then 0-dim.

    The last three only move where the threshold follows the scores.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    condensation: Tensor
    num_batches_condensed: Tensor
    num_batches_readmitted: Tensor
    consecutive_condensed: Tensor
    condensation_mean: Tensor
    condensation_var: Tensor
    num_batches_scored: Tensor


class Rule(NamedTuple):
    """When a batch is let through, and how far it moves what the layer keeps; see ``UBN``.

    The threshold is ``condensation_threshold``; with ``z`` it follows the scores, by as much and
    ``z`` deviations over their mean.
    """

    momentum: float | None
    condensation_threshold: float | None
    warmup: int
    patience: int
    z: float | None = None
    # Of a score in its moments, at least. On recorded scores 0.02 found fewer condensed batches
    # (72 % of batches of 8, not 77 %), and 0.1 closed 1.5 times as many ordinary ones.
    weight: float = 0.05


def threshold(buffers: Buffers, rule: Rule) -> Tensor | float | None:
    """Return what the score of the next batch is held against, None where there is no score."""
    if rule.condensation_threshold is None or rule.z is None:
        return rule.condensation_threshold
    mean, var = (
        t.to(accumulate_dtype(t.dtype))
        for t in (buffers.condensation_mean, buffers.condensation_var)
    )
    return mean + rule.z * var.sqrt() + rule.condensation_threshold


def update(buffers: Buffers, summary: Tensor, rule: Rule) -> None:
    """Take in a batch: decide, count, and move the running statistics if the gate is open.

    Args:
        buffers (Buffers): Changed in place.
        summary (Tensor): Of the batch over all ranks, see ``ubn_det.ops.describe``.
        rule (Rule): When the gate closes.
    """
    mean, var = summary[:-3].chunk(2)
    count, pair_sum, num_pairs = summary[-3:].unbind()
    # All ranks together may have no value, or a single one, which has no variance.
    opened = torch.isfinite(summary[:-3]).all() & (count > 1)
    # Whether the row of closed batches ends with this one, if it is open.
    is_end = torch.ones_like(opened)
    if rule.condensation_threshold is not None:
        # Rounding may lift the score of equal samples over 1.
        score = (pair_sum / num_pairs.clamp_min(1)).clamp(-1, 1)
        is_defined = torch.isfinite(score) & (num_pairs > 0)
        last = buffers.condensation
        last.copy_(torch.where(is_defined, score, last.to(score.dtype)))
        if rule.momentum is not None:
            is_over = is_defined & (score > threshold(buffers, rule))
            is_over = is_over & (buffers.num_batches_tracked >= rule.warmup)
            if rule.z is not None:
                is_over = is_over & (buffers.num_batches_scored >= rule.warmup)
                # The moments take more than one batch to arrive where the scores have gone.
                is_end = ~is_over
            is_starved = buffers.consecutive_condensed >= rule.patience
            buffers.num_batches_readmitted.add_(opened & is_over & is_starved)
            opened = opened & (~is_over | is_starved)
        if rule.z is not None:
            # A batch without a score says nothing of where they are.
            is_end = is_end & is_defined
            _follow(buffers, score, opened & is_defined, rule.weight)
    closed = (count > 0) & ~opened
    buffers.num_batches_tracked.add_(opened)
    buffers.num_batches_condensed.add_(closed)
    buffers.consecutive_condensed.add_(closed).mul_(~(opened & is_end))

    factor = rule.momentum
    if factor is None:
        factor = 1 / buffers.num_batches_tracked.clamp_min(1).to(mean.dtype)
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, new in ((buffers.running_mean, mean), (buffers.running_var, unbiased)):
        moved = (1 - factor) * running.to(new.dtype) + factor * new
        running.copy_(torch.where(opened, moved.to(running.dtype), running))


def _follow(buffers: Buffers, score: Tensor, is_let_in: Tensor, weight: float) -> None:
    """Move the moments of the score: means over all batches at first, exponential ones later."""
    buffers.num_batches_scored.add_(is_let_in)
    share = buffers.num_batches_scored.clamp_min(1).to(score.dtype).reciprocal()
    share = share.clamp_min(weight)
    mean, var = buffers.condensation_mean, buffers.condensation_var
    distance = score - mean.to(score.dtype)
    new_mean = mean.to(score.dtype) + share * distance
    new_var = (1 - share) * (var.to(score.dtype) + share * distance.square())
    for buffer, new in ((mean, new_mean), (var, new_var)):
        buffer.copy_(torch.where(is_let_in, new.to(buffer.dtype), buffer))

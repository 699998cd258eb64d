"""The gate: whether a batch moves the running statistics. It is normalized the same in any case.

The gate is closed if the batch's statistics are not finite, or if its samples are condensed: if
its score, the mean cosine similarity over pairs of samples, is over the threshold. Everything
stays on the device: nothing waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Buffers(NamedTuple):
    """What a layer keeps from batch to batch, all moved in place; (C,) twice, then 0-dim."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    condensation: Tensor
    num_batches_condensed: Tensor
    num_batches_readmitted: Tensor
    consecutive_condensed: Tensor


class Rule(NamedTuple):
    """When a batch is let through, and how far it moves the running statistics; see ``UBN``."""

    momentum: float | None
    condensation_threshold: float | None
    warmup: int
    patience: int


def update(buffers: Buffers, summary: Tensor, rule: Rule) -> None:
    """Take in a batch: decide, count, and move the running statistics if the gate is open.

    Args:
        buffers (Buffers): Changed in place.
        summary (Tensor): Of the batch over all ranks, see ``ubn_det.ops.describe``.
        rule (Rule): When the gate closes.
    """
    mean, var = summary[:-3].chunk(2)
    count, pair_sum, num_pairs = summary[-3:].unbind()
    # One sum instead of a test per value: a NaN or an infinity in any channel survives it. All
    # ranks together may have no value, or a single one, which has no variance.
    opened = torch.isfinite(mean.sum() + var.sum()) & (count > 1)
    if rule.condensation_threshold is not None:
        # Rounding may lift the score of equal samples over 1.
        score = (pair_sum / num_pairs.clamp_min(1)).clamp(-1, 1)
        is_defined = torch.isfinite(score) & (num_pairs > 0)
        last = buffers.condensation
        last.copy_(torch.where(is_defined, score, last.to(score.dtype)))
        if rule.momentum is not None:
            is_over = is_defined & (score > rule.condensation_threshold)
            is_over = is_over & (buffers.num_batches_tracked >= rule.warmup)
            is_starved = buffers.consecutive_condensed >= rule.patience
            buffers.num_batches_readmitted.add_(opened & is_over & is_starved)
            opened = opened & (~is_over | is_starved)
    closed = (count > 0) & ~opened
    buffers.num_batches_tracked.add_(opened)
    buffers.num_batches_condensed.add_(closed)
    buffers.consecutive_condensed.add_(closed).mul_(~opened)

    factor = rule.momentum
    if factor is None:
        factor = 1 / buffers.num_batches_tracked.clamp_min(1).to(mean.dtype)
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, new in ((buffers.running_mean, mean), (buffers.running_var, unbiased)):
        old = running.to(new.dtype)
        running.copy_(torch.where(opened, (1 - factor) * old + factor * new, old))

r"""What normalizes a batch: its statistics or the running ones, as its condensation decides.

Statistics of the centered input x' = x + w_c m, from the mean m and the biased variance v of every
instance channel, exactly and without cancellation:

.. math::
    \mu = mean_n(m'), \quad var = mean_n(v) + var_n(m'), \quad m' = (1 + w_c) m

The running statistics and the counters move in place. Nothing here waits for an accelerator: the
decision stays a tensor on it.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .condensation import condensation_score
from .process_group import resolve


class Batch(NamedTuple):
    """What a batch says of itself: its statistics and how alike its samples are.

    Args:
        count (int | Tensor): Values per channel; a tensor over several ranks.
        mean (Tensor): mu, (C,).
        var (Tensor): var, (C,).
        pair_sum (Tensor): Sum of the cosine similarity over all ordered pairs of samples, 0-dim; 0
            without a threshold.
        num_pairs (int | Tensor): Number of ordered pairs.
    """

    count: int | Tensor
    mean: Tensor
    var: Tensor
    pair_sum: Tensor
    num_pairs: int | Tensor


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
    freeze: bool


def choose_statistics(
    x: Tensor,
    m: Tensor,
    v: Tensor,
    center_weight: Tensor | None,
    buffers: Buffers | None,
    rule: Rule,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose what normalizes a training batch, and move the buffers as it says.

    Args:
        x (Tensor): Contiguous (N, C, *S); may be empty, then nothing moves.
        m (Tensor): Mean of every instance channel, (N, C).
        v (Tensor): Their biased variance, (N, C).
        center_weight (Tensor, optional): w_c, (C,); None for no centering.
        buffers (Buffers, optional): None: the batch normalizes itself and nothing is kept.
        rule (Rule): When the gate closes.
        group (str, optional): Name of the process group whose ranks share the statistics, '' for
            all ranks; None for this process alone.

    Returns:
        tuple[Tensor, Tensor, Tensor]: mu and var, (C,), that normalize; and the share of one value
        in them, 0-dim: 1 over the number of values per channel, or 0 where running statistics
        normalize, through which no gradient flows. All in the type of ``m``.

    Raises:
        ValueError: There is a single value per channel, so that no variance is defined.
    """
    is_scored = buffers is not None and rule.condensation_threshold is not None
    batch = _describe(x, m, v, center_weight, is_scored)
    if group is not None:
        batch = _gather(batch, resolve(group))
        share = batch.count.clamp_min(1).reciprocal()
    elif batch.count == 0:
        # Nothing to normalize; the output is tied to the graph all the same.
        return batch.mean, batch.var, m.new_zeros(())
    elif batch.count == 1:
        raise ValueError(
            'Expected more than 1 value per channel when training, got a batch with a single '
            'one: its variance is undefined. Use more samples or larger maps, or SyncUBN, which '
            'counts over all ranks'
        )
    else:
        share = m.new_full((), 1 / batch.count)

    mean, var = batch.mean, batch.var
    if buffers is None:
        return mean, var, share
    if not m.is_cuda:
        return _decide_on_host(batch, share, buffers, rule)
    return _decide_on_device(batch, share, buffers, rule)


def _decide_on_device(
    batch: Batch, share: Tensor, buffers: Buffers, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the batch through or not, without waiting for the device."""
    mean, var = batch.mean, batch.var
    opened = _gate(batch, buffers, rule)
    if not rule.freeze:
        share = torch.where(opened, share, 0.0)
        mean = torch.where(opened, mean, buffers.running_mean.to(mean.dtype))
        var = torch.where(opened, var, buffers.running_var.to(var.dtype))
    _move_running_stats(batch, buffers, rule.momentum, opened)
    return mean, var, share


def _decide_on_host(
    batch: Batch, share: Tensor, buffers: Buffers, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide as ``_decide_on_device`` does, with Python's numbers where they are at hand.

    On CPU nothing has to be waited for; it saves three dozen operators on single numbers, a tenth
    of the time of a small layer.
    """
    opened = math.isfinite(batch.mean.sum().add_(batch.var.sum()).item()) and batch.count > 1
    threshold = rule.condensation_threshold
    if threshold is not None and batch.num_pairs > 0:
        score = (batch.pair_sum / batch.num_pairs).clamp_(-1, 1)
        if math.isfinite(score.item()):
            buffers.condensation.copy_(score)
            is_over = (
                rule.momentum is not None
                and bool(score > threshold)
                and buffers.num_batches_tracked.item() >= rule.warmup
            )
            if is_over and opened:
                opened = buffers.consecutive_condensed.item() >= rule.patience
                buffers.num_batches_readmitted.add_(int(opened))
    if not opened:
        if batch.count > 0:
            buffers.num_batches_condensed.add_(1)
            buffers.consecutive_condensed.add_(1)
        if rule.freeze:
            return batch.mean, batch.var, share
        dtype = batch.mean.dtype
        # Not the buffers themselves: a result of an operator is no alias of what it was given.
        mean, var = (t.to(dtype, copy=True) for t in (buffers.running_mean, buffers.running_var))
        return mean, var, torch.zeros_like(share)
    buffers.num_batches_tracked.add_(1)
    buffers.consecutive_condensed.zero_()
    factor = rule.momentum
    if factor is None:
        factor = 1 / buffers.num_batches_tracked.item()
    unbiased = batch.var * (batch.count / (batch.count - 1))
    for running, new in ((buffers.running_mean, batch.mean), (buffers.running_var, unbiased)):
        if running.dtype == new.dtype:
            running.mul_(1 - factor).add_(new, alpha=factor)
        else:
            running.copy_((1 - factor) * running.to(new.dtype) + factor * new)
    return batch.mean, batch.var, share


def _describe(
    x: Tensor, m: Tensor, v: Tensor, center_weight: Tensor | None, is_scored: bool
) -> Batch:
    """Return the statistics and the score of this process's part of the batch."""
    num, num_channels = m.shape
    count = x.numel() // num_channels
    if count == 0:
        zeros = m.new_zeros(2, num_channels)
        return Batch(0, zeros[0].clone(), zeros[1].clone(), m.new_zeros(()), 0)
    centered = m if center_weight is None else torch.addcmul(m, m, center_weight.to(m.dtype))
    mean = centered.mean(0)
    var = (centered - mean).square_().add_(v).mean(0)
    num_pairs = num * (num - 1)
    if num_pairs and is_scored:
        square_norm = torch.addcmul(v, m, m).sum(1).mul_(x.shape[2:].numel())
        pair_sum = condensation_score(x, square_norm) * num_pairs
    else:
        pair_sum = mean.new_zeros(())
    return Batch(count, mean, var, pair_sum, num_pairs)


def _gather(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """Return the statistics of the whole batch from those of this process's part."""
    mean = batch.mean
    # Filled on the device: a tensor made of Python numbers would wait for it.
    numbers = [mean.new_full((1,), number) for number in (batch.count, batch.num_pairs)]
    local = torch.cat([mean, batch.var * batch.count, *numbers, batch.pair_sum.view(1)])
    gathered = local.new_empty(dist.get_world_size(group), local.numel())
    # Into a list of tensors NCCL would copy every rank's part once more, by a kernel each.
    dist.all_gather_into_tensor(gathered.view(-1), local, group=group)

    # Chan's formula. An empty rank has zeros everywhere.
    means, deviations, rest = gathered.split([len(mean), len(mean), 3], dim=1)
    counts, num_pairs, pair_sums = rest.unbind(1)
    count = counts.sum()
    counts, divisor = counts.unsqueeze(1), count.clamp_min(1)
    mean = (counts * means).sum(0) / divisor
    var = (deviations + counts * (means - mean).square()).sum(0) / divisor
    return Batch(count, mean, var, pair_sums.sum(), num_pairs.sum())


def _gate(batch: Batch, buffers: Buffers, rule: Rule) -> Tensor:
    """Decide whether the batch is let through, and count it.

    Returns:
        Tensor: 0-dim bool.
    """
    # One sum instead of a test per value: a NaN or an infinity in any channel survives it.
    opened = torch.isfinite(batch.mean.sum() + batch.var.sum())
    seen = torch.ones_like(opened)
    if isinstance(batch.count, Tensor):
        # Over all ranks there may be no value or a single one, which has no variance.
        seen = batch.count > 0
        opened = opened & (batch.count > 1)
    if rule.condensation_threshold is not None:
        # Rounding may lift the score of equal samples over 1.
        score = (batch.pair_sum / _at_least_one(batch.num_pairs)).clamp(-1, 1)
        defined = torch.isfinite(score) & (batch.num_pairs > 0)
        last = buffers.condensation
        last.copy_(torch.where(defined, score, last.to(score.dtype)))
        if rule.momentum is not None:
            over = defined & (score > rule.condensation_threshold)
            over = over & (buffers.num_batches_tracked >= rule.warmup)
            starved = buffers.consecutive_condensed >= rule.patience
            buffers.num_batches_readmitted.add_(opened & over & starved)
            opened = opened & (~over | starved)
    closed = seen & ~opened
    buffers.num_batches_tracked.add_(opened)
    buffers.num_batches_condensed.add_(closed)
    buffers.consecutive_condensed.add_(closed).mul_(~opened)
    return opened


def _move_running_stats(
    batch: Batch, buffers: Buffers, momentum: float | None, opened: Tensor
) -> None:
    """Move the running statistics towards the batch's where ``opened``, by BN's formula."""
    unbiased = batch.count / _at_least_one(batch.count - 1)
    factor = momentum
    if factor is None:
        factor = 1 / buffers.num_batches_tracked.clamp_min(1).to(batch.mean.dtype)
    for running, new in (
        (buffers.running_mean, batch.mean),
        (buffers.running_var, batch.var * unbiased),
    ):
        old = running.to(new.dtype)
        running.copy_(torch.where(opened, (1 - factor) * old + factor * new, old))


def _at_least_one(number: int | Tensor) -> int | Tensor:
    """Make a count fit to divide by; over several ranks it is a tensor."""
    return number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)

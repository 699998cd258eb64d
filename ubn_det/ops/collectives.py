"""What the ranks of a SyncUBN tell each other, and process groups by name.

A schema can hold a group's name, not the group. '' stands for all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DESTROYED = (
    'process_group of this SyncUBN was destroyed: set layer.process_group to another group, None '
    'for all ranks'
)


def resolve(name: str) -> dist.ProcessGroup:
    """Return the group called ``name``, '' for all ranks.

    Raises:
        RuntimeError: There is no such group any more.
    """
    if not name:
        return dist.group.WORLD
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError as error:
        raise RuntimeError(_DESTROYED) from error


def check_exists(group: dist.ProcessGroup | None) -> None:
    """Raise an error where the name of ``group`` leads to none any more, or to another group.

    Once the default group is made anew, torch gives later groups the names of earlier ones.

    Raises:
        RuntimeError: ``group`` was destroyed.
    """
    # What is compiled holds the name alone, and resolves it in every call.
    if torch.compiler.is_compiling() or not isinstance(group, dist.ProcessGroup):
        return
    if resolve(group.group_name) is not group:
        raise RuntimeError(_DESTROYED)


def gather(summary: Tensor, group: str) -> Tensor:
    """Return the summaries of all ranks, (ranks, 2 C + 3), by one all_gather."""
    process_group = resolve(group)
    gathered = summary.new_empty(dist.get_world_size(process_group), summary.numel())
    # Into a list of tensors NCCL would copy every rank's part once more, by a kernel each.
    dist.all_gather_into_tensor(gathered.view(-1), summary, group=process_group)
    return gathered


def combine(gathered: Tensor) -> Tensor:
    """Return the summary of the whole batch from those of its parts, by Chan's formula.

    Args:
        gathered (Tensor): (ranks, 2 C + 3). An empty rank has zeros everywhere.

    Returns:
        Tensor: (2 C + 3,).
    """
    num_channels = (gathered.shape[1] - 3) // 2
    means, variances, numbers = gathered.split([num_channels, num_channels, 3], dim=1)
    total = numbers.sum(0)
    share = (numbers[:, :1] / total[0].clamp_min(1)).to(means.dtype)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return torch.cat([mean, var, total])


def share_statistics(
    mean: Tensor, var: Tensor, count: Tensor, summary: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """Replace this rank's statistics by those of the whole batch, with a gradient.

    Args:
        mean (Tensor): Of this rank's values, (C,).
        var (Tensor): Likewise, biased.
        count (Tensor): Number of this rank's values per channel, 0-dim.
        summary (Tensor): Of the whole batch.
        group (str): Name of the process group.

    Returns:
        tuple[Tensor, Tensor]: Mean and variance of the whole batch.
    """
    if torch.is_grad_enabled() and not mean.requires_grad:
        # Other ranks may go back through here, and wait for this one.
        mean = mean.detach().requires_grad_()
    return _SharedStatistics.apply(mean, var, count, summary, group)


class _SharedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        mean: Tensor, var: Tensor, count: Tensor, summary: Tensor, group: str
    ) -> tuple[Tensor, Tensor]:
        num_channels = len(mean)
        return summary[:num_channels].clone(), summary[num_channels:-3].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mean, _, count, summary, ctx.group = inputs
        ctx.save_for_backward(mean, output[0], count / summary[-3].clamp_min(1))

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor | None, ...]:
        own_mean, mean, share = ctx.saved_tensors
        gradients = torch.stack([d_mean, d_var])
        dist.all_reduce(gradients, group=resolve(ctx.group))
        d_mean, d_var = gradients * share
        return d_mean + 2 * d_var * (own_mean - mean), d_var, None, None, None

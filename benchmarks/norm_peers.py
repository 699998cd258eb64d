"""Norms to compare with that PyTorch lacks, or lacks on CPU, composed of its operators."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ubn_det import UBN
from ubn_det.ops import dispatch


class RBN(nn.Module):
    """Representative Batch Normalization of (N, C, H, W), Gao et al., CVPR 2021, by operators.

    Args:
        num_features (int): C.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, affine=False)
        shape = (1, num_features, 1, 1)
        self.center_weight = nn.Parameter(torch.zeros(shape))
        self.scale_weight = nn.Parameter(torch.zeros(shape))
        self.scale_bias = nn.Parameter(torch.ones(shape))
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the calibrated and normalized ``x``, of its shape."""
        z = self.bn(x + self.center_weight * F.adaptive_avg_pool2d(x, 1))
        logit = self.scale_weight * F.adaptive_avg_pool2d(z, 1) + self.scale_bias
        return z * torch.sigmoid(logit) * self.weight + self.bias


class BNET(nn.Sequential):
    """BNET-k of (N, C, H, W), Xu et al., arXiv 2011.14150: BN, then a depthwise convolution.

    Args:
        num_features (int): C.
        kernel_size (int): k, odd.
    """

    def __init__(self, num_features: int, kernel_size: int = 3) -> None:
        super().__init__(
            nn.BatchNorm2d(num_features, affine=False),
            nn.Conv2d(
                num_features,
                num_features,
                kernel_size,
                padding=kernel_size // 2,
                groups=num_features,
            ),
        )


@MODELS.register_module()
class BatchRenorm(nn.BatchNorm2d):
    """Batch Renormalization, Ioffe, NeurIPS 2017.

    Its limits grow as in the paper: r = 1 and d = 0 for 4 % of the training, then linearly to
    r <= 3 at 31 % and abs(d) <= 5 at 19 %.

    Args:
        num_features (int): C.
        num_batches (int): Of the training.
        **kwargs: As in ``nn.BatchNorm2d``.
    """

    def __init__(self, num_features: int, num_batches: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.num_batches = num_batches

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) by the batch, brought close to the running statistics."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            progress = float(self.num_batches_tracked) / self.num_batches
            r_max = 1 + 2 * min(max((progress - 0.04) / 0.27, 0), 1)
            d_max = 5 * min(max((progress - 0.04) / 0.15, 0), 1)
            var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
            std = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / std).clamp(-d_max, d_max)
        # Moves the running statistics, after they were used.
        z = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.num_batches_tracked.add_(1)
        scale = self.weight * r
        shift = self.weight * d + self.bias
        return z * scale[:, None, None] + shift[:, None, None]


@MODELS.register_module()
class DistanceGatedBN(nn.BatchNorm2d):
    """BN whose running statistics only move if those of the batch are as near as usual.

    The distance is the mean over channels of (batch mean - running mean)^2 / running var and of
    log(batch var / running var)^2. A batch is kept out if its distance is over the mean of earlier
    ones + ``z`` deviations; these moments are moved as those of UBN's automatic threshold are.

    Args:
        num_features (int): C.
        z (float): Number of deviations.
        score (bool): Whether a condensation score that is over UBN's automatic threshold keeps a
            batch out as well.
        warmup (int): Number of batches before the first one is kept out.
        patience (int): Number of batches in a row that can be kept out.
        **kwargs: As in ``nn.BatchNorm2d``.
    """

    def __init__(
        self,
        num_features: int,
        z: float = 3.0,
        score: bool = False,
        warmup: int = 50,
        patience: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.z = z
        self.score = score
        self.warmup = warmup
        self.patience = patience
        # Of the distance, then of the score.
        self.register_buffer('moments', torch.zeros(2, 2))
        self.register_buffer('num_kept_out', torch.zeros((), dtype=torch.long))
        self.row = 0

    @torch.no_grad()
    def _signals(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        running = self.running_var + self.eps
        distance = (mean - self.running_mean).square() / running
        distance = distance + ((var + self.eps) / running).log().square()
        rows = F.normalize(x.flatten(1))
        num = len(rows)
        score = (rows.sum(0).square().sum() - rows.square().sum()) / max(num * (num - 1), 1)
        return torch.stack([distance.mean(), score])

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), and in training move the running statistics or not."""
        if not self.training:
            return super().forward(input)
        signals = self._signals(input)
        mean, var = self.moments
        limit = mean + self.z * var.sqrt() + torch.tensor([0, 0.03])
        is_over = signals > limit
        is_out = bool(is_over[0] or (self.score and is_over[1]))
        is_out = is_out and self.num_batches_tracked >= self.warmup and self.row < self.patience
        self.row = self.row + 1 if is_out else 0
        if is_out:
            self.num_kept_out.add_(1)
            return F.batch_norm(
                input, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
        share = max(1 / (int(self.num_batches_tracked) + 1), 0.05)
        step = signals - mean
        var.copy_((1 - share) * (var + share * step.square()))
        mean.add_(share * step)
        return super().forward(input)


class OnOperators(nn.Module):
    """A UBN on PyTorch's operators, as where it has no kernels.

    Args:
        ubn (UBN): The layer.
    """

    def __init__(self, ubn: UBN) -> None:
        super().__init__()
        self.ubn = ubn

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer returns."""
        with mock.patch.object(dispatch, 'has_kernels', return_value=False):
            return self.ubn(x)


class _AllReduce(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, dy)


class ComposedSyncBN(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` by operators, on any device; torch's own refuses CPU tensors.

    Statistics of the batch over all ranks of the default group, by an all_reduce of the sums of
    values and of squares that gradients flow through.

    Args:
        *args: As in ``nn.BatchNorm2d``.
        **kwargs: As in ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W), and in training move the running statistics."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        sums = _AllReduce.apply(sums)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        y = x * scale[:, None, None] + shift[:, None, None]
        return y.to(input.dtype)

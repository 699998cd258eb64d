"""Norms to compare with that PyTorch lacks, or lacks on CPU, composed of its operators."""

from unittest import mock

import torch
import torch.distributed as dist
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

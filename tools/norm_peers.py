"""Norms that the benchmark compares with and PyTorch lacks, composed as they were published."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

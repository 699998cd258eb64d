"""Handwritten digits for a study of norms in classification: data set, network and accuracy.

The digits are those of scikit-learn, 1797 of 8 x 8 pixels (Alpaydin and Kaynak, Optical
Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998).
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASSES = tuple('0123456789')


@DATASETS.register_module()
class Digits(Dataset):
    """Images (1, 8, 8) of mean 0 and variance 1, and their labels.

    Args:
        start (int): Index of the first digit.
        end (int, optional): Index after the last; None for the end.
    """

    metainfo = dict(classes=CLASSES)

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()
        self.images = ((images - images.mean()) / images.std())[start:end, None]
        self.labels = torch.from_numpy(digits.target)[start:end]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(inputs=self.images[index], labels=self.labels[index])


@MODELS.register_module()
class DigitsNet(BaseModel):
    """Two residual stages of 3 x 3 convolutions with a norm each, pooled and classified.

    Args:
        norm_cfg (dict): Of the norm layers.
        channels (int): Of the first stage; the second has twice as many.
    """

    def __init__(self, norm_cfg: dict[str, Any], channels: int = 16) -> None:
        super().__init__(data_preprocessor=dict(type='BaseDataPreprocessor'))

        def conv(before: int, after: int, stride: int = 1, act: bool = True) -> ConvModule:
            act_cfg = dict(type='ReLU') if act else None
            return ConvModule(
                before, after, 3, stride, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg
            )

        self.stem = conv(1, channels)
        self.blocks = nn.ModuleList()
        self.downs = nn.ModuleList([nn.Identity(), conv(channels, 2 * channels, stride=2)])
        for width in (channels, 2 * channels):
            self.blocks.append(nn.Sequential(conv(width, width), conv(width, width, act=False)))
        self.head = nn.Linear(2 * channels, len(CLASSES))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> Any:
        """Return logits (N, 10), or the loss, or a list of a prediction for every digit."""
        x = self.stem(inputs)
        for down, block in zip(self.downs, self.blocks):
            x = down(x)
            x = F.relu(x + block(x))
        logits = self.head(x.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        if mode == 'predict':
            correct = logits.argmax(1) == labels
            return [dict(correct=bool(c)) for c in correct]
        return logits


@METRICS.register_module()
class DigitsAccuracy(BaseMetric):
    """Share of digits that are classified right, as ``digits/accuracy``."""

    default_prefix = 'digits'

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, bool]]) -> None:
        """Take the predictions of a batch."""
        self.results.extend(sample['correct'] for sample in data_samples)

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        """Return the share of correct ones."""
        return dict(accuracy=sum(results) / len(results))

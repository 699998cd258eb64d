"""Studies of norms in classification that take minutes on a core: data sets, network, accuracy."""

import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@DATASETS.register_module()
class Digits(Dataset):
    """Images (1, 8, 8) of mean 0 and variance 1, and their labels.

    The digits are those of scikit-learn, 1797 of 8 x 8 pixels (Alpaydin and Kaynak, Optical
    Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998).

    Args:
        start (int): Index of the first digit.
        end (int, optional): Index after the last; None for the end.
    """

    metainfo = dict(classes=tuple('0123456789'))

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()
        self.images = ((images - images.mean()) / images.std())[start:end, None]
        self.labels = torch.from_numpy(digits.target)[start:end]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(inputs=self.images[index], labels=self.labels[index])


@DATASETS.register_module()
class CIFAR10(Dataset):
    """RGB images (3, 32, 32) of 8 bits, and their labels.

    CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), from a tar
    archive of ``SPLIT/CLASS/NUMBER.jpg``. The classes take turns, so that every part of a split
    has equally many images of each. Decoded images are kept in ``cache_dir``.

    Args:
        archive (str): The archive, compressed in any way that Python reads.
        split (str): 'train' or 'test'.
        start (int): Index of the first image.
        end (int, optional): Index after the last; None for the end.
        augment (bool): Whether images are padded by 4, cropped to 32 x 32 and flipped at random.
        data_root (str): Folder that ``archive`` is relative to.
        cache_dir (str): Folder of the decoded images.

    Raises:
        FileNotFoundError: The archive is not there.
        ValueError: It has no such split, or something in it is no image of 32 x 32.
    """

    metainfo = dict(
        classes=(
            *('airplane', 'automobile', 'bird', 'cat', 'deer'),
            *('dog', 'frog', 'horse', 'ship', 'truck'),
        )
    )
    padding = 4

    def __init__(
        self,
        archive: str,
        split: str,
        start: int = 0,
        end: int | None = None,
        augment: bool = False,
        data_root: str = '',
        cache_dir: str = 'work_dirs/cache',
    ) -> None:
        path = Path(data_root, archive)
        if not path.is_file():
            raise FileNotFoundError(
                f'no CIFAR-10 archive {path}: it has to hold train/CLASS/NUMBER.jpg and '
                'test/CLASS/NUMBER.jpg; name its folder with data_root'
            )
        stat = path.stat()
        cache = Path(cache_dir, f'{path.name}-{stat.st_size}-{stat.st_mtime_ns}.npz')
        if not cache.exists():
            _decode(path, cache, self.metainfo['classes'])
        with np.load(cache) as arrays:
            if f'{split}_labels' not in arrays:
                raise ValueError(f'split: {path} has no images {split}/CLASS/NUMBER.jpg')
            images, self.labels = (
                arrays[f'{split}_{name}'][start:end] for name in ('images', 'labels')
            )
        self.augment = augment
        if augment:
            p = self.padding
            images = np.pad(images, ((0, 0), (0, 0), (p, p), (p, p)))
        self.images = images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.augment:
            # NumPy's random numbers, as in mmcv's transforms: models draw PyTorch's.
            y, x = np.random.randint(2 * self.padding + 1, size=2)
            image = image[:, y : y + 32, x : x + 32]
            if np.random.randint(2):
                image = image[..., ::-1]
            image = np.ascontiguousarray(image)
        return dict(inputs=torch.from_numpy(image), labels=int(self.labels[index]))


def _decode(archive: Path, cache: Path, classes: tuple[str, ...]) -> None:
    """Write the images of all splits (N, 3, 32, 32) and their labels to ``cache``."""
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.fullmatch(r'(?:\./)?(\w+)/(\w+)/(\d+)\.jpg', member.name)
            if not match or match[2] not in classes:
                continue
            data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            if image is None or image.shape != (32, 32, 3):
                raise ValueError(f'{archive}: {member.name} is no image of 32 x 32')
            key = int(match[3]), classes.index(match[2])
            found.setdefault(match[1], {})[key] = image[..., ::-1].transpose(2, 0, 1)
    arrays = {}
    for split, images in found.items():
        keys = sorted(images)
        arrays[f'{split}_images'] = np.stack([images[key] for key in keys])
        arrays[f'{split}_labels'] = np.array([label for _, label in keys])
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may be the first one; each writes a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as part:
        try:
            np.savez(part, **arrays)
            part.close()
            os.replace(part.name, cache)
        except BaseException:
            os.remove(part.name)
            raise


@MODELS.register_module()
class SmallResNet(BaseModel):
    """Residual stages of a block of two 3 x 3 convolutions each, pooled and classified.

    A norm follows every convolution: the stem, two a stage, and one between stages that halves
    the side.

    Args:
        norm_cfg (dict): Of the norm layers.
        in_channels (int): Of the images.
        channels (Sequence[int]): Of the stages.
        num_classes (int): Number of logits.
        data_preprocessor (dict, optional): Of images and labels.
    """

    def __init__(
        self,
        norm_cfg: dict[str, Any],
        in_channels: int,
        channels: Sequence[int],
        num_classes: int = 10,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)

        def conv(before: int, after: int, stride: int = 1, act: bool = True) -> ConvModule:
            act_cfg = dict(type='ReLU') if act else None
            return ConvModule(
                before, after, 3, stride, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg
            )

        self.stem = conv(in_channels, channels[0])
        self.downs = nn.ModuleList([nn.Identity()])
        for before, after in zip(channels, channels[1:]):
            self.downs.append(conv(before, after, stride=2))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, width), conv(width, width, act=False)) for width in channels
        )
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor', **_: Any) -> Any:
        """Return logits (N, C), or the loss, or a list of a prediction for every image."""
        x = self.stem(inputs)
        for down, block in zip(self.downs, self.blocks):
            x = down(x)
            x = F.relu(x + block(x))
        logits = self.head(x.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        if mode == 'predict':
            correct = logits.argmax(1) == labels
            return [dict(correct=c) for c in correct.tolist()]
        return logits


@METRICS.register_module()
class ImageAccuracy(BaseMetric):
    """Share of images that are classified right, as ``PREFIX/accuracy``."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, bool]]) -> None:
        """Take the predictions of a batch."""
        self.results.extend(sample['correct'] for sample in data_samples)

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        """Return the share of correct ones."""
        return dict(accuracy=sum(results) / len(results))

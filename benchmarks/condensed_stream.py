"""Make streams of improper batches out of any data set, for studies of running statistics.

Consecutive frames of a video, a loader that is not shuffled or near-black images make batches that
are more condensed than the others. ``CondensedBatchSampler`` puts such batches into a loader,
``SortedDataset`` orders one, and ``BlackFrames`` is for black ones.
"""

from numbers import Real
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler


@DATA_SAMPLERS.register_module()
class CondensedBatchSampler(BatchSampler):
    """Batches of another sampler, some of which are replaced by condensed ones.

    A condensed batch repeats ``images`` images of the data set, drawn anew for each, as often as
    it takes, one after the other; what differs in it is their augmentation. All ranks have the
    same images in it. Everything depends on the seed of ``sampler`` and the number of the batch
    alone, so that resumed runs and runs of other norms see the same stream.

    The first ``num_batches`` batches are counted from the start of training, over all epochs where
    ``sampler`` has any; later ones are ordinary.

    Args:
        sampler (Sampler): With a data set and a seed, as those of mmengine and mmdet; infinite or
            not.
        batch_size (int): Of each rank.
        num_batches (int): Of the training.
        last (int, optional): The last ``last`` of these are condensed. Give this or ``fraction``.
        fraction (float, optional): Share of batches that are condensed, at random places.
        images (int): Number of images in a condensed batch.
        black (bool): Whether these are black; needs BlackFrames around the data set.
        drop_last (bool): Whether the last batch of an epoch is left out if it is smaller.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or not one of ``last`` and ``fraction`` is given.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        num_batches: int,
        last: int | None = None,
        fraction: float | None = None,
        images: int = 1,
        black: bool = False,
        drop_last: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        for name in ('dataset', 'seed'):
            if not hasattr(sampler, name):
                raise TypeError(f'sampler must have a {name}, got a {type(sampler).__name__}')
        if (last is None) == (fraction is None):
            raise ValueError(f'give last or fraction, got last={last} and fraction={fraction}')
        size = len(sampler.dataset)
        _check_count('num_batches', num_batches, 1, None)
        _check_count('images', images, 1, min(batch_size, size))
        if black and not isinstance(sampler.dataset, BlackFrames):
            raise TypeError(
                f'black needs a data set in BlackFrames, got a {type(sampler.dataset).__name__}'
            )
        if last is not None:
            _check_count('last', last, 0, num_batches)
            condensed = range(num_batches - last, num_batches)
        else:
            if isinstance(fraction, bool) or not isinstance(fraction, Real):
                raise TypeError(f'fraction must be a number, got {fraction!r}')
            if not 0 <= fraction <= 1:
                raise ValueError(f'fraction must lie in [0, 1], got {fraction}')
            order = np.random.default_rng(sampler.seed).permutation(num_batches)
            condensed = order[: round(fraction * num_batches)].tolist()
        self.condensed = frozenset(condensed)
        self.images = images
        self.black = black

    def __iter__(self):
        # Infinite samplers have no epoch.
        first = getattr(self.sampler, 'epoch', 0) * len(self)
        for number, batch in enumerate(super().__iter__(), first):
            yield self._condense(number, len(batch)) if number in self.condensed else batch

    def _condense(self, number: int, batch_size: int) -> list[int]:
        size = len(self.sampler.dataset)
        generator = np.random.default_rng([self.sampler.seed, number])
        images = generator.choice(size, self.images, replace=False).tolist()
        offset = size if self.black else 0
        return [images[i % self.images] + offset for i in range(batch_size)]


def _check_count(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < low or (high is not None and value > high):
        limits = f'at least {low}' if high is None else f'from {low} to {high}'
        raise ValueError(f'{name} must be {limits}, got {value}')


class _Wrapper(Dataset):
    """A data set around another one that mmengine and mmdet can load.

    Args:
        dataset (Dataset | dict): The other one, or its config.
    """

    def __init__(self, dataset: Dataset | dict[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.metainfo = self.dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)


@DATASETS.register_module()
class BlackFrames(_Wrapper):
    """A data set with a black twin of every image, which only CondensedBatchSampler asks for.

    Image i + len(dataset) is image i with all values of its ``inputs`` 0, and the same labels.

    Args:
        dataset (Dataset | dict): Of images of 8 bits under ``inputs``, or its config.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self.dataset)
        item = self.dataset[index % size]
        if index >= size:
            item = dict(item, inputs=torch.zeros_like(item['inputs']))
        return item


@DATASETS.register_module()
class SortedDataset(_Wrapper):
    """A data set in the order of its classes or sequences, for samplers with ``shuffle=False``.

    Args:
        dataset (Dataset | dict): The data set, or its config.
        key (str): What to sort by, stably: an attribute of the data set with a value for each
            image, such as ``labels``, or an entry of ``get_data_info``, such as ``img_path``.

    Raises:
        ValueError: The data set has no such values.
    """

    def __init__(self, dataset: Dataset | dict[str, Any], key: str) -> None:
        super().__init__(dataset)
        indices = range(len(self))
        try:
            if hasattr(self.dataset, key):
                values = list(getattr(self.dataset, key))
            else:
                values = [self.dataset.get_data_info(i)[key] for i in indices]
        except (AttributeError, KeyError):
            name = type(self.dataset).__name__
            raise ValueError(f'key: {name} has no {key!r} of its images') from None
        self.order = sorted(indices, key=values.__getitem__)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Return what mmdet's samplers ask of an image."""
        return self.dataset.get_data_info(self.order[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.order[index]]

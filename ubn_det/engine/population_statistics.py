"""The statistics of all that norm layers see over many batches."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import ops
from ubn_det.layers import UBN
from ubn_det.layers.ubn import RECTIFIER_GAIN


class _Moments:
    """Count, mean and sum of squared deviations per channel, merged batch by batch in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.count = zeros.new_zeros(())
        self.mean = zeros
        self.deviation = zeros.clone()

    def add(self, x: Tensor, center_weight: Tensor | None) -> None:
        """Add a batch, unless a value of it is not finite; the host does not wait for the device.

        Args:
            x (Tensor): (N, C, *S), not empty.
            center_weight (Tensor, optional): Of UBN, (C,); None for BN.
        """
        summary = ops.describe(x, center_weight, RECTIFIER_GAIN).double()
        (mean, var), count = summary[:-3].chunk(2), x.numel() // x.shape[1]
        deviation = var * count

        # Chan's formula, with a count of 0 for a batch that is left out.
        is_finite = torch.isfinite(mean.sum() + deviation.sum())
        new = is_finite * count
        total = (self.count + new).clamp_min(1)
        delta = torch.where(is_finite, mean - self.mean, 0.0)
        self.mean += delta * (new / total)
        self.deviation += torch.where(is_finite, deviation, 0.0)
        self.deviation += delta.square() * (self.count * new / total)
        self.count += new


class PopulationStatistics:
    r"""Takes the mean and the variance of what norm layers normalize, over all batches together.

    .. math::
        \mu = \frac{1}{n} \sum_b n_b \mu_b, \quad
        var = \frac{1}{n - 1} \sum_b n_b (var_b + (\mu_b - \mu)^2), \quad n = \sum_b n_b

    n_b is the number of values per channel (samples times pixels) of a batch on one rank, mu_b and
    var_b their mean and biased variance; those of a UBN are of its centered input x' = x + w_c m.
    What a layer is called with in several calls, as the shared head of a pyramid, counts as
    several batches. A batch that is empty or has values that are not finite adds nothing.

    Source: the precise statistics of Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv
    2105.07576, section 3, here weighted by the number of values and with the n - 1 that torch's
    ``running_var`` has.

    Example:
        >>> with PopulationStatistics(layers) as statistics, torch.no_grad():
        >>>     for batch in batches:
        >>>         model(batch)
        >>> not_reached = statistics.write()

    Args:
        layers (Mapping[str, _BatchNorm]): Layers with running statistics, by any name: BN, SyncBN,
            UBN, SyncUBN. The same on all ranks.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = dict(layers)
        self._moments = {name: _Moments(layer) for name, layer in self.layers.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> 'PopulationStatistics':
        for name, layer in self.layers.items():
            moments = self._moments[name]

            @torch.no_grad()
            def add(
                layer: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Tensor],
                moments: _Moments = moments,
            ) -> None:
                x = args[0] if args else kwargs['input']
                if x.numel():
                    is_ubn = isinstance(layer, UBN)
                    moments.add(x, layer.center_weight if is_ubn else None)

            self._handles.append(layer.register_forward_pre_hook(add, with_kwargs=True))
        return self

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def write(self) -> list[str]:
        """Add up over all ranks, and set the running statistics of the layers.

        Counters and all else of a layer stay as they are.

        Returns:
            list[str]: The layers that saw fewer than two values on all ranks together, whose
            running statistics stay as they are.
        """
        if not self.layers:
            return []
        moments = self._moments.values()
        sizes = [len(m.mean) for m in moments]
        counts = torch.stack([m.count for m in moments])
        # One count for each channel, so that all layers go together.
        per_channel = torch.repeat_interleave(counts, counts.new_tensor(sizes, dtype=torch.long))
        means = torch.cat([m.mean for m in moments])
        deviations = torch.cat([m.deviation for m in moments])

        totals = torch.cat([per_channel, per_channel * means])
        all_reduce(totals)
        total, mean = totals.chunk(2)
        mean = mean / total.clamp_min(1)
        deviations = deviations + per_channel * (means - mean).square()
        all_reduce(deviations)
        var = deviations / (total - 1).clamp_min(1)

        not_reached = []
        parts = zip(self.layers.items(), *(t.split(sizes) for t in (total, mean, var)))
        for (name, layer), count, layer_mean, layer_var in parts:
            if count[0] < 2:
                not_reached.append(name)
                continue
            layer.running_mean.copy_(layer_mean)
            layer.running_var.copy_(layer_var)
        return not_reached

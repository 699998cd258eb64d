"""Unified Batch Normalization on one process."""

import numbers
import warnings
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import ops
from ubn_det.ops.dispatch import say_what_is_missing

from .loading import EXTRA_PARAMETERS, GAIN_VERSION, GATE_BUFFERS, GATE_COUNTERS, prepare

COUNTERS = ('num_batches_tracked', *GATE_COUNTERS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# More would not fit a thousand channels into memory.
_MAX_KERNEL = 999

# What the formulas take over the parameter that is learnt, for all that BN lacks. From zeros an
# optimizer like Adam, which moves every parameter by about the learning rate, would take most of a
# short training to values that matter: docs/results.md has what that costs.
RECTIFIER_GAIN = 10.0


@MODELS.register_module()
class UBN(_BatchNorm):
    r"""Unified Batch Normalization over (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).

    .. math::
        x' &= x + w_c m                                      && \text{centering} \\
        z  &= (x' - \mu) / \sqrt{var + eps}                  && \text{normalization} \\
        g  &= 2 \sigma(w_s k + b_s)                          && \text{scaling} \\
        y  &= weight \cdot g z + neighbour * (g z) + bias    && \text{affine}

    m is the mean of x over one instance channel, k the mean of z over it. mu and var are the mean
    and the biased variance of x' over the batch in training and the running ones in evaluation.
    ``weight``, ``bias``, w_c = 10 ``center_weight``, w_s = 10 ``scale_weight`` and b_s = 10
    ``scale_bias`` are (C,); neighbour = 10 ``neighbour_weight`` is a depthwise kernel. All but
    ``weight`` start at 0, so that a new UBN is BN. The 10 lets Adam move them 10 times as fast as
    the other parameters, and SGD as fast; see ``ops.reference.apply_gain``.

    A training batch is normalized by its own statistics, as in BN. Its *condensation score* s, the
    mean cosine similarity over all pairs of samples of x, decides whether it moves the running
    statistics,

    .. math:: running = (1 - momentum) \cdot running + momentum \cdot batch,

    It does unless s > ``condensation_threshold``, where there is one, or its statistics are not
    finite: then the gate is closed, and the running statistics stay as they are to the bit. The
    score is not looked at before ``warmup`` batches have moved the running statistics, nor while
    ``momentum`` is None; after ``patience`` closed batches in a row one batch is let through
    whatever its score. The decision is made on the device, without a host synchronisation.

    With 'auto' the threshold is the mean of this layer's scores + ``condensation_z`` deviations +
    ``condensation_margin``; batches that are let through move both moments, closed ones neither.
    They are averages over all batches at first, exponential ones of weight 0.05 later, and closing
    waits for ``warmup`` of these batches too. After ``patience`` closed batches in a row all are
    let through until the moments have followed the score, two batches or three.

    Special cases: BN without centering, scaling, threshold; RBN (Gao et al., CVPR 2021) with
    centering and scaling, its ``weight`` halved; BNET-k (Xu et al., arXiv 2011.14150) with
    ``affine_kernel=k`` alone. The threshold and its aim are those of Wang et al., arXiv
    2311.15993; the formulas are this project's reading of its abstract.

    Args:
        num_features (int): C.
        eps (float): Added to the variance, > 0.
        momentum (float, optional): Weight of a batch in the running statistics, in [0, 1]. None
            for their cumulative average.
        affine (bool): Whether there are ``weight`` and ``bias``.
        track_running_stats (bool): Whether there are running statistics. Without them the batch
            always normalizes itself, in evaluation too, and there is no gate.
        condensation_threshold (float | str, optional): In [-1, 1], or 'auto'; 1 keeps the score
            and closes no gate, None turns the score off. Statistics that are not finite close the
            gate in any case.
        condensation_z (float): Of 'auto': deviations of the layer's scores, >= 0.
        condensation_margin (float): Of 'auto': in [0, 2]; keeps gates open where scores hardly
            differ.
        on_condensed (str, optional): Deprecated, and without effect: 'freeze' is what every layer
            does now, 'running' was removed.
        warmup (int): Number of batches that move the running statistics before the score is looked
            at, >= 0; of 'auto' >= 2.
        patience (int): Number of closed batches in a row after which one is let through, >= 1.
        centering (bool): Whether there is ``center_weight``.
        scaling (bool): Whether there are ``scale_weight`` and ``scale_bias``.
        affine_kernel (int, optional): Size k of the neighbourhood, odd; 1 for none. UBN, UBN2d and
            SyncUBN have a k x k kernel, which takes an input of fewer dimensions as a map of
            height 1; UBN1d and UBN3d one of their dimension. Needs ``affine``. None for 3 in UBN,
            UBN2d and SyncUBN where ``affine``, else 1.
        device (torch.device, optional): Of parameters and buffers.
        dtype (torch.dtype, optional): Of parameters and running statistics, floating point.

    Attributes:
        condensation (Tensor): Score of the last training batch that had one, 0-dim.
        num_batches_tracked (Tensor): Batches that moved the running statistics.
        num_batches_condensed (Tensor): Batches whose gate was closed.
        num_batches_readmitted (Tensor): Batches let through because of ``patience``.
        consecutive_condensed (Tensor): Closed batches since the last open one; with 'auto' since
            the last one whose score was not over the threshold.
        condensation_mean (Tensor): With 'auto': mean of the scores.
        condensation_var (Tensor): With 'auto': variance of the scores.
        num_batches_scored (Tensor): With 'auto': batches that moved these two.

    Raises:
        TypeError: An argument or an input has the wrong type.
        RuntimeError: An input is not dense, or the layer is on the meta device.
        ValueError: An argument is out of range, or an input has the wrong number of dimensions or
            channels, or a single value per channel in training.
    """

    _version = GAIN_VERSION
    _abbr_ = 'bn'
    _input_dims: tuple[int, ...] = (2, 3, 4, 5)
    _kernel_dims = 2
    _default_kernel = 3

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        condensation_threshold: float | str | None = None,
        condensation_z: float = 3.0,
        condensation_margin: float = 0.03,
        on_condensed: str | None = None,
        warmup: int = 50,
        patience: int = 100,
        centering: bool = True,
        scaling: bool = True,
        affine_kernel: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_features = _integer('num_features', num_features, 1, 2**31 - 1)
        # float32 has to hold it.
        eps = _number('eps', eps, 0, torch.finfo(torch.float32).max)
        if eps == 0:
            raise ValueError(f'eps must be positive, got {eps}')
        if momentum is not None:
            momentum = _number('momentum', momentum, 0, 1)
        if isinstance(condensation_threshold, str):
            if condensation_threshold != 'auto':
                raise TypeError(
                    "condensation_threshold must be a number, 'auto' or None, got "
                    f'{condensation_threshold!r}'
                )
            condensation_threshold = 'auto'
        elif condensation_threshold is not None:
            condensation_threshold = _number(
                'condensation_threshold', condensation_threshold, -1, 1
            )
        # float32 has to hold it.
        condensation_z = _number(
            'condensation_z', condensation_z, 0, torch.finfo(torch.float32).max
        )
        condensation_margin = _number('condensation_margin', condensation_margin, 0, 2)
        if isinstance(on_condensed, str) and on_condensed == 'freeze':
            warnings.warn(
                "on_condensed is deprecated: leave it out, every layer does what 'freeze' did",
                FutureWarning,
                stacklevel=2,
            )
        elif on_condensed is not None:
            raise ValueError(
                f'on_condensed={on_condensed!r} was removed: a batch is always normalized by its '
                'own statistics, and a closed gate leaves the running ones as they are. Leave '
                'the argument out'
            )
        warmup = _integer('warmup', warmup, 0)
        if condensation_threshold == 'auto' and warmup < 2:
            raise ValueError(
                f"warmup={warmup} is too short for condensation_threshold='auto': a deviation of "
                'scores takes two batches at least. Set warmup=2 or more; 50 makes it steady'
            )
        patience = _integer('patience', patience, 1)
        for name, value in dict(
            affine=affine,
            track_running_stats=track_running_stats,
            centering=centering,
            scaling=scaling,
        ).items():
            if not isinstance(value, bool):
                raise TypeError(f'{name} must be True or False, got {value!r}')
        if affine_kernel is None:
            affine_kernel = self._default_kernel if affine else 1
        affine_kernel = _integer('affine_kernel', affine_kernel, 1, _MAX_KERNEL)
        if affine_kernel % 2 == 0:
            raise ValueError(f'affine_kernel must be odd, got {affine_kernel}')
        if affine_kernel > 1 and not affine:
            raise ValueError(f'affine_kernel={affine_kernel} needs affine=True')
        if device is not None and not isinstance(device, (torch.device, str, int)):
            raise TypeError(f'device must be a torch.device, got {device!r}')
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
            raise TypeError(f'dtype must be one of {DTYPES}, got {dtype!r}')

        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.condensation_threshold = condensation_threshold
        self.condensation_z = condensation_z
        self.condensation_margin = condensation_margin
        self.warmup = warmup
        self.patience = patience
        self.centering = centering
        self.scaling = scaling
        self.affine_kernel = affine_kernel

        per_channel = (num_features,)
        shapes: dict[str, tuple[int, ...] | None] = dict(
            center_weight=per_channel if centering else None,
            scale_weight=per_channel if scaling else None,
            scale_bias=per_channel if scaling else None,
            neighbour_weight=(
                (num_features, 1) + (affine_kernel,) * self._kernel_dims
                if affine_kernel > 1
                else None
            ),
        )
        for name, shape in shapes.items():
            parameter = None
            if shape is not None:
                parameter = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        for name in GATE_BUFFERS:
            buffer = None
            if track_running_stats:
                kind = torch.long if name in GATE_COUNTERS else torch.float32
                buffer = torch.zeros((), device=device, dtype=kind)
            self.register_buffer(name, buffer)
        say_what_is_missing()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, and in training move the running statistics if the gate is open.

        Args:
            input (Tensor): (N, C, *S), float16, bfloat16, float32 or float64, in any memory
                format. May be empty: nothing moves then.

        Returns:
            Tensor: Shape, type and memory format of ``input``.
        """
        self._check_input(input)
        parameters = ops.Parameters(*(getattr(self, name) for name in ops.Parameters._fields))
        is_tracking = self.training and self.running_mean is not None
        if not self.training and self.running_mean is not None:
            statistics = self.running_mean, self.running_var
            return ops.evaluate(input, *statistics, parameters, self.eps, RECTIFIER_GAIN)

        is_scored = is_tracking and self.condensation_threshold is not None
        y, summary = ops.train(
            input, parameters, self.eps, RECTIFIER_GAIN, is_scored, self._group_name()
        )
        if is_tracking:
            ops.update(self._buffers_of_gate(), summary, self._rule())
        return y

    @torch.no_grad()
    def threshold(self) -> Tensor | float | None:
        """Return what the score of the next batch is held against, once warm-up is over.

        Returns:
            Tensor | float | None: A Tensor, on the layer's device, with 'auto'; None where there
            is no threshold.
        """
        if self.condensation_threshold is None or self.running_mean is None:
            return None
        return ops.threshold(self._buffers_of_gate(), self._rule())

    def _buffers_of_gate(self) -> ops.Buffers:
        return ops.Buffers(*(getattr(self, name) for name in ops.Buffers._fields))

    def _rule(self) -> ops.Rule:
        threshold, z = self.condensation_threshold, None
        if threshold == 'auto':
            threshold, z = self.condensation_margin, self.condensation_z
        return ops.Rule(self.momentum, threshold, self.warmup, self.patience, z)

    def _group_name(self) -> str | None:
        """Return the name of the process group that shares the statistics, '' for all ranks."""
        return None

    def _check_input(self, input: Tensor) -> None:
        name = type(self).__name__
        # What fx traces goes on, into the branch below.
        if not isinstance(input, (Tensor, Proxy)):
            raise TypeError(f'{name} expects a Tensor as input, got {type(input).__name__}')
        dim = input.dim()
        # A Python branch on purpose: a symbolic trace, which would bake in the training mode,
        # fails here.
        if dim not in self._input_dims:
            expected = ', '.join(f'{d}-D' for d in self._input_dims)
            raise ValueError(f'{name} expects {expected} input (N, C, ...), got {dim}-D input')
        if input.layout is not torch.strided or input.is_nested:
            layout = 'a nested' if input.is_nested else f'a {input.layout}'
            raise RuntimeError(f'{name} expects a dense input, got {layout} one')
        if self.affine_kernel > 1 and dim - 2 > self._kernel_dims:
            raise ValueError(
                f'affine_kernel={self.affine_kernel} of {name} is a {self._kernel_dims}-d '
                f'neighbourhood, got {dim}-D input: use UBN3d, or affine_kernel=1'
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f'{name} has num_features={self.num_features}, got an input with '
                f'{input.shape[1]} channels (shape {tuple(input.shape)})'
            )
        if input.dtype not in DTYPES:
            raise TypeError(f'{name} expects a floating point input, got {input.dtype}')
        if input.is_meta:
            raise RuntimeError(f'{name} got an input on the meta device, which has no values')
        # Kernels would return what happens to be in memory.
        for tensors in (self._parameters, self._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    raise RuntimeError(
                        f'{key} of this {name} is on the meta device and has no values: load it '
                        'with assign=True, or use to_empty and reset_parameters'
                    )

    def reset_running_stats(self) -> None:
        """Set the running statistics to N(0, 1) and all counters and the score to 0."""
        super().reset_running_stats()
        self._zero(GATE_BUFFERS)

    def reset_parameters(self) -> None:
        """Set the layer to a BN that has seen nothing."""
        super().reset_parameters()
        self._zero(EXTRA_PARAMETERS)

    @torch.no_grad()
    def _zero(self, names: tuple[str, ...]) -> None:
        for name in names:
            # The base class resets before these exist.
            tensor = getattr(self, name, None)
            if tensor is not None:
                tensor.zero_()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all entries, or none of them where one is wrong: see ``loading``."""
        local_metadata = prepare(self, state_dict, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, '
            f'affine={self.affine}, track_running_stats={self.track_running_stats}, '
            f'condensation_threshold={self.condensation_threshold!r}, '
            f'condensation_z={self.condensation_z}, '
            f'condensation_margin={self.condensation_margin}, '
            f'warmup={self.warmup}, patience={self.patience}, '
            f'centering={self.centering}, scaling={self.scaling}, '
            f'affine_kernel={self.affine_kernel}'
        )


@MODELS.register_module()
class UBN1d(UBN):
    """UBN over (N, C) or (N, C, L)."""

    _input_dims = (2, 3)
    _kernel_dims = 1
    _default_kernel = 1


@MODELS.register_module()
class UBN2d(UBN):
    """UBN over (N, C, H, W)."""

    _input_dims = (4,)


@MODELS.register_module()
class UBN3d(UBN):
    """UBN over (N, C, D, H, W)."""

    _input_dims = (5,)
    _kernel_dims = 3
    _default_kernel = 1


def _integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name} must lie in [{low}, {high}], got {value}')
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name} must lie in [{low}, {high}], got {value}')
    return float(value)

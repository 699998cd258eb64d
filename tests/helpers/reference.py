"""UBN and its special cases from plain differentiable operators, for tests to compare with.

Everything here follows the formulas, in as many passes over memory as they have terms, and takes
nothing from ubn_det. Use float64 for a reference; autograd gives the reference gradients, those
that flow through the batch statistics included.

``params`` is a dict by UBN's parameter names: weight, bias, center_weight, scale_weight,
scale_bias, neighbour_weight. A name that is absent, or None, is off. All but weight and bias count
GAIN times, and what flows back to them is divided by it; ``gain=1`` is for the operators, which
take the values themselves.
"""

import itertools
import math

import torch
import torch.nn.functional as F

GAIN = 10
RECTIFIERS = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')


def gain_of(name):
    """How much a parameter counts."""
    return GAIN if name in RECTIFIERS else 1


def rectifier(params, name, gain=GAIN):
    """What a parameter stands for, None where it is off."""
    value = params.get(name)
    if value is None:
        return None
    value = value.clone()
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient / gain**2)
    return gain * value


def per_channel(t, x):
    """Reshape (C,) so that it broadcasts against (N, C, *S)."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def instance_mean(x):
    """Mean over S of (N, C, *S), as (N, C, 1, ...)."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


def center(x, params, gain=GAIN):
    """x' = x + w_c m."""
    center_weight = rectifier(params, 'center_weight', gain)
    if center_weight is None:
        return x
    return x + per_channel(center_weight, x) * instance_mean(x)


def statistics(x, params=None, gain=GAIN):
    """Mean and biased variance of x' per channel, and the number of values they are taken over.

    ``x`` may be a list of batches, of different batch and map sizes: the statistics are then those
    of all values together.
    """
    pieces = list(x) if isinstance(x, (list, tuple)) else [x]
    values = torch.cat(
        [center(p, params or {}, gain).transpose(0, 1).flatten(1) for p in pieces], 1
    )
    mean = values.mean(1)
    var = ((values - mean[:, None]) ** 2).mean(1)
    return mean, var, values.shape[1]


def neighbourhood(x, kernel):
    """Depthwise correlation with (C, 1, k, ...), zeros beyond the border: shifts and sums."""
    if x.dim() < kernel.dim():
        # A map of height 1.
        return neighbourhood(x.unsqueeze(2), kernel).squeeze(2)
    size = kernel.shape[-1]
    padded = F.pad(x, [size // 2] * (2 * (x.dim() - 2)))
    total = torch.zeros_like(x)
    for offset in itertools.product(range(size), repeat=x.dim() - 2):
        window = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[2:], strict=True))
        tap = kernel[(slice(None), 0, *offset)]
        total = total + per_channel(tap, x) * padded[(slice(None), slice(None), *window)]
    return total


def ubn(x, params, eps, mean=None, var=None, gain=GAIN):
    """UBN's output, and the statistics that normalized it.

    Training: leave ``mean`` and ``var`` out; they are the batch's, and gradient flows through
    them. Evaluation: pass the running ones.
    """
    centered = center(x, params, gain)
    if mean is None:
        mean, var, _ = statistics(x, params, gain)
    z = (centered - per_channel(mean, x)) / torch.sqrt(per_channel(var, x) + eps)
    if params.get('scale_weight') is not None:
        logit = per_channel(rectifier(params, 'scale_weight', gain), x) * instance_mean(z)
        logit = logit + per_channel(rectifier(params, 'scale_bias', gain), x)
        z = z * 2 / (1 + torch.exp(-logit))
    y = z
    if params.get('weight') is not None:
        y = per_channel(params['weight'], x) * z
    if params.get('neighbour_weight') is not None:
        y = y + neighbourhood(z, rectifier(params, 'neighbour_weight', gain))
    if params.get('bias') is not None:
        y = y + per_channel(params['bias'], x)
    return y, mean, var


def bn(x, weight, bias, eps, mean=None, var=None):
    """BN, Ioffe and Szegedy 2015, by PyTorch's own operator."""
    training = mean is None
    return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)


def rbn(x, center_weight, scale_weight, scale_bias, weight, bias, eps):
    """RBN in training, composed as Gao et al., CVPR 2021, publish it, for (N, C, H, W)."""
    x = x + per_channel(center_weight, x) * F.adaptive_avg_pool2d(x, 1)
    z = F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    factor = per_channel(scale_weight, x) * F.adaptive_avg_pool2d(z, 1)
    z = z * torch.sigmoid(factor + per_channel(scale_bias, x))
    return per_channel(weight, x) * z + per_channel(bias, x)


def bnet(x, kernel, bias, eps):
    """BNET-k in training, Xu et al., arXiv 2011.14150, for (N, C, H, W).

    BN without its affine step, then a depthwise k x k convolution with ``kernel`` (C, 1, k, k).
    """
    z = F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    return F.conv2d(z, kernel, bias, padding=kernel.shape[-1] // 2, groups=x.shape[1])


def condensation_score(x):
    """Mean cosine similarity over the pairs of samples of (N, C, *S), pair by pair.

    A sample of zeros has similarity 0 to all.
    """
    flat = x.flatten(1)
    cosines = [
        F.cosine_similarity(flat[i], flat[j], dim=0, eps=1e-30)
        for i, j in itertools.permutations(range(len(flat)), 2)
    ]
    return sum(cosines) / len(cosines)


class GateReference:
    """The running statistics and what the gate lets into them, decided in plain Python.

    ``step`` takes what a batch says of itself: :func:`statistics` and its score, None where there
    is none (fewer than two samples, or a zero-size batch). ``threshold`` is a number, None or
    'auto', which alone looks at ``z`` and ``margin``.
    """

    def __init__(
        self,
        num_features,
        momentum=0.1,
        threshold=0.6,
        warmup=50,
        patience=100,
        score=0.0,
        z=3.0,
        margin=0.03,
    ):
        self.momentum = momentum
        self.threshold = threshold
        self.warmup = warmup
        self.patience = patience
        self.z = z
        self.margin = margin
        self.running_mean = torch.zeros(num_features, dtype=torch.float64)
        self.running_var = torch.ones(num_features, dtype=torch.float64)
        self.condensation = score
        self.num_batches_tracked = 0
        self.num_batches_condensed = 0
        self.num_batches_readmitted = 0
        self.consecutive_condensed = 0
        self.condensation_mean = 0.0
        self.condensation_var = 0.0
        self.num_batches_scored = 0

    @property
    def limit(self):
        """What the score of the next batch is held against."""
        if self.threshold != 'auto':
            return self.threshold
        return self.condensation_mean + self.z * math.sqrt(self.condensation_var) + self.margin

    def step(self, mean, var, count, score=None):
        """Take in one training batch; return whether its gate is open."""
        finite = bool(torch.isfinite(mean).all() and torch.isfinite(var).all())
        condensed = scored = False
        if self.threshold is not None and score is not None and math.isfinite(score):
            scored = True
            self.condensation = float(score)
            watching = self.momentum is not None and self.num_batches_tracked >= self.warmup
            if self.threshold == 'auto':
                watching = watching and self.num_batches_scored >= self.warmup
            condensed = watching and self.condensation > self.limit
        starved = self.consecutive_condensed >= self.patience
        if not finite or (condensed and not starved):
            self.num_batches_condensed += 1
            self.consecutive_condensed += 1
            return False

        self.num_batches_readmitted += condensed
        if self.threshold != 'auto':
            self.consecutive_condensed = 0
        elif scored:
            self._follow(self.condensation)
            if not condensed:
                self.consecutive_condensed = 0
        self.num_batches_tracked += 1
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = var.detach() * (count / (count - 1))
        self.running_mean = (1 - factor) * self.running_mean + factor * mean.detach()
        self.running_var = (1 - factor) * self.running_var + factor * unbiased
        return True

    def _follow(self, score):
        """Mean and biased variance of all scores, of the last 20 or so later, by power sums."""
        self.num_batches_scored += 1
        weight = max(1 / self.num_batches_scored, 1 / 20)
        square = self.condensation_var + self.condensation_mean**2
        self.condensation_mean = (1 - weight) * self.condensation_mean + weight * score
        square = (1 - weight) * square + weight * score**2
        self.condensation_var = max(square - self.condensation_mean**2, 0.0)


def random_params(num_features, dims, kernel=1, dtype=torch.float64, gain=GAIN):
    """Return random values for all of UBN's parameters; one weight is exactly 0."""
    names = ('weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias')
    params = {name: torch.randn(num_features, dtype=dtype) for name in names}
    # As zero-initialised residual branches have it.
    params['weight'][0] = 0
    if kernel > 1:
        params['neighbour_weight'] = torch.randn(num_features, 1, *[kernel] * dims, dtype=dtype)
    return {name: p / (gain if name in RECTIFIERS else 1) for name, p in params.items()}

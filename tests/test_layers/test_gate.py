"""Tests of UBN's gate: the score, the decision, what it lets into the running statistics."""

import copy
import math

import pytest
import reference
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ubn_det import UBN, ops

SHAPE = (2, 3, 4, 6)

# float64: two orders of summation of at most some hundred terms of size 1 to 10.
CLOSE = dict(rtol=1e-10, atol=1e-10)

# The score is kept in float32.
SCORE = dict(rtol=0, atol=1e-6)

NOT_FINITE = [math.nan, math.inf, -math.inf]

configs = pytest.mark.parametrize(
    'config',
    [
        dict(centering=False, scaling=False, affine_kernel=1),
        dict(affine_kernel=1),
        dict(affine_kernel=3),
    ],
    ids=['BN', 'rectifiers', 'all'],
)


def build(**kwargs):
    """Return a layer whose gate is watched from the first batch; nothing at its initial value."""
    options = dict(condensation_threshold=0.5, warmup=0, dtype=torch.float64)
    layer = UBN(SHAPE[1], **{**options, **kwargs})
    params = reference.random_params(SHAPE[1], 2, layer.affine_kernel)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name])
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.condensation.fill_(0.25)
    return layer


def identical(num=SHAPE[0]):
    return torch.randn(SHAPE[1:]).double().expand(num, -1, -1, -1).clone()


def orthogonal(num=SHAPE[0]):
    """Return samples of which each has values of its own in one column of the map only."""
    x = torch.zeros(num, *SHAPE[1:]).double()
    for i in range(num):
        x[i, :, :, i] = torch.randn(SHAPE[1:-1])
    return x


def opposite():
    x = identical()
    x[1] = -x[1]
    return x


def spoilt(value, num=SHAPE[0]):
    """Return an orthogonal batch with one value of its last sample replaced."""
    x = orthogonal(num)
    x[-1, 1, 2, 3] = value
    return x


def counters(layer):
    return {
        'tracked': layer.num_batches_tracked.item(),
        'condensed': layer.num_batches_condensed.item(),
        'readmitted': layer.num_batches_readmitted.item(),
        'consecutive': layer.consecutive_condensed.item(),
    }


def running(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


def is_open(layer, x):
    """Forward ``x``; return whether it moved the running statistics, to the bit."""
    before, tracked = running(layer), layer.num_batches_tracked.item()
    layer(x)
    moved = [not torch.equal(a, b) for a, b in zip(running(layer), before, strict=True)]
    assert moved[0] == moved[1] == (layer.num_batches_tracked.item() == tracked + 1)
    return moved[0]


def check(layer, x):
    """Compare output and all gradients of one training call with the reference."""
    leaves = {'x': x, **dict(layer.named_parameters())}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    dy = torch.randn_like(x)
    expected, *_ = reference.ubn(leaves['x'], {**leaves, 'x': None}, layer.eps)
    gradients = torch.autograd.grad(expected, leaves.values(), dy)
    x = x.detach().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    actual = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    for name, a, b in zip(leaves, actual, gradients, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, n=name: f'{n}: {m}')


# The score


def signed(*signs):
    """Return multiples of one sample."""
    return identical(len(signs)) * torch.tensor(signs).view(-1, 1, 1, 1)


def sixty_degrees():
    x = torch.zeros(SHAPE).double()
    x[0, 0, 0, 0] = 5
    x[1, 0, 0, 0], x[1, 1, 2, 3] = 1, math.sqrt(3)
    return x


def half_alike(num):
    """Return ``num`` equal samples and as many that are orthogonal to all others."""
    x = orthogonal(2 * num)
    x[1:num] = x[0]
    return x


SCORES = {
    'identical': (identical, 1),
    'identical, 5': (lambda: identical(5), 1),
    'identical but for their length': (lambda: signed(0.1, 50), 1),
    'orthogonal': (orthogonal, 0),
    'orthogonal, 6': (lambda: orthogonal(6), 0),
    'opposite': (opposite, -1),
    'one of three opposite': (lambda: signed(1, 1, -1), -1 / 3),
    'three of six opposite': (lambda: signed(1, 2, 3, -1, -2, -3), -1 / 5),
    'sixty degrees': (sixty_degrees, 1 / 2),
    'two of four alike': (lambda: half_alike(2), 1 / 6),
    'three of six alike': (lambda: half_alike(3), 1 / 5),
    'one of three zero': (lambda: signed(1, 1, 0), 1 / 3),
    'one of six zero': (lambda: signed(1, 1, 1, 1, 1, 0), 2 / 3),
    'zeros': (lambda: torch.zeros(SHAPE).double(), 0),
    'zeros, 6': (lambda: torch.zeros(6, *SHAPE[1:]).double(), 0),
}


@pytest.mark.parametrize('batch, expected', SCORES.values(), ids=SCORES)
@pytest.mark.parametrize('threshold', [-1, 1], ids=['closed', 'open'])
def test_score_of_the_last_training_batch(batch, expected, threshold):
    layer = build(condensation_threshold=threshold)
    layer(batch())
    torch.testing.assert_close(layer.condensation, torch.tensor(float(expected)), **SCORE)


@pytest.mark.parametrize('shape', [(3, 4), (3, 4, 5), (3, 4, 2, 3), (3, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_score_of_every_kind_of_input(shape, dtype):
    x = (torch.randn(shape) + 1).to(dtype)
    layer = UBN(4, affine_kernel=1, condensation_threshold=0.6)
    layer(x)
    expected = reference.condensation_score(x.double()).float()
    torch.testing.assert_close(layer.condensation, expected, **SCORE)


def test_score_is_that_of_the_input_not_of_the_centered_input():
    layer = build()
    nn.init.constant_(layer.center_weight, 10)
    x = torch.randn(4, *SHAPE[1:]).double() + 0.2
    layer(x)
    expected = reference.condensation_score(x).float()
    torch.testing.assert_close(layer.condensation, expected, **SCORE)


def test_score_has_no_gradient():
    layer = build()
    layer(identical().requires_grad_())
    assert not layer.condensation.requires_grad
    assert layer.condensation.grad_fn is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('num', [2, 4, 5, 30])
def test_rounding_does_not_close_a_threshold_of_one(num, dtype):
    layer = UBN(3, condensation_threshold=1.0, warmup=0, dtype=dtype)
    for _ in range(20):
        layer(identical(num).to(dtype))
        assert layer.condensation <= 1
    assert layer.num_batches_condensed == 0


def test_a_score_equal_to_the_threshold_is_open():
    assert is_open(build(condensation_threshold=0), orthogonal())
    assert not is_open(build(condensation_threshold=-1e-6), orthogonal())
    assert is_open(build(condensation_threshold=-1), opposite())


@pytest.mark.parametrize(
    'kwargs, training, is_scored',
    [
        (dict(), True, True),
        (dict(condensation_threshold=None), True, False),
        (dict(), False, False),
        # No gate to look at it.
        (dict(track_running_stats=False), True, False),
        (dict(track_running_stats=False), False, False),
    ],
    ids=str,
)
def test_score_is_computed_where_a_gate_uses_it(kwargs, training, is_scored, monkeypatch):
    scored, train = [], ops.train

    def spy(*args):
        scored.append(args[4])
        return train(*args)

    monkeypatch.setattr(ops, 'train', spy)
    layer = UBN(3, **{'condensation_threshold': 0.5, **kwargs}).train(training)
    layer(identical().float())
    assert any(scored) == is_scored
    if layer.condensation is not None:
        assert bool(layer.condensation) == is_scored


@pytest.mark.parametrize('options', [dict(condensation_threshold=None), dict()])
def test_without_a_threshold_all_batches_are_open(options):
    layer = UBN(SHAPE[1], warmup=0, dtype=torch.float64, **options)
    assert is_open(layer, identical())
    assert layer.condensation == 0


# The decision


@configs
def test_open_gate(config):
    layer = build(**config)
    layer.consecutive_condensed.fill_(3)
    x = orthogonal(4)
    before = running(layer)
    check(layer, x)
    mean, var, count = reference.statistics(x, dict(layer.named_parameters()))
    for now, old, new in zip(
        running(layer), before, (mean, var * count / (count - 1)), strict=True
    ):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new, **CLOSE)
    expected = dict(tracked=1, condensed=0, readmitted=0, consecutive=0)
    assert counters(layer) == expected


@configs
def test_closed_gate(config):
    layer = build(**config)
    before = running(layer)
    # The batch's own statistics normalize it, as without a gate.
    check(layer, identical(4))
    for now, old in zip(running(layer), before, strict=True):
        assert torch.equal(now, old)
    expected = dict(tracked=0, condensed=1, readmitted=0, consecutive=1)
    assert counters(layer) == expected


def test_running_statistics_stay_to_the_bit_in_half_precision():
    layer = build(dtype=torch.bfloat16)
    x = identical().bfloat16()
    for _ in range(5):
        assert not is_open(layer, x)


def test_warmup_counts_the_batches_that_moved_the_statistics():
    layer = build(warmup=3)
    # Condensed batches count, a batch that is not finite does not, nor does an empty one.
    assert is_open(layer, identical())
    assert not is_open(layer, spoilt(math.nan))
    assert is_open(layer, orthogonal())
    assert not is_open(layer, torch.empty(0, *SHAPE[1:]).double())
    assert is_open(layer, identical())
    assert not is_open(layer, identical())
    assert is_open(layer, orthogonal())
    assert not is_open(layer, identical())


def test_warmup_is_over_for_statistics_that_were_loaded():
    bn = nn.BatchNorm2d(SHAPE[1], dtype=torch.float64)
    for _ in range(4):
        bn(orthogonal())
    layer = build(warmup=4)
    layer.load_state_dict(bn.state_dict())
    assert not is_open(layer, identical())


@pytest.mark.parametrize('patience', [1, 2, 5])
def test_starvation(patience):
    layer = build(patience=patience)
    opened = [is_open(layer, identical()) for _ in range(3 * (patience + 1))]
    assert opened == ([False] * patience + [True]) * 3
    expected = dict(tracked=3, condensed=3 * patience, readmitted=3, consecutive=0)
    assert counters(layer) == expected


def test_patience_is_for_batches_in_a_row():
    layer = build(patience=3)
    for _ in range(4):
        assert not is_open(layer, identical())
        assert not is_open(layer, identical())
        assert is_open(layer, orthogonal())
    assert counters(layer) == dict(tracked=4, condensed=8, readmitted=0, consecutive=0)


def test_an_open_batch_after_patience_is_not_readmitted():
    layer = build(patience=2)
    for batch in (identical, identical, orthogonal):
        layer(batch())
    assert counters(layer) == dict(tracked=1, condensed=2, readmitted=0, consecutive=0)


def test_starvation_lets_no_batch_in_that_is_not_finite():
    layer = build(patience=2)
    for _ in range(5):
        assert not is_open(layer, spoilt(math.nan))
    assert counters(layer) == dict(tracked=0, condensed=5, readmitted=0, consecutive=5)
    assert is_open(layer, identical())
    assert counters(layer) == dict(tracked=1, condensed=5, readmitted=1, consecutive=0)


@pytest.mark.parametrize('threshold', [0.5, -1, None])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('value', NOT_FINITE)
@pytest.mark.parametrize('num', [1, 2, 6])
def test_batch_that_is_not_finite(num, value, momentum, threshold):
    layer = build(condensation_threshold=threshold, momentum=momentum, warmup=5)
    before = running(layer)
    x = spoilt(value, num).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    # The bad value is in channel 1, and seen there.
    for t in (y, dx):
        finite = torch.isfinite(t).transpose(0, 1).flatten(1)
        assert not finite[1].any()
        assert finite[[0, 2]].all()
    for now, old in zip(running(layer), before, strict=True):
        assert torch.equal(now, old)
    assert layer.condensation == 0.25
    assert counters(layer) == dict(tracked=0, condensed=1, readmitted=0, consecutive=1)
    layer.condensation_threshold = None
    assert is_open(layer, orthogonal())
    assert all(torch.isfinite(t).all() for t in running(layer))
    assert counters(layer) == dict(tracked=1, condensed=1, readmitted=0, consecutive=0)


@pytest.mark.parametrize('value', NOT_FINITE)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_batch_that_is_not_finite(dtype, value):
    layer = build(dtype=torch.float32)
    assert not is_open(layer, spoilt(value).to(dtype))
    assert counters(layer) == dict(tracked=0, condensed=1, readmitted=0, consecutive=1)
    assert layer.condensation == 0.25


def test_variance_that_overflows_closes_the_gate():
    layer = build(dtype=torch.float32, condensation_threshold=None)
    assert not is_open(layer, orthogonal().float() * 1e25)


def test_one_sample_has_no_score():
    layer = build(condensation_threshold=-1)
    before = running(layer)
    check(layer, identical(1))
    assert not torch.equal(running(layer)[0], before[0])
    assert layer.condensation == 0.25
    assert counters(layer) == dict(tracked=1, condensed=0, readmitted=0, consecutive=0)


def test_no_threshold_while_momentum_is_none():
    layer = build(condensation_threshold=-1, momentum=None)
    for _ in range(3):
        assert is_open(layer, identical())
    assert counters(layer) == dict(tracked=3, condensed=0, readmitted=0, consecutive=0)
    layer.momentum = 0.1
    assert not is_open(layer, identical())


@pytest.mark.parametrize('batch', [identical, lambda: spoilt(math.nan)])
def test_evaluation_moves_nothing(batch):
    layer = build(patience=1).eval()
    before = copy.deepcopy(layer.state_dict())
    for _ in range(3):
        layer(batch())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('threshold', [0.5, None])
def test_a_random_course_of_batches(momentum, threshold, implementation):
    layer = build(momentum=momentum, condensation_threshold=threshold, warmup=4, patience=3)
    gate = reference.GateReference(3, momentum, threshold, warmup=4, patience=3, score=0.25)
    gate.running_mean, gate.running_var = running(layer)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    kinds = [identical, lambda: identical(5), identical, orthogonal, opposite]
    kinds += [lambda: spoilt(math.nan), lambda: spoilt(math.inf, 5), lambda: identical(1)]
    for kind in torch.randint(len(kinds), (80,)).tolist():
        x = kinds[kind]() + 0.01 * torch.randn(SHAPE[1:]).double()
        mean, var, count = reference.statistics(x, params)
        score = reference.condensation_score(x) if len(x) > 1 else None
        gate.step(mean, var, count, score)
        expected, *_ = reference.ubn(x, params, layer.eps)
        torch.testing.assert_close(layer(x), expected, equal_nan=True, **CLOSE)
        torch.testing.assert_close(running(layer), (gate.running_mean, gate.running_var), **CLOSE)
        torch.testing.assert_close(layer.condensation.item(), gate.condensation, **SCORE)
        assert counters(layer) == dict(
            tracked=gate.num_batches_tracked,
            condensed=gate.num_batches_condensed,
            readmitted=gate.num_batches_readmitted,
            consecutive=gate.consecutive_condensed,
        )
    assert gate.num_batches_tracked > 10 and gate.num_batches_condensed > 10
    assert (gate.num_batches_readmitted > 0) == (momentum is not None and threshold is not None)


# No host synchronisation

_aten = torch.ops.aten
HOST_READS = {
    *(_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default),
    *(_aten.nonzero.default, _aten.masked_select.default, _aten.allclose.default),
}


class NoHostRead(TorchDispatchMode):
    """Refuses what would make an accelerator wait for the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in HOST_READS, f'{func} waits for the device'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('read', [bool, torch.Tensor.item, torch.nonzero])
def test_host_reads_are_noticed(read):
    with pytest.raises(AssertionError, match='waits for the device'), NoHostRead():
        read(torch.ones(1))


@configs
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('num', [1, 2, 6])
def test_no_host_reads_in_training(config, momentum, num, implementation):
    layer = build(momentum=momentum, patience=1, **config)
    xs = [batch(num).requires_grad_() for batch in (orthogonal, identical, identical)]
    with NoHostRead():
        for x in xs:
            layer(x).sum().backward()
    assert all(x.grad is not None for x in xs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an accelerator')
def test_training_waits_for_no_device():
    layer = UBN(4, condensation_threshold=0.5, warmup=0, affine_kernel=3).cuda()
    x = torch.randn(3, 4, 8, 8, device='cuda', requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an accelerator')
def test_a_cuda_graph_replays_the_gate():
    torch.manual_seed(0)
    layers = [UBN(4, warmup=2, condensation_threshold=0.5).cuda() for _ in range(2)]
    x = torch.randn(3, 4, 8, 8, device='cuda', requires_grad=True)
    dy = torch.randn_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layers[0](x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers[0](x)
        (dx,) = torch.autograd.grad(y, x, dy)
    layers[1].load_state_dict(layers[0].state_dict())
    for batch in (torch.randn_like(x), torch.ones_like(x), torch.randn_like(x)):
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        leaf = batch.clone().requires_grad_()
        expected = layers[1](leaf)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, leaf, dy)[0])
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    assert layers[0].num_batches_condensed == 1


# Other ways to run a training forward


@pytest.mark.parametrize('spoil', [False, True])
def test_update_bn(spoil):
    layer = build(condensation_threshold=-1)
    layer(identical())
    assert layer.num_batches_condensed == 1
    batches = [torch.randn(3, *SHAPE[1:]).double() + i for i in range(4)]
    params = dict(layer.named_parameters())
    statistics = [reference.statistics(x, params) for x in batches]
    if spoil:
        batches.insert(2, spoilt(math.nan))
    torch.optim.swa_utils.update_bn(batches, layer)
    assert layer.momentum == 0.1
    mean = torch.stack([mean for mean, _, _ in statistics]).mean(0)
    var = torch.stack([var * n / (n - 1) for _, var, n in statistics]).mean(0)
    torch.testing.assert_close(running(layer), (mean.detach(), var.detach()), **CLOSE)
    expected = dict(tracked=4, condensed=int(spoil), readmitted=0, consecutive=0)
    assert counters(layer) == expected

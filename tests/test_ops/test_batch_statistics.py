"""The decision with Python's numbers, as on CPU, against that which waits for no device."""

import itertools
import sys

import pytest
import torch

from ubn_det import UBN
from ubn_det.ops import Buffers, Parameters, Rule, unified_batch_norm_training
from ubn_det.ops.batch_statistics import Batch

# The package's function hides the module of the same name.
module = sys.modules[Batch.__module__]

MEANS = {'finite': 0.5, 'NaN': float('nan'), 'infinite': float('inf')}
SCORES = {'low': 0.2, 'at the threshold': 0.5, 'high': 0.9, 'NaN': float('nan'), 'over 1': 1.1}
# Tracked batches and closed ones in a row.
HISTORIES = {'new': (0, 0), 'warm': (5, 0), 'closed': (5, 2), 'starved': (5, 3)}


def make_batch(mean, score, count, num_pairs, dtype):
    mean = torch.full((3,), mean, dtype=dtype)
    pair_sum = torch.tensor(score * (num_pairs if isinstance(num_pairs, int) else 2), dtype=dtype)
    return Batch(count, mean, torch.rand(3).to(dtype), pair_sum, num_pairs)


def make_buffers(history):
    tracked, consecutive = history
    counters = [torch.tensor(c) for c in (consecutive, 1, consecutive)]
    return Buffers(
        torch.randn(3), torch.rand(3), torch.tensor(tracked), torch.tensor(0.25), *counters
    )


CASES = list(
    itertools.product(
        MEANS.values(),
        SCORES.values(),
        HISTORIES.values(),
        [0.1, None],
        [0.5, None],
        [True, False],
    )
)


@pytest.mark.parametrize(
    'count, num_pairs',
    [
        (12, 2),
        (12, 0),
        *[
            (torch.tensor(float(n)), torch.tensor(float(k)))
            for n, k in [(12, 2), (12, 0), (1, 0), (0, 0)]
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_both_ways_decide_alike(count, num_pairs, dtype):
    kinds = set()
    for mean, score, history, momentum, threshold, freeze in CASES:
        batch = make_batch(mean, score, count, num_pairs, dtype)
        rule = Rule(momentum, threshold, 5, 3, freeze)
        share = torch.tensor(1 / 12, dtype=dtype)
        buffers = make_buffers(history)
        others = Buffers(*(b.clone() for b in buffers))
        on_host = module._decide_on_host(batch, share, buffers, rule)
        on_device = module._decide_on_device(batch, share, others, rule)
        # (1 - a) r + a b is rounded once more on one side.
        close = dict(rtol=2e-7, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(on_host, on_device, **close)
        torch.testing.assert_close(tuple(buffers), tuple(others), **close)
        kinds.add(int(buffers.num_batches_tracked - history[0]))
    assert kinds == ({0, 1} if count > 1 else {0})


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


def test_results_share_no_memory_with_the_buffers():
    x = torch.ones(2, 3, 4, 4)
    buffers = make_buffers(HISTORIES['warm'])
    rule = Rule(0.1, -1.0, 0, 100, False)
    _, _, statistics = unified_batch_norm_training(x, Parameters(), 1e-5, buffers, rule)
    assert statistics.share == 0
    torch.testing.assert_close(statistics.mean, buffers.running_mean, rtol=0, atol=0)
    pointers = {t.data_ptr() for t in (*statistics[:3], *buffers)}
    assert len(pointers) == 3 + len(buffers)

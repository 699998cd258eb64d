"""Say what SyncUBN costs on 8 to 4,096 ranks, from counts, measurements and a model.

Counts what the real detectors send, measures gloo's collectives and one layer on processes of this
machine, and writes both to a CSV file. From its rows a page and a picture are made beside it: the
fit of a latency-bandwidth model, and what NCCL's own cost model says of more ranks than there are
here. With --report the rows of an earlier run are used as they are.
"""

import argparse
import collections
import csv
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from benchmark_norm import (
    ROOT,
    describe_run,
    interleave,
    interleave_ranks,
    layer_calls,
    replace_norm,
    training_step,
)
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from ubn_det import UBN, SyncUBN

ALL = ROOT / 'configs/norm_comparison/mask-rcnn_r50_fpn_syncubn-all_2x_coco.py'
BACKBONE = ROOT / 'configs/ubn/mask-rcnn_r50_fpn_syncubn_1x_coco.py'
# Config and depth of the ResNet.
DETECTORS = {
    'R50, all norms': (ALL, 50),
    'R101, all norms': (ALL, 101),
    'R50, backbone': (BACKBONE, 50),
    'R101, backbone': (BACKBONE, 101),
}
MAIN = 'R50, all norms'
IMAGE = (3, 64, 96)  # counts do not depend on it
GLOO_RANKS = (2, 4, 8)
GLOO_VALUES = (131, 515, 1027, 2051, 4099, 16384, 65536)  # 2 C + 3 of the widths, and longer ones
LAYER_CHANNELS = (256, 1024)
LAYER_SIDE = 8
COLLECTIVES = ('all_gather', 'all_reduce')
# Values per rank and call; both norms reduce two gradients per channel.
VALUES: dict[str, dict[str, Callable[[int], int]]] = {
    'SyncUBN': {'all_gather': lambda c: 2 * c + 3, 'all_reduce': lambda c: 2 * c},
    'SyncBN': {'all_gather': lambda c: 2 * c + 1, 'all_reduce': lambda c: 2 * c},
}
NUM_BYTES = 4  # of a float32
COLUMNS = (
    *('date', 'commit', 'machine', 'torch', 'command'),
    *('section', 'case', 'method', 'ranks', 'channels', 'bytes'),
    *('quantity', 'low', 'value', 'high'),
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='CSV file, written anew; page and picture beside')
    parser.add_argument('--rounds', type=int, default=15, help='samples of every time')
    parser.add_argument('--report', action='store_true', help='measure nothing, read the CSV file')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error('--rounds must be at least 1')
    if args.report and not args.csv.exists():
        parser.error(f'{args.csv}: no such file')
    if not args.report:
        write_rows(args.csv, measure(args.rounds))
    rows = read_rows(args.csv)
    page, picture = args.csv.with_suffix('.md'), args.csv.with_suffix('.png')
    page.write_text(make_page(rows, picture.name))
    draw(count_widths(rows, MAIN), gathers_into_list(rows), picture)
    print(f'Wrote {page} and {picture}.')


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    origin = describe_run('cpu') | dict(
        command=shlex.join(['benchmarks/model_scaling.py', *sys.argv[1:]])
    )
    # All of them before the file is touched: a run that fails leaves the old one.
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='', extrasaction='ignore')
        writer.writeheader()
        writer.writerows({**origin, **row} for row in rows)


def read_rows(path: Path) -> list[Row]:
    with path.open(newline='') as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for name in ('ranks', 'channels', 'bytes'):
            row[name] = int(row[name]) if row[name] else None
        for name in ('low', 'value', 'high'):
            row[name] = float(row[name]) if row[name] else None
    return rows


def measure(rounds: int) -> Iterator[Row]:
    for suite in (count_suite, profile_suite, ranks_suite, combine_suite):
        print(f'{suite.__name__} ...', flush=True)
        yield from suite(rounds)


# ---------------------------------------------------------------------------------------- counts


def build_detector(name: str) -> nn.Module:
    """Build one of DETECTORS with random weights, norms in the mode that they train in."""
    init_default_scope('mmdet')
    config, depth = DETECTORS[name]
    model = Config.fromfile(config).model
    model.backbone.depth = depth
    replace_norm(model, dict(type='SyncUBN'))
    return MODELS.build(model)


def make_step(model: nn.Module) -> Callable[[], None]:
    """Return a training iteration on two small images."""
    batch = demo_mm_inputs(2, [IMAGE] * 2, num_items=[2, 2], num_classes=80, with_mask=True)
    return training_step(model, batch, torch.autocast('cpu', enabled=False))


def count_calls(model: nn.Module, step: Callable[[], Any]) -> list[tuple[int, int]]:
    """Count how often a training iteration calls every SyncUBN that trains its statistics.

    Returns:
        list[tuple[int, int]]: Channels and number of calls of every layer that is called.
    """
    calls: collections.Counter = collections.Counter()

    def count(layer: nn.Module, inputs: Any) -> None:
        if layer.training:
            calls[layer] += 1

    layers = [m for m in model.modules() if isinstance(m, SyncUBN)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return [(layer.num_features, calls[layer]) for layer in layers if calls[layer]]


def count_suite(rounds: int) -> Iterator[Row]:
    """Count layers and calls by width in every detector."""
    for name in DETECTORS:
        model = build_detector(name)
        counted = count_calls(model, make_step(model))
        for channels in sorted({c for c, _ in counted}):
            of_width = [calls for c, calls in counted if c == channels]
            what = dict(section='count', case=name, channels=channels)
            yield dict(what, quantity='layers', value=len(of_width))
            yield dict(what, quantity='calls', value=sum(of_width))


def sent(widths: dict[int, int], norm: str, collective: str) -> tuple[int, int]:
    """Return messages and bytes that a rank puts in, an iteration.

    Args:
        widths (dict[int, int]): Calls an iteration by number of channels.
        norm (str): Key of VALUES.
        collective (str): all_gather (forward) or all_reduce (backward).
    """
    values = VALUES[norm][collective]
    return sum(widths.values()), sum(n * NUM_BYTES * values(c) for c, n in widths.items())


def profile_collectives(step: Callable[[], Any]) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Profile what this rank sends.

    Returns:
        tuple[dict[str, tuple[int, int]], set[str]]: Calls and bytes by collective, and the
        operators of PyTorch that started them.
    """
    with torch.autograd.profiler.profile(use_kineto=False, record_shapes=True) as profile:
        step()
    found: dict[str, tuple[int, int]] = {}
    operators = set()
    for event in profile.function_events:
        backend, _, name = event.name.partition(':')
        if backend == 'gloo':
            calls, num_bytes = found.get(name, (0, 0))
            num_values = sum(math.prod(shape) for shape in event.input_shapes)
            found[name] = calls + 1, num_bytes + NUM_BYTES * num_values
        elif backend == 'c10d':
            operators.add(name.lstrip(':'))
    return found, operators


def profile_suite(rounds: int) -> Iterator[Row]:
    """Profile an iteration of the main detector on two processes."""
    found, operators = run_ranks(2, profile_rank)
    for collective, (calls, num_bytes) in found.items():
        what = dict(section='profile', case=MAIN, method=collective, ranks=2)
        yield dict(what, quantity='calls', value=calls)
        yield dict(what, quantity='bytes', value=num_bytes)
    yield dict(
        section='profile',
        case=MAIN,
        method='all_gather',
        quantity='outputs in a list',
        value=int('allgather_' in operators),
    )


def profile_rank() -> Any:
    torch.manual_seed(0)
    return profile_collectives(make_step(build_detector(MAIN)))


# ------------------------------------------------------------------------------------- processes


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Return what the first of ``world_size`` gloo processes returns from ``function(*args)``."""
    queue = torch.multiprocessing.get_context('spawn').SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            rank_main,
            (world_size, f'file://{folder}/store', function, args, queue),
            nprocs=world_size,
            start_method='spawn',
        )
        return queue.get()


def rank_main(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple, queue: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world_size)
    try:
        result = function(*args)
        if rank == 0:
            queue.put(result)
    finally:
        dist.destroy_process_group()


def quantiles(samples: list[float]) -> Row:
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return dict(low=low, value=median, high=high)


def ranks_suite(rounds: int) -> Iterator[Row]:
    """Time gloo's collectives and a layer by number of processes, in microseconds."""
    yield dict(section='gloo', quantity='cores', value=len(os.sched_getaffinity(0)))
    for ranks in GLOO_RANKS:
        collectives, layers = run_ranks(ranks, time_rank, rounds)
        for (name, values), samples in collectives.items():
            yield dict(
                section='gloo',
                method=name,
                ranks=ranks,
                bytes=NUM_BYTES * values,
                quantity='us',
                **quantiles(samples),
            )
        for (name, channels), samples in layers.items():
            yield dict(
                section='layer',
                method=name,
                ranks=ranks,
                channels=channels,
                quantity='us',
                **quantiles(samples),
            )


def time_rank(rounds: int) -> tuple[dict[tuple[str, int], list[float]], ...]:
    """Return the samples of the collectives and those of the layers, in microseconds."""
    # Calls in a row that are one sample; one alone would mostly time how the barrier is left.
    number = max(2, 16 // dist.get_world_size())

    def repeat(collective: Callable[..., Any], *args: Any) -> Callable[[], None]:
        def call() -> None:
            for _ in range(number):
                collective(*args)

        return call

    calls = {}
    for values in GLOO_VALUES:
        mine = torch.zeros(values)
        rows = list(torch.empty(dist.get_world_size(), values).unbind())
        calls['all_gather', values] = repeat(dist.all_gather, rows, mine)
        calls['all_reduce', values] = repeat(dist.all_reduce, mine)
    collectives = interleave_ranks(calls, rounds, 'cpu')

    calls = {}
    for channels in LAYER_CHANNELS:
        x, dy = (torch.randn(2, channels, LAYER_SIDE, LAYER_SIDE) for _ in range(2))
        norms = {'UBN': UBN(channels), 'SyncUBN': SyncUBN(channels)}
        for name, call in layer_calls(norms, x.requires_grad_(), dy, 'forward+backward').items():
            calls[name, channels] = call
    layers = interleave_ranks(calls, rounds, 'cpu')
    return (
        {key: [1e3 * ms / number for ms in samples] for key, samples in collectives.items()},
        {key: [1e3 * ms for ms in samples] for key, samples in layers.items()},
    )


def combine_suite(rounds: int) -> Iterator[Row]:
    """Time the forward with as many rows to combine as there are ranks to come.

    torch's fake process group claims any number of ranks and sends nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    channels = 256
    x = torch.randn(2, channels, LAYER_SIDE, LAYER_SIDE)
    layers = {'UBN': UBN(channels), 'SyncUBN': SyncUBN(channels)}
    for ranks in RANKS:
        dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
        try:
            calls = layer_calls(layers, x, x, 'forward')
            samples = interleave(calls, rounds, 'cpu')
        finally:
            dist.destroy_process_group()
        for name in layers:
            yield dict(
                section='combine',
                method=name,
                ranks=ranks,
                channels=channels,
                quantity='us',
                **quantiles([1e3 * ms for ms in samples[name]]),
            )


# ------------------------------------------------------------------------------------------- fit


class Point(NamedTuple):
    """A measured collective: bytes that a rank puts in, microseconds."""

    collective: str
    ranks: int
    num_bytes: float
    time: float


class Fit(NamedTuple):
    """A step of a ring takes alpha + beta * bytes; in microseconds and bytes.

    Args:
        alpha (float): Latency of a step.
        beta (float): Time of a byte.
        residual (float): Root of the mean square of (model - measured) / measured.
        worst (float): The largest of these in size.
    """

    alpha: float
    beta: float
    residual: float
    worst: float

    def __call__(self, collective: str, ranks: int, num_bytes: float) -> float:
        """Return the time of a collective."""
        steps, step_bytes = ring_steps(collective, ranks, num_bytes)
        return steps * (self.alpha + self.beta * step_bytes)


def ring_steps(collective: str, ranks: int, num_bytes: float) -> tuple[int, float]:
    """Return the number of steps that follow each other in a ring, and the bytes of one."""
    if collective == 'all_gather':
        return ranks - 1, num_bytes
    # A reduce_scatter and an all_gather of the reduced pieces.
    return 2 * (ranks - 1), num_bytes / ranks


def fit_ring(points: list[Point]) -> Fit:
    """Fit alpha and beta by least squares of the relative errors, so that no size dominates."""
    times = np.array([p.time for p in points])
    steps, step_bytes = np.array([ring_steps(*p[:3]) for p in points], dtype=float).T
    matrix = np.stack([steps, steps * step_bytes], 1) / times[:, None]
    alpha, beta = np.linalg.lstsq(matrix, np.ones(len(points)), rcond=None)[0]
    if min(alpha, beta) < 0:
        # Noise hides one of the two: the other alone.
        kept = int(alpha < 0)
        column = matrix[:, kept]
        value = column.sum() / (column @ column)
        alpha, beta = (value, 0.0) if kept == 0 else (0.0, value)
    errors = matrix @ [alpha, beta] - 1
    return Fit(
        float(alpha),
        float(beta),
        float(np.sqrt(np.mean(errors**2))),
        float(errors[np.abs(errors).argmax()]),
    )


# ------------------------------------------------------------------------------------- NCCL model

RANKS = (8, 64, 512, 4096)
NODE = 8  # GPUs
ITERATION = 0.265e6  # us, Mask R-CNN R50-FPN on 8 V100, two images a GPU
NVLINK = 235e3  # bytes a us, what NCCL lets a ring of A100 have
COPY = 5.0  # us, assumed: start of one small kernel by PyTorch
PAYS = 0.05  # of an iteration


class Network(NamedTuple):
    """What lies between nodes.

    Args:
        name (str): In words.
        bandwidth (float): Bytes a microsecond of a node.
        extra_latency (float): Microseconds of a step beyond those of NCCL's model.
    """

    name: str
    bandwidth: float
    extra_latency: float = 0.0


ETHERNET = Network('100 Gb/s Ethernet, RDMA', 12.5e3)
SOCKETS = Network('100 Gb/s Ethernet, TCP', 12.5e3, 25.0)


class Protocol(NamedTuple):
    """A row of NCCL's tables: microseconds, and the share of the bandwidth that carries data."""

    base: float
    within: float
    between: float
    share: float


# LL, LL128, Simple. The shares of LL are those between nodes; in a node NCCL says a third for
# all_gather.
RING = (
    Protocol(6.6, 0.6, 2.7, 1 / 4),
    Protocol(14.0, 1.9, 4.0, 0.92),
    Protocol(8.4, 3.4, 14.0, 1.0),
)
TREE = (
    Protocol(6.8, 0.6, 5.0, 0.92 / 3.8),
    Protocol(14.0, 1.25, 8.5, 0.92 * 120 / 128),
    Protocol(0.0, 28.0, 28.0, 0.92),
)
# A ring over several nodes posts to the network in every step; Simple does it three times.
POST = (1.0, 1.0, 3.0)


def nccl_ring(
    collective: str, ranks: int, num_bytes: float, network: Network = ETHERNET, node: int = NODE
) -> float:
    """Return microseconds of a ring, by the protocol that is fastest.

    Args:
        collective (str): all_gather or all_reduce.
        ranks (int): A multiple of ``node``, or fewer.
        num_bytes (float): Of one rank.
        network (Network): Between nodes.
        node (int): Ranks of a node.
    """
    nodes = math.ceil(ranks / node)
    steps, step_bytes = ring_steps(collective, ranks, num_bytes)
    steps_between = 0
    if nodes > 1:
        steps_between = nodes - 1 if collective == 'all_gather' else 2 * nodes
    bandwidth = NVLINK if nodes == 1 else network.bandwidth
    times = []
    for protocol, post in zip(RING, POST):
        within = protocol.within if nodes == 1 else max(protocol.within, post)
        between = protocol.between + network.extra_latency
        latency = (steps - steps_between) * within + steps_between * between
        transfer = steps * step_bytes / (bandwidth * protocol.share)
        times.append(protocol.base + latency + transfer)
    return min(times)


def nccl_tree(
    ranks: int, num_bytes: float, network: Network = ETHERNET, node: int = NODE
) -> float:
    """Return microseconds of an all_reduce up and down a tree of nodes, chains within them."""
    nodes = math.ceil(ranks / node)
    bandwidth = (NVLINK if nodes == 1 else network.bandwidth) / 2
    times = []
    for protocol in TREE:
        between = protocol.between + network.extra_latency
        hops = (ranks // nodes - 1) * protocol.within + int(math.log2(nodes)) * between
        times.append(protocol.base + 2 * hops + num_bytes / (bandwidth * protocol.share))
    return min(times)


def nccl_all_reduce(ranks: int, num_bytes: float, network: Network = ETHERNET) -> float:
    """Return microseconds of NCCL's choice."""
    ring = nccl_ring('all_reduce', ranks, num_bytes, network)
    return min(ring, nccl_tree(ranks, num_bytes, network))


def hierarchical_all_gather(ranks: int, num_bytes: float, network: Network = ETHERNET) -> float:
    """Return microseconds of gathering within nodes, combining, and gathering over nodes.

    Every GPU gathers over the nodes, so that nothing is handed back, and they share the network.
    """
    time = nccl_ring('all_gather', min(ranks, NODE), num_bytes, network)
    if ranks > NODE:
        shared = network._replace(bandwidth=network.bandwidth / NODE)
        time += nccl_ring('all_gather', ranks // NODE, num_bytes, shared, node=1)
    return time


def layer_time(
    method: str, ranks: int, channels: int, network: Network = ETHERNET, norm: str = 'SyncUBN'
) -> float:
    """Return microseconds of both collectives of one call of a norm layer.

    Args:
        method (str): Key of METHODS.
        ranks (int): Of the job.
        channels (int): Of the layer.
        network (Network): Between nodes.
        norm (str): Key of VALUES.
    """
    forward, backward = (NUM_BYTES * VALUES[norm][name](channels) for name in COLLECTIVES)
    if method == 'flat ring':
        return nccl_ring('all_gather', ranks, forward, network) + nccl_ring(
            'all_reduce', ranks, backward, network
        )
    if method == 'sub-group':
        ranks = min(ranks, NODE)
    down = nccl_all_reduce(ranks, backward, network)
    if method == 'hierarchical':
        return hierarchical_all_gather(ranks, forward, network) + down
    if method == 'moments':
        return nccl_all_reduce(ranks, forward, network) + down
    return nccl_ring('all_gather', ranks, forward, network) + down


METHODS = {
    'flat ring': 'both collectives by a ring',
    'NCCL': 'all_gather by a ring, all_reduce by a tree where that is faster',
    'hierarchical': 'all_gather in the node, then over the nodes; all_reduce as NCCL',
    'moments': 'all_reduce of the moments instead of all_gather',
    'sub-group': 'within a node of 8 only',
}


def iteration_time(
    widths: dict[int, int],
    method: str,
    ranks: int,
    network: Network = ETHERNET,
    norm: str = 'SyncUBN',
) -> float:
    """Return microseconds of all collectives of the norms, an iteration."""
    return sum(n * layer_time(method, ranks, c, network, norm) for c, n in widths.items())


def copies_time(widths: dict[int, int], ranks: int) -> float:
    """Return microseconds of the copies of an all_gather into a list, an iteration."""
    return sum(widths.values()) * ranks * COPY


def first_ranks(condition: Callable[[int], bool]) -> int | None:
    """Return the first of 8, 16, ... 4,096 ranks for which a condition holds."""
    counts = [NODE << i for i in range(10)]
    return next((ranks for ranks in counts if condition(ranks)), None)


# ------------------------------------------------------------------------------------------ page

PAGE = """# Scaling: SyncUBN on 8 to 4,096 ranks

Regenerated by one command, which counts, measures and writes the rows, this page and the picture
(`--report` writes the page from the rows that there are):

    OMP_NUM_THREADS=1 python benchmarks/model_scaling.py docs/scaling.csv

Of this page, the **counts** are read off the real detectors and held against a profiled training
iteration, and the **times of gloo** are measured on one CPU machine. Everything about GPUs is **a
model on paper: no GPU was measured**. Its figures are those by which NCCL itself chooses its
algorithms, and where none is published, assumptions that are called so.

## In short

{summary}

![Cost against ranks]({picture})

## What a rank sends

A SyncUBN that trains its statistics does one all_gather of 2 C + 3 numbers in the forward pass
(mean, sum of squared deviations, count, pair count, pair sum) and one all_reduce of 2 C in the
backward pass; `nn.SyncBatchNorm` does the same with 2 C + 1 and 2 C numbers, all float32.
Mask R-CNN with FPN, `frozen_stages=1`; *all norms* is backbone, neck and both heads
(`{all_config}`), *backbone* is
`{backbone_config}`; R101 are the same with depth 101. The box and
mask heads of Mask R-CNN work on the RoIs of all levels at once, and each level of the FPN has
norms of its own, so that every layer is called once an iteration; a head that is applied level by
level, as RetinaNet's, would call its norms five times.

{counts}

{profile}

Parameter gradients are not in these counts: DistributedDataParallel sends them anyway.

## What gloo takes here

{machine}

gloo's all_gather is a ring: p - 1 steps, each passing n bytes on in two halves, the second under
way while the first arrives (`gloo/allgather.cc` of [gloo](https://github.com/pytorch/gloo)). Its
all_reduce, as PyTorch calls it, is a ring as well: p - 1 steps that reduce and scatter, p - 1 that
gather, each of n / p bytes in at least two segments (`gloo/allreduce.cc`, `ring`). With a step
taking alpha + beta x bytes:

    all_gather   t = (p - 1) (alpha + beta n)
    all_reduce   t = 2 (p - 1) (alpha + beta n / p)

alpha and beta by least squares of the relative errors, over both collectives and {num_sizes}
sizes:

{fits}

The machine has {cores} cores. With more processes than cores a step waits until the scheduler has
let every process run, and alpha is then the scheduler's and not that of a message. So there is one
fit for each number of processes beside the one over all of them; none says anything about another
machine. Of a step of {step_bytes:,} bytes (C = 256) between two processes {latency:.0%} is alpha,
and an all_reduce, with twice the steps, took {ratio:.1f} times an all_gather (median).

{residuals}

As a check of the model on the layer itself: what SyncUBN takes more than UBN, forward and
backward, on 2 x C x {side} x {side} a rank, against the fitted times of its two collectives.

{layers}

## The model of more ranks

Nodes of {node} GPUs with NVLink (NVSwitch), one 100 Gb/s network port a node, ranks numbered node
by node. Times are those of NCCL's own cost model, of which NCCL takes the minimum over its
protocols LL, LL128 and Simple; so does this page. In microseconds, s steps of which b cross nodes:

    ring  t = base + (s - b) within + b between + bytes on the slowest link / (share x bandwidth)
          all_gather: s = p - 1, b = nodes - 1;  all_reduce: s = 2 (p - 1), b = 2 nodes
    tree  t = base + 2 ((ranks of a node - 1) within + log2(nodes) between)
          + bytes / (share x bandwidth / 2);  all_reduce only

{constants}

Sources and assumptions:

- **Latencies, steps and shares**: NVIDIA's
  [`src/graph/tuning.cc`]({nccl}),
  tables `baseLat` and `hwLat` and function `ncclTopoTuneModel`, NVLink and NET. In a ring over
  several nodes a step in a node takes at least what posting to the network takes, 1 us (3 for
  Simple). Left out are its corrections of trees at medium sizes, its limits by number of channels
  and what differs in the shares of one node; its term for the latency of the network itself is 0.
- **Bandwidth**: 235 GB/s in a node, NCCL's limit for a ring of A100 in an
  [earlier version]({nccl_old})
  of that file; 12.5 GB/s for 100 Gb/s.
- **TCP**: NCCL's 2.7 us for a step between nodes is a network with RDMA. Without it, {tcp:g} us
  more are *assumed*.
- **all_gather is a ring** in NCCL unless the switches help
  ([NCCL issue 1123](https://github.com/NVIDIA/nccl/issues/1123)). Its newer algorithm PAT takes a
  logarithmic number of steps ([arXiv 2506.20252](https://arxiv.org/abs/2506.20252)) and would help
  where it is in use; it is not modelled.
- **Iteration**: {iteration:g} s for Mask R-CNN R50-FPN with two images a GPU on 8 V100,
  [MMDetection's model zoo]({zoo}),
  *Training Speed*. A faster GPU makes every share below larger.
- **A copy** on the GPU, where PyTorch needs one for each rank: {copy:g} us, *assumed*.
- Left out: ranks that arrive late (each collective waits for the last of them, {waits} times an
  iteration for {main}), and the gradients of DistributedDataParallel on the same network.

### {main}, {network}

Milliseconds of an iteration for all norms, and share of {iteration:g} s:

{ethernet}

### The same over TCP

{sockets}

{methods}

SyncUBN against `nn.SyncBatchNorm`, NCCL's choice: {sync_bn}

## Combining p rows

The result of the all_gather has p (2 C + 3) numbers, and every rank reduces all of them: memory
and work grow with p, on every rank alike. The forward of SyncUBN less that of UBN with 256
channels, on one core of this CPU in a process group that claims p ranks and sends nothing:

{combine}

By estimate a GPU reads these bytes six times; at the 1.5 TB/s of an A100 that is
{combine_gpu:.0f} us a layer for 256 channels and 4,096 ranks, {combine_share:.1%} of an iteration
for {main}. The memory is free again when the layer has run.

{copies}

## When to send moments instead

An all_reduce of the moments sends 2 C + 3 numbers whatever p, and needs no combining. In a ring of
any backend it takes twice the steps with p-th parts: it is faster where
beta n (1 - 2 / p) > alpha, that is for long messages only. By a tree its latency grows as log p:
in the model above it is faster than the all_gather from **{moments} ranks** on (256 channels), and
the column *moments* says what that is worth.

SyncUBN gathers all the same: sums and sums of squares lose the variance of a channel with a large
mean in float32, and Chan's formula on gathered rows does not. To reduce without that loss takes
two all_reduces one after the other (the mean, then the squared deviations from it), twice the
latency and still logarithmic, or one of moments about the running mean, which all ranks share.

## Sub-groups

{subgroup}
"""

NCCL = (
    'https://github.com/NVIDIA/nccl/blob/b6475625fbcaa2c3c0e50eed2fa1255d7514d4a2/'
    'src/graph/tuning.cc'
)
NCCL_OLD = (
    'https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/'
    'src/graph/tuning.cc'
)
ZOO = (
    'https://github.com/open-mmlab/mmdetection/blob/'
    '10e91fd224d83c1a49ef6474cd36e70d0295b1aa/docs/en/model_zoo.md'
)


def count_widths(rows: list[Row], case: str) -> dict[int, int]:
    """Return calls an iteration by number of channels."""
    return {
        row['channels']: int(row['value'])
        for row in rows
        if (row['section'], row['case'], row['quantity']) == ('count', case, 'calls')
    }


def gathers_into_list(rows: list[Row]) -> bool:
    """Return whether SyncUBN hands its all_gather a list of outputs."""
    return any(row['quantity'] == 'outputs in a list' and row['value'] for row in rows)


def table(head: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    rows = [head, ['---'] * len(head), *lines]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)


def make_page(rows: list[Row], picture: str) -> str:
    """Return the page in Markdown."""
    widths = count_widths(rows, MAIN)
    in_list = gathers_into_list(rows)
    points = [
        Point(row['method'], row['ranks'], row['bytes'], row['value'])
        for row in rows
        if (row['section'], row['quantity']) == ('gloo', 'us')
    ]
    num_calls = sum(widths.values())
    row_bytes = NUM_BYTES * RANKS[-1]
    # Six readings of every row, 1.5e6 bytes a us.
    combine_gpu = 6 * row_bytes * VALUES['SyncUBN']['all_gather'](256) / 1.5e6
    combine_all = 6 * RANKS[-1] * sent(widths, 'SyncUBN', 'all_gather')[1] / 1.5e6
    two = fit_ring([point for point in points if point.ranks == 2])
    step_bytes = NUM_BYTES * VALUES['SyncUBN']['all_gather'](256)
    times = {point[:3]: point.time for point in points}
    keys = {point[1:3] for point in points}
    first = rows[0]
    return PAGE.format(
        picture=picture,
        summary=summary(widths, in_list),
        all_config=ALL.relative_to(ROOT),
        backbone_config=BACKBONE.relative_to(ROOT),
        counts=counts_table(rows),
        profile=profile_text(rows),
        machine=(
            f'{first["machine"]}, torch {first["torch"]}, commit {first["commit"]}, '
            f'{first["date"][:10]}; medians, the collectives in turn in every round.'
        ),
        num_sizes=len({point.num_bytes for point in points}),
        step_bytes=step_bytes,
        latency=two.alpha / (two.alpha + two.beta * step_bytes),
        ratio=np.median(
            [times[('all_reduce', *key)] / times[('all_gather', *key)] for key in keys]
        ),
        cores=next(int(r['value']) for r in rows if r['quantity'] == 'cores'),
        fits=fits_table(points),
        residuals=residuals_table(points),
        layers=layers_table(rows, points),
        side=LAYER_SIDE,
        node=NODE,
        constants=constants_table(),
        nccl=NCCL,
        nccl_old=NCCL_OLD,
        zoo=ZOO,
        tcp=SOCKETS.extra_latency,
        iteration=ITERATION / 1e6,
        copy=COPY,
        waits=2 * num_calls,
        main=MAIN,
        network=ETHERNET.name,
        ethernet=methods_table(widths, ETHERNET),
        sockets=methods_table(widths, SOCKETS),
        methods='\n'.join(f'- *{name}*: {text}.' for name, text in METHODS.items()),
        sync_bn=sync_bn_text(widths),
        combine=combine_table(rows),
        combine_gpu=combine_gpu,
        combine_share=combine_all / ITERATION,
        copies=copies_text(widths, in_list),
        moments=moments_ranks(256),
        subgroup=subgroup_text(widths),
    )


def counts_table(rows: list[Row]) -> str:
    lines = []
    for case in DETECTORS:
        widths = count_widths(rows, case)
        num_layers = sum(
            int(row['value'])
            for row in rows
            if (row['section'], row['case'], row['quantity']) == ('count', case, 'layers')
        )
        by_width = ', '.join(f'{n} x {c}' for c, n in widths.items())
        num_bytes = [sent(widths, norm, name)[1] for norm in VALUES for name in COLLECTIVES]
        lines.append(
            [case, num_layers, sum(widths.values()), by_width, *(f'{b:,}' for b in num_bytes)]
        )
    head = [
        *('detector', 'layers', 'calls, messages each way', 'calls x C'),
        *(f'{norm} {way}, bytes' for norm in VALUES for way in ('forward', 'backward')),
    ]
    return table(head, lines)


def profile_text(rows: list[Row]) -> str:
    """Say whether the counts are what a profiled iteration sent."""
    widths = count_widths(rows, MAIN)
    parts = []
    for collective in COLLECTIVES:
        counted = sent(widths, 'SyncUBN', collective)
        found = tuple(
            int(row['value'])
            for quantity in ('calls', 'bytes')
            for row in rows
            if (row['section'], row['method'], row['quantity'])
            == ('profile', collective, quantity)
        )
        verdict = 'as counted' if found == counted else f'**not as counted, {counted}**'
        parts.append(f'{found[0]} {collective} of {found[1]:,} bytes ({verdict})')
    return f'A profiled iteration of {MAIN} on two gloo processes sent {" and ".join(parts)}.'


def fits_table(points: list[Point]) -> str:
    groups = {str(p): [q for q in points if q.ranks == p] for p in fitted_ranks(points)}
    groups['all'] = points
    lines = []
    for name, group in groups.items():
        fit = fit_ring(group)
        lines.append(
            [
                name,
                f'{fit.alpha:.0f}',
                f'{1e3 * fit.beta:.2f}',
                f'{fit.residual:.0%}',
                f'{fit.worst:+.0%}',
            ]
        )
    head = ['processes', 'alpha, us', 'beta, ns a byte', 'residual, root mean square', 'worst']
    return table(head, lines)


def fitted_ranks(points: list[Point]) -> list[int]:
    return sorted({point.ranks for point in points})


def residuals_table(points: list[Point]) -> str:
    """Show what was measured and in brackets what the fit of its process count says."""
    fits = {p: fit_ring([q for q in points if q.ranks == p]) for p in fitted_ranks(points)}
    cells = {
        point[:3]: f'{point.time:.0f} ({fits[point.ranks](*point[:3]):.0f})' for point in points
    }
    columns = [(name, ranks) for name in COLLECTIVES for ranks in fits]
    lines = [
        [f'{size:,}', *(cells.get((name, ranks, size), '-') for name, ranks in columns)]
        for size in sorted({point.num_bytes for point in points})
    ]
    head = ['bytes a rank', *(f'{name}, {ranks}' for name, ranks in columns)]
    return 'Microseconds, in brackets those of the fit of as many processes:\n\n' + table(
        head, lines
    )


def medians(rows: list[Row], section: str) -> dict[tuple[str, int, int], float]:
    """Return the medians of a section by method, ranks and channels."""
    return {
        (row['method'], row['ranks'], row['channels']): row['value']
        for row in rows
        if row['section'] == section
    }


def layers_table(rows: list[Row], points: list[Point]) -> str:
    times = medians(rows, 'layer')
    lines = []
    for ranks in fitted_ranks(points):
        fit = fit_ring([point for point in points if point.ranks == ranks])
        for channels in sorted({channels for _, _, channels in times}):
            both = [times[name, ranks, channels] for name in ('UBN', 'SyncUBN')]
            model = sum(
                fit(name, ranks, NUM_BYTES * VALUES['SyncUBN'][name](channels))
                for name in COLLECTIVES
            )
            lines.append(
                [ranks, channels, *(f'{t:.0f}' for t in (*both, both[1] - both[0], model))]
            )
    head = ['processes', 'C', 'UBN, us', 'SyncUBN, us', 'more', 'collectives by the fit']
    return table(head, lines)


def constants_table() -> str:
    lines = [
        [
            f'{algorithm}, {name}',
            *(f'{value:g}' for value in protocol[:3]),
            f'{protocol.share:.2f}',
        ]
        for algorithm, protocols in (('ring', RING), ('tree', TREE))
        for name, protocol in zip(('LL', 'LL128', 'Simple'), protocols)
    ]
    return table(['', 'base, us', 'within, us', 'between, us', 'share'], lines)


def cost(time: float) -> str:
    """Write microseconds of an iteration as milliseconds and share."""
    return f'{time / 1e3:.1f} ({time / ITERATION:.1%})'


def methods_table(widths: dict[int, int], network: Network) -> str:
    lines = [
        [f'{ranks:,}', *(cost(iteration_time(widths, m, ranks, network)) for m in METHODS)]
        for ranks in RANKS
    ]
    return table(['ranks', *METHODS], lines)


def sync_bn_text(widths: dict[int, int]) -> str:
    parts = []
    for ranks in RANKS:
        times = [iteration_time(widths, 'NCCL', ranks, norm=norm) / 1e3 for norm in VALUES]
        parts.append(f'{times[0]:.2f} against {times[1]:.2f} ms on {ranks:,} ranks')
    return f'{", ".join(parts)}.'


def combine_table(rows: list[Row]) -> str:
    times = medians(rows, 'combine')
    lines = []
    for ranks in RANKS:
        more = times['SyncUBN', ranks, 256] - times['UBN', ranks, 256]
        sizes = [
            ranks * NUM_BYTES * VALUES['SyncUBN']['all_gather'](c) / 2**20 for c in (256, 2048)
        ]
        lines.append([f'{ranks:,}', *(f'{size:.2f}' for size in sizes), f'{more / 1e3:.2f}'])
    return table(['ranks', 'MiB, C = 256', 'MiB, C = 2048', 'ms on CPU, C = 256'], lines)


def copies_text(widths: dict[int, int], in_list: bool) -> str:
    if not in_list:
        return 'The result is gathered into one tensor, so that nothing has to be copied after it.'
    costs = ', '.join(f'{ranks:,}: {cost(copies_time(widths, ranks))}' for ranks in RANKS)
    return (
        'SyncUBN hands its all_gather a list of p outputs, for which ProcessGroupNCCL gathers '
        'into a tensor of its own and copies every row out of it: **p small kernels a layer**. At '
        f'{COPY:g} us each (assumed) that is, in ms of an iteration by ranks: {costs}. '
        '`all_gather_into_tensor`, which `nn.SyncBatchNorm` uses except on gloo, has no copies. '
        'The tables above leave them out.'
    )


def moments_ranks(channels: int) -> str:
    """Return from how many ranks on an all_reduce of the moments beats the all_gather."""
    num_bytes = NUM_BYTES * VALUES['SyncUBN']['all_gather'](channels)
    ranks = first_ranks(
        lambda p: nccl_all_reduce(p, num_bytes) < nccl_ring('all_gather', p, num_bytes)
    )
    return 'more than 4,096' if ranks is None else f'{ranks:,}'


def pays_from(widths: dict[int, int], network: Network, with_copies: bool = False) -> int | None:
    """Return from how many ranks on statistics over all of them cost more than PAYS."""

    def is_dear(ranks: int) -> bool:
        time = iteration_time(widths, 'NCCL', ranks, network)
        return time + with_copies * copies_time(widths, ranks) > PAYS * ITERATION

    return first_ranks(is_dear)


def number_of(ranks: int | None) -> str:
    return 'none up to 4,096' if ranks is None else f'{ranks:,}'


def summary(widths: dict[int, int], in_list: bool) -> str:
    """Return the main figures as a list."""
    gathers = {
        ranks: sum(
            calls * nccl_ring('all_gather', ranks, NUM_BYTES * VALUES['SyncUBN']['all_gather'](c))
            for c, calls in widths.items()
        )
        for ranks in RANKS
    }
    norms = {
        norm: {p: iteration_time(widths, 'NCCL', p, norm=norm) for p in RANKS} for norm in VALUES
    }
    shares = ', '.join(
        f'{time / ITERATION:.1%} on {p:,} GPUs ({gathers[p] / time:.0%} of it the all_gather)'
        for p, time in norms['SyncUBN'].items()
    )
    sync_bn = ', '.join(f'{time / ITERATION:.1%}' for time in norms['SyncBN'].values())
    in_node = iteration_time(widths, 'sub-group', NODE) / ITERATION
    parts = [
        f'- {MAIN}: {sum(widths.values())} messages each way an iteration, '
        f'{sent(widths, "SyncUBN", "all_gather")[1] / 1e3:.0f} kB a rank forward and '
        f'{sent(widths, "SyncUBN", "all_reduce")[1] / 1e3:.0f} kB backward.',
        f'- Share of an iteration that the collectives of SyncUBN take by the model: {shares}. '
        f'Those of `nn.SyncBatchNorm`: {sync_bn}.',
        f'- Statistics within a node take {in_node:.1%} whatever the number of ranks. Those over '
        f'all ranks take more than {PAYS:.0%} from '
        f'**{number_of(pays_from(widths, ETHERNET))} ranks** on; over TCP from '
        f'**{number_of(pays_from(widths, SOCKETS))}**.',
    ]
    if in_list:
        parts.append(
            '- SyncUBN has one small copy a rank and layer on NCCL as well, which '
            f'`nn.SyncBatchNorm` has not: {copies_time(widths, 64) / ITERATION:.1%} of an '
            f'iteration on 64 ranks. With them {PAYS:.0%} are passed from '
            f'{number_of(pays_from(widths, ETHERNET, True))} ranks on. See *Combining p rows*.'
        )
    return '\n'.join(parts)


def subgroup_text(widths: dict[int, int]) -> str:
    return (
        "Statistics over 8 GPUs with two images each are those of 16 images, MMDetection's usual "
        f'batch. By the model, collectives over all ranks reach {PAYS:.0%} of an iteration at '
        f'{number_of(pays_from(widths, ETHERNET))} ranks with RDMA and at '
        f'{number_of(pays_from(widths, SOCKETS))} over TCP. `SyncGroupHook` keeps them within '
        'blocks of ranks:\n\n'
        "    default_hooks = dict(sync_group=dict(type='SyncGroupHook', group_size=8))\n\n"
        '`configs/ubn/mask-rcnn_r50_fpn_syncubn-all-node_2x_coco.py` is a whole config. It has '
        "mmengine's SyncBuffersHook as well: running statistics and gates are then those of a "
        'block of ranks, and it averages them before evaluation and saving.'
    )


def draw(widths: dict[int, int], in_list: bool, path: Path) -> None:
    """Draw the share of an iteration against the number of ranks."""
    counts = [NODE << i for i in range(10)]
    figure, grid = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout='constrained')
    for ax, network in zip(grid, (ETHERNET, SOCKETS)):
        for method in METHODS:
            shares = [100 * iteration_time(widths, method, p, network) / ITERATION for p in counts]
            ax.plot(counts, shares, 'o-', label=method)
        if in_list:
            shares = [100 * copies_time(widths, p) / ITERATION for p in counts]
            ax.plot(counts, shares, 's--', color='grey', label='copies of the list')
        ax.axhline(100 * PAYS, color='black', linewidth=1)
        ax.set_xscale('log', base=2)
        ax.set_yscale('log')
        ax.set_xticks(counts, labels=[f'{p:,}' for p in counts], rotation=45)
        ax.set_xlabel('ranks, 8 a node')
        ax.set_title(f'{MAIN}: {network.name}, on paper')
        ax.grid(alpha=0.3)
    grid[0].set_ylabel('collectives of the norms, % of an iteration')
    grid[0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == '__main__':
    main()

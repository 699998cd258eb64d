"""What only a GPU can show of the layers; `make gpu` runs it with all else that needs one."""

import copy
import datetime
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from mmdet.testing import demo_mm_inputs
from tiny_config import load_tool
from torch import nn

from ubn_det import UBN, SyncUBN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an accelerator'),
]

DEVICE = 'cuda'
BACKEND = 'nccl'
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
HALF = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Whole planes, chunks of planes, planes of odd sides.
SHAPES = [(64, 32, 7, 7), (2, 16, 120, 168), (3, 5, 25, 42)]
STAGE_1 = dict(condensation_threshold=0.5, warmup=0)
NCCL_SECONDS = 60

layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)


def make_layer(num_features, kind=UBN, **options):
    """A layer on the device whose rectifiers are not the identity."""
    layer = kind(num_features, **options).to(DEVICE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.05)
    return layer


def make_maps(shape, layout=torch.contiguous_format, dtype=torch.float32):
    """Features that require a gradient, and a gradient."""
    x, dy = (
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    return (x + 1).requires_grad_(), dy


def run(layer, x, dy):
    """Return by name the output, all gradients and all buffers of one pass."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    found = dict(y=y.detach(), dx=x.grad, **{n: p.grad for n, p in layer.named_parameters()})
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def check(found, expected, tolerance):
    """Compare as a share of the largest value, which is what sums of many terms are known to."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        value, other = value.double().cpu(), expected[name].double().cpu()
        limit = tolerance * max(1, other.abs().max())
        torch.testing.assert_close(value, other, rtol=0, atol=limit, msg=lambda m, n=name: n + m)


@layouts
@pytest.mark.parametrize('options', [{}, STAGE_1, dict(affine_kernel=1), dict(affine_kernel=5)])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_layer_on_the_device_is_that_in_float64(shape, options, layout):
    layer = make_layer(shape[1], **options)
    twin = copy.deepcopy(layer).cpu().double()
    x, dy = make_maps(shape, layout)
    for is_training in (True, False):
        found = run(layer.train(is_training), x, dy)
        expected = run(twin.train(is_training), x.double().cpu(), dy.double().cpu())
        for name in ('y', 'dx'):
            assert found[name].is_contiguous(memory_format=layout)
        check(found, expected, 1e-4)


@layouts
@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_layer_in_half_precision_is_that_in_float64(dtype, layout):
    layer = make_layer(16)
    twin = copy.deepcopy(layer).cpu().double()
    x, dy = make_maps((2, 16, 40, 56), layout, dtype)
    with torch.autocast(DEVICE, dtype):
        found = run(layer, x, dy)
    assert found['y'].dtype == found['dx'].dtype == dtype
    assert found['neighbour_weight'].dtype == torch.float32
    expected = run(twin, x.double().cpu(), dy.double().cpu())
    check(found, expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)


@layouts
@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_layer_trains_as_bn_does_under_amp(dtype, layout):
    """A new UBN is BN: two networks that differ in nothing else take the same steps."""
    x = torch.randn(4, 3, 32, 48, device=DEVICE).contiguous(memory_format=layout)
    losses = {}
    for kind in (nn.BatchNorm2d, UBN):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        net.to(DEVICE, memory_format=layout)
        if kind is UBN:
            for extra in ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'):
                getattr(net[1], extra).requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=1000)
        found = []
        for _ in range(4):
            with torch.autocast(DEVICE, dtype):
                loss = (net(x) - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append(loss.item())
        # No step was left out.
        assert scaler.get_scale() == 1024
        assert found[-1] < found[0]
        losses[kind] = found
    assert losses[UBN] == pytest.approx(losses[nn.BatchNorm2d], rel=2e-2)


@layouts
@pytest.mark.parametrize('options', [{}, STAGE_1])
def test_cuda_graph_of_both_ways_equals_eager(options, layout):
    layer = make_layer(16, **options)
    static_x, static_dy = make_maps((3, 16, 40, 56), layout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(static_x).backward(static_dy)
    torch.cuda.current_stream().wait_stream(stream)
    static_x.grad = None
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static_x)
        y.backward(static_dy)
    eager = copy.deepcopy(layer)
    for _ in range(3):
        x, dy = make_maps(static_x.shape, layout)
        with torch.no_grad():
            static_x.copy_(x)
            static_dy.copy_(dy)
        graph.replay()
        found = dict(y=y, dx=static_x.grad, **{n: p.grad for n, p in layer.named_parameters()})
        found |= dict(layer.named_buffers())
        expected = run(eager, x, dy)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@layouts
@pytest.mark.parametrize('options', [{}, STAGE_1])
def test_layer_waits_for_no_device(options, layout):
    layer = make_layer(16, **options)
    x, dy = make_maps((3, 16, 40, 56), layout)

    def both_modes():
        for is_training in (True, False):
            layer.train(is_training)(x).backward(dy)

    # What is compiled, and memory that is taken, may wait.
    both_modes()
    torch.cuda.set_sync_debug_mode('error')
    try:
        both_modes()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@layouts
@pytest.mark.parametrize('options', [{}, STAGE_1])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_at_most_four_launches_each_way(shape, options, layout):
    layer = make_layer(shape[1], **options)
    x, dy = make_maps(shape, layout)
    layer(x).backward(dy)
    layer.zero_grad()
    x.grad = None
    with launches() as forward:
        y = layer(x)
    with launches() as backward:
        y.backward(dy)
    layer.eval()
    with launches() as evaluation, torch.no_grad():
        layer(x)
    for found, most in ((forward, 4), (backward, 4), (evaluation, 2)):
        assert 1 <= len(found) <= most


class launches(list):  # noqa: N801
    """The kernels that are launched in its context, by the names of the calls that did it."""

    def __enter__(self):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        torch.cuda.synchronize()
        self._profile.__exit__(*raised)
        # The runtime's calls and the driver's, which Triton uses.
        names = (event.name for event in self._profile.events())
        self += [name for name in names if re.match('cu(da)?Launch.*Kernel', name)]


def world_sizes():
    count = torch.cuda.device_count()
    return sorted({1, max(1, count)})


@pytest.mark.parametrize('world_size', world_sizes())
def test_nccl_ranks_equal_one_process_with_the_whole_batch(world_size, tmp_path):
    torch.multiprocessing.spawn(
        sync_rank, (world_size, f'file://{tmp_path}/store'), nprocs=world_size
    )


def sync_rank(rank, world_size, init_method):
    if DEVICE == 'cuda':
        torch.cuda.set_device(rank)
    dist.init_process_group(
        BACKEND,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=NCCL_SECONDS),
    )
    try:
        # On all ranks the same.
        torch.manual_seed(0)
        sizes = [2 + r for r in range(world_size)]
        x, dy = make_maps((sum(sizes), 8, 20, 28))
        whole = make_layer(8)
        layer = SyncUBN(8).to(DEVICE)
        layer.load_state_dict(whole.state_dict())
        if world_size == 1:
            # Which would not communicate by itself.
            layer._group_name = lambda: ''
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        found = run(layer, x[own], dy[own])
        for name, _ in layer.named_parameters():
            dist.all_reduce(found[name])
        expected = run(whole, x, dy)
        expected |= {name: expected[name][own] for name in ('y', 'dx')}
        check(found, expected, 1e-4)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_rcnn_takes_a_training_step(dtype, monkeypatch):
    benchmark = load_tool('benchmarks/benchmark_norm.py', monkeypatch)
    torch.manual_seed(0)
    model = benchmark.build_detector(norm_cfg=dict(type='UBN')).to(DEVICE)
    batch = demo_mm_inputs(2, [(3, 256, 320)] * 2, num_items=[4, 4], with_mask=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        data = model.data_preprocessor(batch, training=True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    scaler.scale(loss).backward()
    norms = [module for module in model.modules() if isinstance(module, UBN)]
    assert len(norms) == 69
    for norm in norms:
        for name, parameter in norm.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name
    # The first ones are in frozen stages.
    last = norms[-1]
    before = last.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(last.weight, before)
    assert last.num_batches_tracked == 1

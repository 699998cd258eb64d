"""Time UBN and its peers side by side, and write one row per figure to a CSV file.

Everything that is compared runs in one process, in turn and in a new order every round. A row has
the median and the 20 % and 80 % quantiles over the rounds, and the same of the ratio to the
baseline within a round. benchmarks/report_performance.py makes the table and the picture.
"""

import argparse
import collections
import contextlib
import copy
import csv
import functools
import math
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import origin
import torch
import torch.distributed as dist
import torch.multiprocessing
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from norm_peers import BNET, RBN, OnOperators
from torch import Tensor, nn

from ubn_det import UBN, SyncUBN, fuse

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/norm_comparison/mask-rcnn_r50_fpn_ubn-all_2x_coco.py'
STUDY_CONFIG = ROOT / 'benchmarks/study/mask-rcnn_r18-small-scratch_fpn_pennfudan.py'
SUITES = ('layer', 'bandwidth', 'memory', 'model', 'study', 'fused', 'growth', 'ranks')
IMAGE = (800, 1344)  # COCO's usual 800 x 1333, padded to a multiple of 32
IMAGES = 2  # a GPU, as in mmdet's schedules
PEOPLE = 3  # in an image of the study
# How often a map has to go between memory and processor: forward x is read and y written, backward
# dy and x are read and dx written.
MOVES = {'forward+backward': 5, 'evaluation': 2}
ROIS = {'bbox_head': 512, 'mask_head': 128}  # of an image, as mmdet samples them
ROI_SIDE = {'bbox_head': 7, 'mask_head': 14}
GROWTH_BASE = dict(N=4, C=64, side=56)
GROWTH = {
    'N': (2, 4, 8, 16, 32, 64, 128),
    'C': (16, 32, 64, 128, 256, 512, 1024),
    'side': (14, 28, 56, 112, 224),
}
RANKS = (1, 2, 4)
RANKS_SHAPE = (2, 256, 50, 84)
COLUMNS = (
    *('date', 'commit', 'machine', 'device', 'allocator', 'torch', 'threads', 'command'),
    *('suite', 'method', 'case', 'mode', 'dtype', 'memory_format', 'unit', 'samples'),
    *('low', 'median', 'high', 'baseline', 'ratio_low', 'ratio', 'ratio_high'),
)
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
MEMORY_FORMATS = {
    'contiguous': torch.contiguous_format,
    'channels_last': torch.channels_last,
}

# A sample of the clock lasts at least this many seconds, by calls in a row.
SAMPLE = 0.005
WARM_UP = 3
# What is composed of operators takes most of the time and has no bar: every third round does.
COMPOSED = ('RBN', 'BNET-3', 'UBN, operators')
SELDOM = 3

Calls = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='CSV file, to which rows are appended')
    parser.add_argument('--suites', nargs='+', choices=SUITES, default=SUITES)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=15, help='samples of every figure')
    parser.add_argument(
        '--scale', type=float, default=1.0, help='of the image side for the suites layer, memory'
    )
    parser.add_argument(
        '--model-scale', type=float, help='the same for the suite model; 1 on a GPU, 0.5 on CPU'
    )
    parser.add_argument('--model-rounds', type=int, default=7)
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=DTYPES,
        help='of the features, all but float32 under autocast; without float16 on CPU',
    )
    parser.add_argument(
        '--memory-formats', nargs='+', choices=MEMORY_FORMATS, default=list(MEMORY_FORMATS)
    )
    args = parser.parse_args()
    on_gpu = args.device.startswith('cuda')
    if args.dtypes is None:
        args.dtypes = list(DTYPES) if on_gpu else ['float32', 'bfloat16']
    if args.model_scale is None:
        args.model_scale = 1.0 if on_gpu else 0.5
    for name in ('rounds', 'model_rounds'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    for name in ('scale', 'model_scale'):
        if not 0 < getattr(args, name) <= 4:
            parser.error(f'--{name.replace("_", "-")} must lie in (0, 4]')
    return args


def main() -> None:
    args = parse_args()
    suites = dict(
        layer=layer_suite,
        bandwidth=bandwidth_suite,
        memory=memory_suite,
        model=model_suite,
        study=study_suite,
        fused=fused_suite,
        growth=growth_suite,
        ranks=ranks_suite,
    )
    run = describe_run(args.device)
    is_new = not args.out.exists()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open('a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for suite in args.suites:
            for row in suites[suite](args):
                row = dict(dtype='float32', memory_format='contiguous') | row
                writer.writerow({**run, 'suite': suite, **row})
                file.flush()
                print(
                    f'{suite:9} {row["case"]:24} {row["mode"]:18} {row["dtype"]:9} '
                    f'{row["memory_format"]:14} {row["method"]:16} {row["median"]:12.4f} '
                    f'{row["unit"]:6} {row["ratio"]:6.2f} x {row["baseline"]}',
                    flush=True,
                )


def describe_run(device: str) -> Row:
    """Return what all rows of a run share: what ran, where and when."""
    return dict(
        **origin.describe(device),
        device=device,
        allocator=allocator(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        command=shlex.join(['benchmarks/benchmark_norm.py', *sys.argv[1:]]),
    )


def allocator() -> str:
    """Return whether the C library was told to keep memory that is freed."""
    kept = {'MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_'} <= os.environ.keys()
    return 'kept' if kept else 'default'


# ---------------------------------------------------------------------------------------- timing


def interleave(calls: Calls, rounds: int, device: str) -> dict[str, list[float]]:
    """Time every call once a round, those named in COMPOSED in some, in a new order every round.

    Args:
        calls (dict[str, Callable]): What to time, by name; the first decides how many calls in a
            row are one sample.
        rounds (int): Number of samples.
        device (str): Where the calls run.

    Returns:
        dict[str, list[float]]: Milliseconds of one call in every round, NaN where it had no turn.
    """
    order = list(calls)
    for index in range(WARM_UP):
        for name in order:
            if not has_turn(name, index):
                continue
            seconds = seconds_of(calls[name], 1, device)
            if name == order[0]:
                number = min(100, max(1, round(SAMPLE / seconds)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    for index in range(rounds):
        generator.shuffle(order)
        for name in order:
            milliseconds = math.nan
            if has_turn(name, index):
                milliseconds = 1e3 * seconds_of(calls[name], number, device) / number
            samples[name].append(milliseconds)
    return samples


def has_turn(name: str, index: int) -> bool:
    """Whether a call is timed in this round."""
    return name not in COMPOSED or index % SELDOM == 0


def seconds_of(call: Callable[[], Any], number: int, device: str) -> float:
    """Return how long ``number`` calls take until the device has done them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def rows_of(samples: dict[str, list[float]], baseline: str, **what: Any) -> Iterator[Row]:
    """Make a row of every method's samples."""
    base = np.array(samples[baseline])
    for method, values in samples.items():
        low, median, high = np.nanquantile(values, (0.2, 0.5, 0.8))
        ratios = np.nanquantile(np.array(values) / base, (0.2, 0.5, 0.8))
        yield dict(
            what,
            method=method,
            baseline=baseline,
            samples=np.isfinite(values).sum(),
            low=low,
            median=median,
            high=high,
            ratio_low=ratios[0],
            ratio=ratios[1],
            ratio_high=ratios[2],
        )


# ---------------------------------------------------------------------------------------- layers


@functools.cache
def norm_shapes(scale: float) -> dict[tuple[int, ...], int]:
    """Read off Mask R-CNN R50-FPN what its norms are fed, without computing anything.

    Args:
        scale (float): Of the image side.

    Returns:
        dict[tuple[int, ...], int]: How many layers have an input of each shape.
    """
    with torch.device('meta'):
        model = build_detector(norm_cfg=dict(type='BN'))
        counts: collections.Counter = collections.Counter()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda module, inputs: counts.update([tuple(inputs[0].shape)])
                )
        height, width = (round(side * scale / 32) * 32 for side in IMAGE)
        model.neck(model.backbone(torch.empty(IMAGES, 3, height, width)))
        for head, num_rois in ROIS.items():
            side = ROI_SIDE[head]
            channels = getattr(model.roi_head, head).in_channels
            getattr(model.roi_head, head)(torch.empty(IMAGES * num_rois, channels, side, side))
    return dict(counts)


def build_detector(norm_cfg: dict[str, Any]) -> nn.Module:
    """Build Mask R-CNN R50-FPN with the norm in backbone, neck and heads, from random weights."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG).model
    replace_norm(cfg, norm_cfg)
    return MODELS.build(cfg).train()


def replace_norm(cfg: Any, norm_cfg: dict[str, Any]) -> None:
    """Set every norm_cfg inside a config, and take pretrained weights out of it."""
    if isinstance(cfg, (list, tuple)):
        for item in cfg:
            replace_norm(item, norm_cfg)
    elif isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'norm_cfg' and value is not None:
                cfg[key] = dict(norm_cfg, requires_grad=True)
            elif key == 'init_cfg' and isinstance(value, dict) and value['type'] == 'Pretrained':
                cfg[key] = None
            else:
                replace_norm(value, norm_cfg)


# A warm-up of 0: the score decides from the first batch on.
STAGE_1 = dict(warmup=0, condensation_threshold=0.6)


def make_layers(num_features: int, device: str, memory_format: str) -> dict[str, nn.Module]:
    """Build the baseline and all peers, with rectifiers that are not the identity."""
    layers: dict[str, nn.Module] = {'BN': nn.BatchNorm2d(num_features)}
    if device.startswith('cuda'):
        layers['SyncBN'] = nn.SyncBatchNorm(num_features)
    if num_features % 32 == 0:
        layers['GN'] = nn.GroupNorm(32, num_features)
    layers |= {
        'RBN': RBN(num_features),
        'BNET-3': BNET(num_features, 3),
        'UBN': UBN(num_features),
        'UBN, operators': OnOperators(UBN(num_features)),
        'UBN, stage 1 on': UBN(num_features, **STAGE_1),
        'UBN, kernel 1': UBN(num_features, affine_kernel=1),
        'UBN, kernel 5': UBN(num_features, affine_kernel=5),
    }
    for layer in layers.values():
        layer.to(device=device, memory_format=MEMORY_FORMATS[memory_format])
        for key, parameter in layer.named_parameters():
            kinds = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
            if key.rpartition('.')[2] in kinds:
                nn.init.normal_(parameter, std=0.01)
    return layers


def layer_calls(layers: dict[str, nn.Module], x: Tensor, dy: Tensor, mode: str) -> Calls:
    """Return one call per layer: a pass or two over one input."""

    def forward(layer: nn.Module) -> Callable[[], Any]:
        return lambda: layer(x)

    def forward_backward(layer: nn.Module) -> Callable[[], Any]:
        leaves = [x, *layer.parameters()]

        def call() -> None:
            layer(x).backward(dy)
            for leaf in leaves:
                leaf.grad = None

        return call

    def evaluate(layer: nn.Module) -> Callable[[], Any]:
        @torch.no_grad()
        def call() -> None:
            layer(x)

        return call

    make = {'forward': forward, 'forward+backward': forward_backward, 'evaluation': evaluate}[mode]
    for layer in layers.values():
        layer.train(mode != 'evaluation')
    return {name: make(layer) for name, layer in layers.items()}


def make_input(
    shape: tuple[int, ...], args: argparse.Namespace, dtype: str, memory_format: str
) -> tuple[Tensor, Tensor]:
    """Return features that require a gradient, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(shape, generator=generator)
        .to(args.device, DTYPES[dtype])
        .contiguous(memory_format=MEMORY_FORMATS[memory_format])
        for _ in range(2)
    )
    return x.requires_grad_(), dy


def layer_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time every norm on every shape that the detector feeds its norms.

    All of them in float32 on contiguous features; on others BN and UBN alone, since peers that
    are composed of operators are not what a detector would run there.
    """
    for shape in norm_shapes(args.scale):
        for dtype in args.dtypes:
            for memory_format in args.memory_formats:
                x, dy = make_input(shape, args, dtype, memory_format)
                layers = make_layers(shape[1], args.device, memory_format)
                modes: tuple[str, ...] = ('forward', 'forward+backward', 'evaluation')
                if (dtype, memory_format) != ('float32', 'contiguous'):
                    layers = {name: layers[name] for name in ('BN', 'UBN')}
                    modes = modes[1:]
                for mode in modes:
                    chosen = dict(layers)
                    if mode == 'forward':
                        # The slowest of all, and forward alone is only what a table shows.
                        del chosen['UBN, operators']
                    # Under autocast, as in a detector, parameters stay float32.
                    with torch.autocast(args.device.split(':')[0], enabled=dtype != 'float32'):
                        samples = interleave(
                            layer_calls(chosen, x, dy, mode), args.rounds, args.device
                        )
                    yield from rows_of(
                        samples,
                        'BN',
                        case='x'.join(map(str, shape)),
                        mode=mode,
                        dtype=dtype,
                        memory_format=memory_format,
                        unit='ms',
                    )


def bandwidth_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Relate what the largest maps have to move through memory to the machine's fastest copy."""
    # Not the RoIs, whose maps are small.
    shapes = [shape for shape in norm_shapes(args.scale) if shape[0] == IMAGES]
    largest = max(map(math.prod, shapes))
    for shape in (shape for shape in shapes if math.prod(shape) == largest):
        x, dy = make_input(shape, args, 'float32', 'contiguous')
        source, target = dy, torch.zeros_like(dy)
        map_bytes = x.numel() * x.element_size()
        every = make_layers(shape[1], args.device, 'contiguous')
        layers = {name: every[name] for name in ('BN', 'UBN')}
        for mode, moves in MOVES.items():
            calls = {'copy': functools.partial(target.copy_, source)}
            samples = interleave(
                calls | layer_calls(layers, x, dy, mode), args.rounds, args.device
            )
            # A copy reads and writes.
            moved = {name: (2 if name == 'copy' else moves) * map_bytes for name in samples}
            what = dict(case='x'.join(map(str, shape)), mode=mode)
            yield from rows_of({'limit': [moves * map_bytes]}, 'limit', unit='bytes', **what)
            rates = {
                name: [1e-6 * moved[name] / milliseconds for milliseconds in values]
                for name, values in samples.items()
            }
            yield from rows_of(rates, 'copy', unit='GB/s', **what)


def memory_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Count the bytes that autograd keeps for the backward pass of every norm."""
    for shape in norm_shapes(args.scale):
        x, _ = make_input(shape, args, 'float32', 'contiguous')
        layers = make_layers(shape[1], args.device, 'contiguous')
        yield from rows_of(
            {name: [kept_bytes(layer, x)] for name, layer in layers.items()},
            'BN',
            case='x'.join(map(str, shape)),
            mode='kept',
            unit='bytes',
        )


def kept_bytes(layer: nn.Module, x: Tensor) -> float:
    """Return the bytes of all storages that autograd keeps after one forward."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return float(sum(storages.values()))


# ---------------------------------------------------------------------------------------- model


def model_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time training iterations and inference of the whole detector, BN against UBN everywhere."""
    height, width = (round(side * args.model_scale / 32) * 32 for side in IMAGE)
    case = f'{IMAGES}x3x{height}x{width}'
    on_gpu = args.device.startswith('cuda')
    for dtype in args.dtypes if on_gpu else ['float32']:
        amp = torch.autocast(args.device.split(':')[0], DTYPES[dtype], dtype != 'float32')
        models = {}
        norm_cfgs = {
            'BN': dict(type='BN'),
            'UBN': dict(type='UBN'),
            'UBN, stage 1 on': dict(type='UBN', **STAGE_1),
        }
        for name, norm_cfg in norm_cfgs.items():
            torch.manual_seed(0)
            models[name] = build_detector(norm_cfg=norm_cfg).to(args.device)
        torch.manual_seed(0)
        batch = demo_mm_inputs(
            IMAGES, [(3, height, width)] * IMAGES, num_items=[8] * IMAGES, with_mask=True
        )
        calls = {name: training_step(model, batch, amp) for name, model in models.items()}
        samples = interleave(calls, args.model_rounds, args.device)
        what = dict(case=case, dtype=dtype)
        yield from rows_of(samples, 'BN', mode='training iteration', unit='ms', **what)
        if on_gpu:
            peaks = {name: [peak_bytes(call, args.device)] for name, call in calls.items()}
            yield from rows_of(peaks, 'BN', mode='training peak', unit='bytes', **what)
        calls = {name: inference(model, batch, amp) for name, model in models.items()}
        samples = interleave(calls, args.model_rounds, args.device)
        yield from rows_of(samples, 'BN', mode='inference', unit='ms', **what)


def training_step(model: nn.Module, batch: dict[str, Any], amp: Any) -> Callable[[], None]:
    """Return a training iteration that repeats the same work: weights stay as they are."""
    return repeated_step(model, batch, amp, dict(optimizer=dict(type='SGD', lr=0.0, momentum=0.9)))


def repeated_step(
    model: nn.Module, batch: dict[str, Any], amp: Any, optim_wrapper: dict[str, Any]
) -> Callable[[], None]:
    """Return a training iteration by an optimizer whose learning rate is 0."""
    wrapper = build_optim_wrapper(model, ConfigDict(optim_wrapper))

    def call() -> None:
        torch.manual_seed(0)
        model.train()
        data = model.data_preprocessor(batch, training=True)
        with amp:
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        wrapper.update_params(loss)

    return call


def inference(model: nn.Module, batch: dict[str, Any], amp: Any) -> Callable[[], None]:
    """Return one prediction for the whole batch."""

    @torch.no_grad()
    def call() -> None:
        torch.manual_seed(0)
        model.eval()
        data = model.data_preprocessor(batch, training=False)
        with amp:
            model(**data, mode='predict')

    return call


def peak_bytes(call: Callable[[], Any], device: str) -> float:
    """Return the most memory that was allocated on the GPU during a call."""
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return float(torch.cuda.max_memory_allocated(device))


def study_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time a training iteration of the study's small detector, on one thread as a study runs."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(STUDY_CONFIG)
    optim_wrapper = cfg.optim_wrapper.to_dict()
    optim_wrapper['optimizer']['lr'] = 0.0
    num_images = cfg.train_dataloader.batch_size
    width, height = cfg.scale
    batch = demo_mm_inputs(
        num_images,
        [(3, height, width)] * num_images,
        num_items=[PEOPLE] * num_images,
        with_mask=True,
    )
    for sample in batch['data_samples']:
        # The only class.
        sample.gt_instances.labels.zero_()
    calls = {}
    for name in ('BN', 'UBN'):
        model_cfg = copy.deepcopy(cfg.model)
        replace_norm(model_cfg, dict(type=name))
        torch.manual_seed(0)
        model = MODELS.build(model_cfg).to(args.device)
        calls[name] = repeated_step(model, batch, contextlib.nullcontext(), optim_wrapper)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = interleave(calls, args.rounds, args.device)
    finally:
        torch.set_num_threads(threads)
    case = f'{num_images}x3x{height}x{width}'
    yield from rows_of(samples, 'BN', mode='training iteration', unit='ms', case=case, threads=1)


# ---------------------------------------------------------------------------------------- fused


def fused_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time inference of the backbone with its norms folded into its convolutions, and not."""
    height, width = (round(side * args.model_scale / 32) * 32 for side in IMAGE)
    kinds = {
        'BN': dict(type='BN'),
        'UBN': dict(type='UBN', affine_kernel=1),
        'UBN, rectifiers on': dict(type='UBN', affine_kernel=1),
        'UBN-3': dict(type='UBN', affine_kernel=3, centering=False, scaling=False),
    }
    models = {}
    for name, norm_cfg in kinds.items():
        torch.manual_seed(0)
        model = build_detector(norm_cfg).backbone.to(args.device)
        model.eval()
        for module in model.modules():
            if name != 'UBN' and isinstance(module, UBN):
                for extra in (module.center_weight, module.neighbour_weight):
                    if extra is not None:
                        nn.init.normal_(extra, std=0.1)
        models[name] = model
    for name in ('BN', 'UBN', 'UBN-3'):
        fused = copy.deepcopy(models[name])
        if name == 'BN':
            fuse_conv_bn(fused)
        else:
            fuse(fused)
        models[f'{name}, fused'] = fused
    x = torch.randn(IMAGES, 3, height, width, device=args.device)

    def evaluate(model: nn.Module) -> Callable[[], Any]:
        @torch.no_grad()
        def call() -> None:
            model(x)

        return call

    samples = interleave(
        {name: evaluate(model) for name, model in models.items()}, args.model_rounds, args.device
    )
    yield from rows_of(
        samples,
        'BN, fused',
        case=f'backbone {IMAGES}x3x{height}x{width}',
        mode='inference',
        unit='ms',
        dtype='float32',
    )


# ---------------------------------------------------------------------------------------- growth


def growth_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time forward and backward against N, C and the side of the map, one at a time."""
    for name, values in GROWTH.items():
        for value in values:
            size = GROWTH_BASE | {name: value}
            shape = (size['N'], size['C'], size['side'], size['side'])
            x, dy = make_input(shape, args, 'float32', 'contiguous')
            layers = make_layers(shape[1], args.device, 'contiguous')
            layers = {method: layers[method] for method in ('BN', 'UBN', 'UBN, stage 1 on')}
            calls = layer_calls(layers, x, dy, 'forward+backward')
            samples = interleave(calls, args.rounds, args.device)
            yield from rows_of(samples, 'BN', case=f'{name}={value}', mode=name, unit='ms')


# ----------------------------------------------------------------------------------------- ranks


def ranks_suite(args: argparse.Namespace) -> Iterator[Row]:
    """Time SyncUBN on several processes against UBN on as many, and count what it sends."""
    for world_size in RANKS:
        if args.device.startswith('cuda') and world_size > torch.cuda.device_count():
            continue
        context = torch.multiprocessing.get_context('spawn')
        queue = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                rank_main,
                (world_size, f'file://{folder}/store', args.device, args.rounds, queue),
                nprocs=world_size,
                start_method='spawn',
            )
            samples, sent = queue.get()
        what = dict(case=f'ranks={world_size}')
        yield from rows_of(samples, 'UBN', mode='forward+backward', unit='ms', **what)
        if world_size == 1:
            continue
        for quantity, counts in sent.items():
            for mode, count in counts.items():
                yield from rows_of(
                    {'SyncUBN': [float(count)]},
                    'SyncUBN',
                    mode=mode,
                    unit=quantity,
                    **what,
                )


def rank_main(
    rank: int, world_size: int, init_method: str, device: str, rounds: int, queue: Any
) -> None:
    """Run one process of the suite ranks; the first one reports."""
    torch.set_num_threads(1)
    on_gpu = device.startswith('cuda')
    if on_gpu:
        device = f'cuda:{rank}'
        torch.cuda.set_device(rank)
    dist.init_process_group(
        'nccl' if on_gpu else 'gloo', init_method=init_method, rank=rank, world_size=world_size
    )
    try:
        x, dy = (torch.randn(RANKS_SHAPE, device=device) for _ in range(2))
        x.requires_grad_()
        channels = RANKS_SHAPE[1]
        layers = {
            'UBN': UBN(channels, **STAGE_1),
            'SyncUBN': SyncUBN(channels, **STAGE_1),
        }
        if on_gpu:
            layers['SyncBN'] = nn.SyncBatchNorm(channels)
        layers = {name: layer.to(device) for name, layer in layers.items()}
        calls = layer_calls(layers, x, dy, 'forward+backward')

        samples = interleave_ranks(calls, rounds, device)
        sent = count_collectives(layers['SyncUBN'], x, dy)
        if rank == 0:
            queue.put((samples, sent))
    finally:
        dist.destroy_process_group()


def interleave_ranks(calls: Calls, rounds: int, device: str) -> dict[str, list[float]]:
    """Time every call once a round, in the same order on all ranks, one call a sample."""
    # Ranks start together: one that is ahead would time how long it waits for the others.
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(WARM_UP + rounds):
        for name, call in calls.items():
            dist.barrier()
            seconds = seconds_of(call, 1, device)
            if step >= WARM_UP:
                samples[name].append(1e3 * seconds)
    return samples


def count_collectives(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, dict[str, int]]:
    """Count collectives and the bytes that this rank puts in, forward and backward."""
    sent: dict[str, dict[str, int]] = {'calls': {}, 'bytes': {}}
    y = None
    for mode in ('forward', 'backward'):
        with torch.autograd.profiler.profile(use_kineto=False, record_shapes=True) as profile:
            if y is None:
                y = layer(x)
            else:
                y.backward(dy)
        # What the backends call their collectives; the statistics are float32.
        events = [e for e in profile.function_events if e.name.startswith(('gloo:', 'nccl:'))]
        sent['calls'][mode] = len(events)
        sent['bytes'][mode] = sum(4 * math.prod(s) for e in events for s in e.input_shapes)
    return sent


if __name__ == '__main__':
    main()

"""What the GPU kernels ask of the compiler and the device, found out without one.

Runs test_triton_kernels.py in Triton's interpreter where there is no accelerator, compiles the
kernels ahead of time, and counts launches.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Which imports triton.
kernel_resources = pytest.importorskip('kernel_resources')
triton_kernels, Rule = kernel_resources.triton_kernels, kernel_resources.Rule
LAYOUTS = kernel_resources.LAYOUTS
layouts = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason='they run on the accelerator by themselves')
def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name('test_triton_kernels.py')
    command = [sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', '-p', 'no:cacheprovider']
    env = os.environ | {'TRITON_INTERPRET': '1'}
    done = subprocess.run([*command, file], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Something did run.
    assert ' passed' in done.stdout


def names(launches):
    """Short names of the kernels launched."""
    return [launch.kernel.__name__.strip('_').removesuffix('_kernel') for launch in launches]


def random_map(shape, layout):
    x = torch.empty(shape, device='meta', memory_format=layout)
    channels = x.new_empty(shape[1])
    parameters = (channels,) * 5 + (x.new_empty(shape[1], 1, 3, 3),)
    return x, channels, parameters, 1e-5, 10.0


@layouts
@pytest.mark.parametrize('is_scored', [False, True])
# Planes of one value, whole planes, chunks of planes; few samples and many.
@pytest.mark.parametrize(
    'shape', [(4, 3, 1, 1), (1024, 256, 7, 7), (2, 64, 400, 672), (9, 64, 400, 672)], ids=str
)
def test_at_most_four_launches_each_way(shape, is_scored, layout):
    x, channels, parameters, *given = random_map(shape, layout)
    share = counter = x.new_empty(())
    buffers = (channels, channels, *[counter] * 8)
    statistics = (channels, channels, parameters)
    with kernel_resources.recorded() as forward:
        m, summary = triton_kernels.moments(x, channels, 10.0, is_scored)
        triton_kernels.normalize(x, m, *statistics, *given)
        triton_kernels.update(buffers, summary, *Rule(0.1, 0.03, 50, 100, z=3.0))
    assert names(forward) == ['moments', 'summary', 'normalize', 'update']
    for mean in (m, None):
        with kernel_resources.recorded() as backward:
            _, sums, d_statistics, *_ = triton_kernels.reduce(x, x, mean, *statistics, *given)
            triton_kernels.input_gradient(x, x, m, *statistics, sums, d_statistics, share, *given)
        before = [] if mean is not None else ['moments']
        assert names(backward) == [*before, 'reduce', 'channel', 'input_gradient']


@layouts
def test_launches_of_an_evaluation(layout):
    for shape, expected in [
        ((2, 64, 7, 7), ['normalize']),
        ((2, 64, 400, 672), ['moments', 'normalize']),
    ]:
        x, channels, *given = random_map(shape, layout)
        with kernel_resources.recorded() as launches:
            triton_kernels.evaluate(x, channels, channels, *given)
        assert names(launches) == expected


@layouts
@pytest.mark.parametrize('size', [1, 3, 5])
@pytest.mark.parametrize(
    'shape', [(1024, 256, 7, 7), (1, 64, 400, 672), (2, 2048, 25, 42), (9, 3, 1, 9000)], ids=str
)
def test_programs_cover_every_plane_once(shape, size, layout):
    x = torch.empty(shape, device='meta', memory_format=layout)
    for tile in triton_kernels._NORMALIZE_TILES, triton_kernels._REDUCE_TILES:
        programs, sizes, constants = triton_kernels._plan(x, size, *tile[size])
        N, C, H, W = shape
        width = constants['PIXELS'] if size == 1 else W
        assert sizes['rows'] * width >= H * W
        strips = sizes['chunks'] // sizes['blocks']
        assert (strips - 1) * sizes['lines'] < sizes['rows'] <= strips * sizes['lines']
        if size > 1:
            assert (sizes['blocks'] - 1) * constants['PIXELS'] < W
            assert sizes['blocks'] * constants['PIXELS'] >= W
        groups = -(-N // sizes['samples'])
        assert programs == sizes['chunks'] * groups * -(-C // constants['CHANNELS'])
        # Not so few that most of 132 multiprocessors idle on maps of millions of values.
        if x.numel() > 4_000_000:
            assert programs * constants['num_warps'] >= 132 * 4


def variants():
    """One of each kind: all types, neighbourhoods, layouts and targets, every kernel."""
    # float32 and both layouts for all sizes; half precision differs in its loads and stores alone.
    small, large = (1024, 256, 7, 7), (2, 64, 200, 336)
    half = [torch.float16, torch.bfloat16]
    found = [
        *kernel_resources.variants([torch.float32], shapes=[large]),
        *kernel_resources.variants([torch.float32], [3], shapes=[small], targets=[90]),
        *kernel_resources.variants(half, [3], shapes=[large], targets=[90]),
    ]
    return list({asked.key: asked for asked in found}.values())


def test_kernels_compile_and_spill_next_to_nothing():
    kinds = Counter()
    for asked in variants():
        took = kernel_resources.compile_variant(asked)
        kinds[asked.source.fn.__name__, asked.target.arch] += 1
        assert took.registers <= 255
        assert took.spilled <= kernel_resources.SPILLED, (
            asked.source.fn.__name__,
            asked.constants,
            asked.target,
            took,
        )
    assert len(kinds) == 2 * 7

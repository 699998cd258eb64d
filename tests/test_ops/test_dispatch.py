"""Tests of which implementation serves what, and of what is said where kernels are missing."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import needs_kernels

from ubn_det import UBN, UBN1d, UBN3d
from ubn_det.ops import dispatch, operators, reference

ROOT = Path(__file__).parents[2]


def implementations(monkeypatch):
    """Return a list to which each call of an implementation's train or evaluate adds its name."""
    called = []
    for module in (operators, reference):
        for name in ('train', 'evaluate'):

            def spy(function, source, *args):
                called.append(source)
                return function(*args)

            source = module.__name__.split('.')[-1]
            monkeypatch.setattr(
                module, name, functools.partial(spy, getattr(module, name), source)
            )
    return called


@needs_kernels
@pytest.mark.parametrize(
    'layer, shape, expected',
    [
        *[(UBN, shape, 'operators') for shape in ((3, 4), (3, 4, 7), (3, 4, 5, 6))],
        (lambda c: UBN(c, affine_kernel=1), (2, 4, 2, 3, 4), 'operators'),
        (lambda c: UBN(c, affine_kernel=5), (3, 4, 5, 6), 'operators'),
        # Neighbourhoods of other sizes and dimensions.
        (lambda c: UBN(c, affine_kernel=7), (3, 4, 5, 6), 'reference'),
        (lambda c: UBN1d(c, affine_kernel=3), (3, 4, 7), 'reference'),
        (lambda c: UBN3d(c, affine_kernel=3), (2, 4, 2, 3, 4), 'reference'),
        (UBN3d, (2, 4, 2, 3, 4), 'operators'),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_what_kernels_serve(layer, shape, expected, training, monkeypatch):
    called = implementations(monkeypatch)
    layer(4).train(training)(torch.randn(shape))
    assert called == [expected]


@needs_kernels
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_types_that_kernels_serve(dtype, monkeypatch):
    called = implementations(monkeypatch)
    UBN(4)(torch.randn(3, 4, 5, 6).to(dtype))
    assert called == ['operators']


@needs_kernels
@pytest.mark.filterwarnings('ignore')
def test_what_is_traced_or_transformed_runs_on_operators_of_pytorch(monkeypatch):
    layer, x = UBN(4).eval(), torch.randn(2, 4, 5, 6)
    called = implementations(monkeypatch)
    torch.jit.trace(layer, x, check_trace=False)
    torch.func.grad(lambda x: layer(x).sum())(x)
    assert called == ['reference'] * 2
    program = torch.export.export(layer, (x,))
    assert not any('ubn_det' in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_kernels_of_another_device(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, '_CPU_KERNELS', 'for the CPU')
    monkeypatch.setattr(dispatch, '_GPU_KERNELS', 'for GPUs')
    assert dispatch.kernels_of(torch.empty(1, dtype=dtype)) == 'for the CPU'
    assert dispatch.kernels_of(torch.empty(1, device='meta')) is None


def run(code, **environment):
    """Run code in a process of its own; return what it prints."""
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout + result.stderr


LAYERS = """
import torch
from ubn_det import UBN
from ubn_det.ops import dispatch
for _ in range(3):
    UBN(4)(torch.randn(2, 4, 3, 3))
print('kernels:', dispatch.kernels_of(torch.empty(0)) is not None)
"""


def test_the_switch_turns_kernels_off_and_says_so_once():
    output = run(LAYERS, UBN_KERNELS='0')
    assert 'kernels: False' in output
    assert output.count("UBN runs on PyTorch's operators on CPU") == 1
    assert output.count('(UBN_KERNELS=0)') == 1


@needs_kernels
def test_nothing_is_said_where_there_are_kernels():
    output = run(LAYERS, UBN_KERNELS='1')
    assert 'kernels: True' in output
    assert 'UBN runs' not in output


def test_kernels_that_cannot_be_loaded_are_named():
    code = "import sys\nsys.modules['ubn_det.ops._cpu'] = None\n" + LAYERS
    output = run(code, UBN_KERNELS='1')
    assert 'kernels: False' in output
    assert output.count('cannot be loaded (import of ubn_det.ops._cpu') == 1


def test_layers_without_kernels():
    """What CI sees of the layer as it is where no compiler was: some of its tests, run again."""
    chosen = 'test_training or test_a_new_layer_is_bn or test_open_gate or test_closed_gate'
    subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider'),
            *('tests/test_layers/test_ubn.py', 'tests/test_layers/test_gate.py', '-k', chosen),
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'UBN_KERNELS': '0'},
        check=True,
    )


def test_memory_format():
    x = torch.randn(2, 4, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    volume = torch.randn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    for tensor, expected in (
        (x, torch.contiguous_format),
        (last, torch.channels_last),
        (last[..., 1:], torch.channels_last),
        (volume, torch.channels_last_3d),
        (x.transpose(2, 3), torch.contiguous_format),
        (x[:, :, 0].transpose(1, 2), torch.contiguous_format),
        # Both formats at once.
        (torch.randn(2, 1, 5, 6), torch.contiguous_format),
        (torch.randn(2, 4, 1, 1), torch.contiguous_format),
    ):
        assert dispatch.memory_format_of(tensor) == expected


@needs_kernels
def test_kernels_of_another_version_are_not_taken(monkeypatch):
    monkeypatch.setattr(dispatch, '_CPU_INTERFACE', 0)
    module, why = dispatch._load('_cpu')
    assert module is None
    assert 'another version' in why

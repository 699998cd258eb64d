"""Compile UBN's GPU kernels ahead of time and list what they take of the device; needs no GPU.

Compiled is what the launchers ask for, over types, neighbourhoods, layouts and shapes of maps.
One table: kernel, its constants, target, registers of a thread, bytes of a thread's that did not
fit into them (``spilled``), shared memory of a program in bytes, and its warps. Exits with 1 where
more spills than SPILLED allows.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ubn_det.ops import Rule, triton_kernels

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
SIZES = (1, 3, 5)
TARGETS = (80, 90)
# ptxas gives away a few values to fit one more program into a multiprocessor: 8 or 16 bytes, in 30
# of 1036 variants (Triton 3.7.1). None of them is read or written in an innermost loop.
SPILLED = 16
# A RoI head's, the last and the first stage of a detector's backbone, and few or no pixels.
SHAPES = (
    (1024, 256, 7, 7),
    (8, 256, 14, 14),
    (2, 2048, 25, 42),
    (2, 64, 200, 336),
    (2, 64, 400, 672),
    (9, 3, 1, 1),
)


class Launch(NamedTuple):
    """A call of a kernel.

    Args:
        kernel (JITFunction): The kernel.
        args (tuple): Its arguments.
        kwargs (dict): Those by name, and options of the compiler.
    """

    kernel: JITFunction
    args: tuple
    kwargs: dict


class Variant(NamedTuple):
    """What the compiler is asked for."""

    source: ASTSource
    options: dict
    target: GPUTarget

    @property
    def key(self) -> str:
        """The same for what compiles to the same."""
        return f'{self.source.hash()} {sorted(self.options.items())} {self.target}'

    @property
    def constants(self) -> str:
        """Types of the tensors and values of the constants, in words."""
        names = self.source.fn.arg_names
        signature = self.source.signature
        types = {t for t in signature.values() if t[0] == '*' and t not in ('*fp32', '*i64')}
        values = [
            f'{names[path[0]]}={value}'
            for path, value in self.source.constants.items()
            if names[path[0]].isupper()
        ]
        absent = [
            f'no {names[path[0]]}'
            for path, value in self.source.constants.items()
            if value is None
        ]
        return ' '.join([*(t[1:] for t in sorted(types)), *values, *absent])


class Resources(NamedTuple):
    """What a kernel takes."""

    registers: int
    spilled: int
    shared: int
    warps: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note the launches that are asked for, and make none."""
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, 'run', run):
        yield launches


def call_steps(x: Tensor, size: int) -> None:
    """Call every step on x as a training and an evaluation do; on the meta device."""
    C = x.shape[1]
    channels = x.new_empty(C, dtype=torch.float32)
    kernel = channels.new_empty(C, 1, size, size) if size > 1 else None
    parameters = (channels, channels) + (channels,) * 3 + (kernel,)
    given = channels, channels, parameters, 1e-5, 10.0
    m, _ = triton_kernels.moments(x, parameters[2], 10.0, is_scored=True)
    triton_kernels.moments(x, parameters[2], 10.0, is_scored=False)
    triton_kernels.normalize(x, m, *given)
    triton_kernels.evaluate(x, *given)
    triton_kernels.reduce(x, x, m, *given)
    m, sums, d_statistics, *_ = triton_kernels.reduce(x, x, None, *given)
    share = channels.new_empty(())
    for batch in ((d_statistics, share), (None, None)):
        triton_kernels.input_gradient(x, x, m, *given[:3], sums, *batch, *given[3:])
    counter = torch.empty((), dtype=torch.int64, device=x.device)
    buffers = (channels, channels, counter, share, *[counter] * 3, share, share, counter)
    summary = channels.new_empty(2 * C + 3)
    for momentum, threshold, z in ((0.1, 0.6, None), (0.1, 0.03, 3.0), (None, None, None)):
        triton_kernels.update(buffers, summary, *Rule(momentum, threshold, 50, 100, z))


def variant(launch: Launch, capability: int) -> Variant:
    """What a launch asks the compiler for."""
    kernel, args, kwargs = launch
    target = GPUTarget('cuda', capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return Variant(source, options.__dict__, target)


def variants(
    dtypes: Iterable[torch.dtype] = tuple(DTYPES.values()),
    sizes: Iterable[int] = SIZES,
    layouts: Iterable[torch.memory_format] = tuple(LAYOUTS.values()),
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    targets: Iterable[int] = TARGETS,
) -> list[Variant]:
    """Everything that the launchers ask for, each once."""
    with recorded() as launches:
        for dtype, shape, layout in itertools.product(dtypes, shapes, layouts):
            x = torch.empty(shape, dtype=dtype, device='meta', memory_format=layout)
            for size in sizes:
                call_steps(x, size)
    found = {}
    for launch in launches:
        for target in targets:
            asked = variant(launch, target)
            found.setdefault(asked.key, asked)
    return list(found.values())


def compile_variant(asked: Variant) -> Resources:
    """Compile down to the device's instructions, and read what they take."""
    compiled = triton.compile(asked.source, target=asked.target, options=asked.options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf'{key}:(\d+)', usage)[1]) for key in ('REG', 'STACK'))
    # No kernel has arrays of its own: whatever is on the stack was spilled.
    return Resources(registers, stack, compiled.metadata.shared, compiled.metadata.num_warps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument('--sizes', nargs='+', type=int, choices=SIZES, default=SIZES)
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument('--targets', nargs='+', type=int, default=TARGETS)
    args = parser.parse_args()
    asked_for = variants(
        [DTYPES[name] for name in args.dtypes],
        args.sizes,
        [LAYOUTS[name] for name in args.layouts],
        targets=args.targets,
    )
    print('| kernel | variant | target | registers | spilled | shared | warps |')
    print('|---|---|---|---|---|---|---|')
    is_spilling = False
    for asked in asked_for:
        took = compile_variant(asked)
        is_spilling |= took.spilled > SPILLED
        name = asked.source.fn.__name__.strip('_').removesuffix('_kernel')
        print(
            f'| {name} | {asked.constants} | sm_{asked.target.arch} | {took.registers} | '
            f'{took.spilled} | {took.shared} | {took.warps} |',
            flush=True,
        )
    sys.exit(1 if is_spilling else 0)


if __name__ == '__main__':
    main()

"""Which implementation serves which tensors."""

import functools
import importlib
import os
from types import ModuleType

import torch
from mmengine.logging import print_log
from torch import Tensor

from .reference import Parameters

# Set to 0, everything runs on PyTorch's operators.
SWITCH = 'UBN_KERNELS'

_SIZES = (1, 3, 5)


def has_kernels(x: Tensor, parameters: Parameters) -> bool:
    """Whether kernels, and not PyTorch's operators, serve these features and neighbourhood."""
    # A graph that is traced has to run without this package, and a transform of torch.func may
    # want derivatives of any kind.
    is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if is_traced or torch._C._are_functorch_transforms_active():
        return False
    neighbour_weight = parameters.neighbour_weight
    if neighbour_weight is not None and (
        neighbour_weight.dim() != 4 or neighbour_weight.shape[-1] not in _SIZES
    ):
        return False
    return kernels_of(x) is not None


def kernels_of(x: Tensor) -> ModuleType | None:
    """Return the kernels for the device and the type of ``x``, None where there are none."""
    if x.device.type == 'cpu':
        return _CPU_KERNELS
    return _GPU_KERNELS if x.is_cuda and x.dtype != torch.float64 else None


def _load(name: str) -> tuple[ModuleType | None, str]:
    """Return the module of kernels called ``name``, or None and why it cannot be loaded."""
    if os.environ.get(SWITCH) == '0':
        return None, f'{SWITCH}=0'
    try:
        return importlib.import_module(f'{__package__}.{name}'), ''
    except ImportError as error:
        return None, str(error)


# At import, since what torch.compile traces cannot load anything.
_CPU_KERNELS, _WHY_NO_CPU_KERNELS = _load('_cpu')
_GPU_KERNELS, _WHY_NO_GPU_KERNELS = (
    _load('triton_kernels') if torch.cuda.is_available() else (None, '')
)


@functools.cache
def say_what_is_missing() -> None:
    """Log once that kernels are missing, and what that costs."""
    if _WHY_NO_CPU_KERNELS:
        print_log(
            "UBN runs on PyTorch's operators on CPU, about five times slower: its kernels cannot "
            f'be loaded ({_WHY_NO_CPU_KERNELS}). With a C++ compiler, `pip install '
            '--no-build-isolation` builds them',
            logger='current',
        )
    if _WHY_NO_GPU_KERNELS:
        print_log(
            "UBN runs on PyTorch's operators on GPUs, several times slower: its kernels cannot be "
            f'loaded ({_WHY_NO_GPU_KERNELS}). They need Triton, which comes with CUDA builds of '
            'torch',
            logger='current',
        )


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return channels_last (2d or 3d) where ``x`` is stored so and only so, else contiguous."""
    if not x.is_contiguous():
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if channels_last and (
            # Strides of a dimension of one value may be any.
            x.is_contiguous(memory_format=channels_last)
            or torch._prims_common.suggest_memory_format(x) == channels_last
        ):
            return channels_last
    return torch.contiguous_format

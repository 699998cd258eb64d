"""Which implementation serves which tensors."""

import functools
import importlib
import os
from types import ModuleType

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.autograd import forward_ad

from .reference import Parameters

# Set to 0, everything runs on PyTorch's operators.
SWITCH = 'UBN_KERNELS'

_SIZES = (1, 3, 5)
# What the compiled kernels have to say of themselves: see binding.cpp.
_CPU_INTERFACE = 2


def has_kernels(x: Tensor, parameters: Parameters) -> bool:
    """Whether kernels, and not PyTorch's operators, serve these features and neighbourhood."""
    # A graph that is traced has to run without this package, and a transform of torch.func may
    # want derivatives of any kind.
    is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if is_traced or torch._C._are_functorch_transforms_active() or _is_dual():
        return False
    neighbour_weight = parameters.neighbour_weight
    if neighbour_weight is not None and (
        neighbour_weight.dim() != 4 or neighbour_weight.shape[-1] not in _SIZES
    ):
        return False
    return kernels_of(x) is not None


def _is_dual() -> bool:
    """Whether forward mode differentiates what runs, with gradients enabled or not."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


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
        module = importlib.import_module(f'{__package__}.{name}')
    except ImportError as error:
        return None, str(error)
    if name == '_cpu' and getattr(module, 'INTERFACE', 1) != _CPU_INTERFACE:
        return None, 'they were built from another version of ubn_det'
    return module, ''


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

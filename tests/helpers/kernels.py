"""Marks tests of what only the kernels do, which may be switched off, or not built."""

import pytest
import torch

from ubn_det.ops import dispatch

HAS_KERNELS = dispatch.kernels_of(torch.empty(0)) is not None
REASON = 'needs the kernels for the CPU, which are switched off or not built'

needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason=REASON)

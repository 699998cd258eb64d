"""Where in activation checkpointing a forward runs. torch does not tell: the calls to it do."""

import sys
from collections.abc import Iterator
from types import FrameType

import torch
import torch.utils.checkpoint

# Of reentrant checkpointing and of the other.
_SECOND_RUN = ('backward', 'recompute_fn')


def is_second_run() -> bool:
    """Whether a forward is run again in a backward pass, so that its batch was counted before.

    Seen where torch.utils.checkpoint runs it in a backward pass; not where what a checkpoint saved
    is asked for without one, nor with checkpointing that is not torch's.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    for frame in _calls():
        code = frame.f_code
        if code.co_filename == torch.utils.checkpoint.__file__ and code.co_name in _SECOND_RUN:
            return True
        # What a hook starts counts.
        if code is torch.autograd.graph._engine_run_backward.__code__:
            return False
    return False


def has_second_run() -> bool | None:
    """Whether the first run of a reentrant checkpoint has a second; None outside of such a run.

    It has none where no input of the checkpoint requires a gradient.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    found = None
    # The outermost of nested checkpoints decides.
    for frame in _calls():
        if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__:
            found = any(frame.f_locals['ctx'].needs_input_grad)
    return found


def _calls() -> Iterator[FrameType]:
    """Go through the calls that led here, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back

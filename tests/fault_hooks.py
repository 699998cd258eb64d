"""Hooks by which a training process does to itself what happens to real ones."""

import os
import resource
import signal
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    """Send a signal to the own process, in the middle of an iteration.

    The environment says when, and nothing happens without: KILL_AT is the iteration, from 1;
    KILL_SIGNAL the name of the signal, SIGKILL by default; KILL_RANK the only rank that does it.
    What torchrun has started again does it no more.
    """

    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (
            str(runner.iter + 1) == os.environ.get('KILL_AT')
            and os.environ.get('KILL_RANK', str(runner.rank)) == str(runner.rank)
            and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
        ):
            number = signal.Signals[os.environ.get('KILL_SIGNAL', 'SIGKILL')]
            model = getattr(runner.model, 'module', runner.model)
            # The backbone has run; head and backward pass are to come.
            model.neck.register_forward_hook(lambda *_: os.kill(os.getpid(), number))


@HOOKS.register_module()
class FullDiskHook(Hook):
    """From iteration DISK_FULL_AT of the environment on let no file grow beyond 100 kB.

    The system stops a write in the middle, as a full disk does.
    """

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if str(runner.iter + 1) == os.environ.get('DISK_FULL_AT'):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


def names_in(folder):
    """Return the sorted names of the checkpoints, and of what is left of them, in a folder."""
    return sorted(path.name for path in Path(folder).iterdir() if '.pth' in path.name)

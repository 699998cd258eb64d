"""Hooks by which a training process does to itself what happens to real ones.

With SAY_THREADS in the environment it says at its end which threads are left.
"""

import atexit
import os
import resource
import signal
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def say_threads():
    """Print the names of the threads that are left, as the system has them."""
    names = [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]
    print(f'threads at the end: {" ".join(sorted(names))}', flush=True)


if 'SAY_THREADS' in os.environ:
    atexit.register(say_threads)


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
class PauseHook(Hook):
    """Wait for a signal, so that what a test does to a process meets it at a known place.

    PAUSE_BEFORE of the environment says where, and nothing happens without: 'iteration 4', from 1,
    or 'evaluation 2', that after 2 iterations.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._pause(f'iteration {runner.iter + 1}')

    def before_val_epoch(self, runner):
        self._pause(f'evaluation {runner.iter}')

    def _pause(self, place):
        if os.environ.get('PAUSE_BEFORE') == place:
            signal.pause()


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

"""A hook that kills its own process, as a machine does that fails."""

import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    """SIGKILL after the iteration that the environment variable KILL_AFTER gives, if it is set."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if str(runner.iter + 1) == os.environ.get('KILL_AFTER'):
            os.kill(os.getpid(), signal.SIGKILL)

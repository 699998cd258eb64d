"""What the tools do with a config before the Runner gets it."""

import datetime
import os

import torch
import torch.distributed as dist
from mmengine.config import Config

from .condensation_hook import CondensationHook


def prepare(cfg: Config) -> None:
    """Add CondensationHook to a config, and make several processes on CPU possible.

    mmengine's launcher sets a CUDA device and hands DistributedDataParallel a device index,
    neither of which exists on a CPU build of torch. Without a GPU the process group is therefore
    initialised here, on gloo, which makes the Runner skip that.

    Args:
        cfg (Config): Config with its ``launcher`` set, changed in place.
    """
    hooks = cfg.setdefault('custom_hooks', None) or []
    if not any(hook.get('type') in ('CondensationHook', CondensationHook) for hook in hooks):
        hooks = [*hooks, dict(type='CondensationHook')]
    cfg.custom_hooks = hooks

    if cfg.get('launcher') == 'pytorch' and not torch.cuda.is_available():
        os.environ.setdefault('RANK', os.environ['LOCAL_RANK'])
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
        if not dist.is_initialized():
            dist.init_process_group(
                'gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout)
            )
        wrapper = cfg.get('model_wrapper_cfg') or dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        wrapper['device_ids'] = None
        cfg.model_wrapper_cfg = wrapper

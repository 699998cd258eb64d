"""From a command line to a Runner."""

import argparse
import datetime
import gc
import os
import zipfile
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from .non_finite_step_hook import NonFiniteStepHook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, named as in mmdet's tools."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument('--data-root', help="folder to use in place of the config's data_root")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that override those of the config, as key=value; lists as key="[a,b]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)


def read_config(args: argparse.Namespace) -> Config:
    """Read the config ``args.config`` and apply the options of the command line."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join(
            'work_dirs', os.path.splitext(os.path.basename(args.config))[0]
        )
    return cfg


def build_runner(cfg: Config, purpose: str | None = None) -> Runner:
    """Build the Runner, or the one that the config's ``runner_type`` names.

    Args:
        cfg (Config): The whole config.
        purpose (str, optional): What a checkpoint is loaded for, 'resume' or 'test'; None: to
            start from. See AtomicCheckpointHook.

    Raises:
        ValueError: The file of the checkpoint is truncated or no checkpoint.
    """
    path = cfg.get('load_from')
    if path is None and cfg.get('resume'):
        path = find_latest_checkpoint(cfg.work_dir)
    if path is not None:
        check_checkpoint_file(path)
    checkpoint_hook = cfg.default_hooks.get('checkpoint')
    if checkpoint_hook and checkpoint_hook.get('type') == 'AtomicCheckpointHook':
        checkpoint_hook.purpose = purpose
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def check_checkpoint_file(path: str) -> None:
    """Raise an error where a local file is visibly no whole checkpoint.

    Args:
        path (str): Checkpoint; addresses such as https:// are left to mmengine.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, damaged or something else.
    """
    if '://' in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} is not there')
    with open(path, 'rb') as file:
        head = file.read(4)
    # Archives have their table of contents at the end; older checkpoints are pickles.
    if head.startswith(b'PK'):
        if not zipfile.is_zipfile(path):
            raise ValueError(f'checkpoint {path} is truncated: use an earlier one')
        # torch.load does not compare the checksums that torch.save writes. After
        # torch.serialization.set_crc32_options(False) it writes zeros in their place.
        with zipfile.ZipFile(path) as archive:
            has_checksums = any(entry.CRC for entry in archive.infolist())
            broken = archive.testzip() if has_checksums else None
        if broken is not None:
            raise ValueError(
                f'checkpoint {path} is damaged, {broken} fails its checksum: use an earlier one'
            )
    elif not head.startswith(b'\x80'):
        raise ValueError(f'{path} is no checkpoint of PyTorch, or an empty file')


def finish() -> None:
    """Leave the process group at the end of a tool, which holds no Runner any more.

    gloo's threads abort a process that exits while they run, and the launcher then calls the job
    failed. They end with the process group, which the model's wrapper keeps until it is collected.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def add_hook(cfg: Config, cls: type[Hook]) -> None:
    """Add a hook to a config, changed in place, where it is not there yet."""
    hooks = list(cfg.setdefault('custom_hooks', None) or [])
    default_hooks = cfg.get('default_hooks') or {}
    types = [hook.get('type') for hook in (*hooks, *default_hooks.values()) if hook]
    if cls not in types and cls.__name__ not in types:
        hooks.append(dict(type=cls.__name__))
    cfg.custom_hooks = hooks


def prepare(cfg: Config) -> None:
    """Make a config safe to run, and several processes on CPU possible.

    NonFiniteStepHook is added where it is not there yet, and AtomicCheckpointHook takes the place
    of mmengine's CheckpointHook.

    mmengine's launcher sets a CUDA device and hands DistributedDataParallel a device index,
    neither of which exists on a CPU build of torch. Without a GPU the process group is therefore
    initialised here, on gloo, which makes the Runner skip that.

    Args:
        cfg (Config): Config with its ``launcher`` set, changed in place.
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    add_hook(cfg, NonFiniteStepHook)
    checkpoint_hook = cfg.default_hooks.setdefault('checkpoint', dict(type='CheckpointHook'))
    if checkpoint_hook and checkpoint_hook.get('type') in ('CheckpointHook', CheckpointHook):
        checkpoint_hook['type'] = 'AtomicCheckpointHook'

    if cfg.get('launcher') == 'pytorch' and not torch.cuda.is_available():
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


def set_data_root(cfg: Config, root: str) -> None:
    """Let a config read its data from another folder.

    Every path of the config that is its ``data_root`` or lies in it lies in ``root`` afterwards:
    the data sets' roots and the annotation files of the evaluators. A folder beside it whose name
    begins alike is another one.

    Args:
        cfg (Config): Config with a ``data_root``, changed in place.
        root (str): Folder of the same layout as the config's.

    Raises:
        ValueError: The config has no ``data_root``.
        FileNotFoundError: ``root`` is no folder.
    """
    old = cfg.get('data_root')
    if not old:
        raise ValueError('the config has no data_root that --data-root could replace')
    if not os.path.isdir(root):
        raise FileNotFoundError(f'--data-root: no folder {root}')
    root = os.path.join(root, '')
    old = os.path.join(old, '')

    def replace(value: Any) -> Any:
        if isinstance(value, str) and os.path.join(value, '').startswith(old):
            return root + value[len(old) :].lstrip('/')
        if isinstance(value, dict):
            for key in value:
                value[key] = replace(value[key])
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        return value

    replace(cfg._cfg_dict)

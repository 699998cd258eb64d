"""Tier 3: runs that survive what goes wrong: disks, kills, numbers, lists of hooks.

Knows nothing of normalization: a layer that extends another one makes itself known by
:func:`register_extension`.
"""

from .atomic_checkpoint_hook import (
    AtomicCheckpointHook,
    AtomicLocalBackend,
    check_fit,
    register_extension,
)
from .launch import add_arguments, build_runner, finish, prepare, read_config, set_data_root
from .listed_hook import ListedHook
from .non_finite_step_hook import NonFiniteStepHook

__all__ = [
    'AtomicCheckpointHook',
    'AtomicLocalBackend',
    'ListedHook',
    'NonFiniteStepHook',
    'add_arguments',
    'build_runner',
    'check_fit',
    'finish',
    'prepare',
    'read_config',
    'register_extension',
    'set_data_root',
]

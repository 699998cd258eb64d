"""Tier 3: what runs inside and around mmengine's Runner."""

from .condensation_hook import CondensationHook
from .launch import add_arguments, build_runner, finish, load_config, prepare, set_data_root

__all__ = [
    'CondensationHook',
    'add_arguments',
    'build_runner',
    'finish',
    'load_config',
    'prepare',
    'set_data_root',
]

"""Tier 3: what runs inside and around mmengine's Runner."""

from .atomic_checkpoint_hook import AtomicCheckpointHook
from .condensation_hook import CondensationHook
from .launch import add_arguments, build_runner, finish, load_config, prepare, set_data_root
from .non_finite_step_hook import NonFiniteStepHook
from .population_statistics import PopulationStatistics
from .precise_statistics_hook import PreciseStatisticsHook
from .sync_group_hook import SyncGroupHook

__all__ = [
    'AtomicCheckpointHook',
    'CondensationHook',
    'NonFiniteStepHook',
    'PopulationStatistics',
    'PreciseStatisticsHook',
    'SyncGroupHook',
    'add_arguments',
    'build_runner',
    'finish',
    'load_config',
    'prepare',
    'set_data_root',
]

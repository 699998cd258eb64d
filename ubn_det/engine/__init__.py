"""Tier 3: what runs inside and around mmengine's Runner."""

from ubn_det.layers import UBN
from ubn_det.layers.ubn import EXTRA_PARAMETERS, GATE_BUFFERS
from ubn_det.reliability import (
    AtomicCheckpointHook,
    NonFiniteStepHook,
    add_arguments,
    build_runner,
    finish,
    register_extension,
    set_data_root,
)

from .condensation_hook import CondensationHook
from .population_statistics import PopulationStatistics
from .precise_statistics_hook import PreciseStatisticsHook
from .preparation import load_config, prepare
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

# Weights of BN are whole for a UBN.
register_extension(UBN, EXTRA_PARAMETERS, GATE_BUFFERS)

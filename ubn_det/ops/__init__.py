"""Tier 1: tensors in, tensors out."""

from .batch_statistics import Buffers, Rule
from .condensation import condensation_score
from .unified_batch_norm import (
    Parameters,
    Statistics,
    unified_batch_norm,
    unified_batch_norm_plain,
    unified_batch_norm_training,
)

__all__ = [
    'Buffers',
    'Parameters',
    'Rule',
    'Statistics',
    'condensation_score',
    'unified_batch_norm',
    'unified_batch_norm_plain',
    'unified_batch_norm_training',
]

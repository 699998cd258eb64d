"""Tier 1: tensors in, tensors out."""

from .gate import Buffers, Rule, threshold
from .reference import Parameters, condensation_score
from .unified_batch_norm import describe, evaluate, train, update

__all__ = [
    'Buffers',
    'Parameters',
    'Rule',
    'condensation_score',
    'describe',
    'evaluate',
    'threshold',
    'train',
    'update',
]

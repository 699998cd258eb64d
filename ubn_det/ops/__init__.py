"""Tier 1: tensors in, tensors out."""

from .condensation import condensation_score
from .unified_batch_norm import BatchStatistics, unified_batch_norm

__all__ = ['BatchStatistics', 'condensation_score', 'unified_batch_norm']

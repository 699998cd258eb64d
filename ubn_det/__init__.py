"""Unified Batch Normalization for MMDetection; importing it registers its layers and hooks."""

from .layers import UBN, SyncUBN, UBN1d, UBN2d, UBN3d

__version__ = '0.1.0'

__all__ = ['UBN', 'SyncUBN', 'UBN1d', 'UBN2d', 'UBN3d', '__version__']

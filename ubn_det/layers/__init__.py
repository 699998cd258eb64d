"""Tier 2: the layers."""

from .sync_ubn import SyncUBN
from .ubn import UBN, UBN1d, UBN2d, UBN3d

__all__ = ['UBN', 'SyncUBN', 'UBN1d', 'UBN2d', 'UBN3d']

"""Unified Batch Normalization for MMDetection.

Importing the package registers its layers and its hook with mmengine and installs the guards of
:mod:`ubn_det.guards`.
"""

# First: it refuses a torch for which the others would fail.
from . import _torch_floor as _torch_floor
from . import guards
from .building import build_with_ubn
from .conversion import convert, convert_sync_ubn
from .deployment import fuse
from .engine import CondensationHook
from .layers import UBN, SyncUBN, UBN1d, UBN2d, UBN3d

__version__ = '0.3.0'

__all__ = [
    'CondensationHook',
    'SyncUBN',
    'UBN',
    'UBN1d',
    'UBN2d',
    'UBN3d',
    'build_with_ubn',
    'convert',
    'convert_sync_ubn',
    'fuse',
]

guards.install()

"""Tier 3: checks of the data that a config asks for."""

from .annotations import InputError, load_annotations
from .checks import check_data

__all__ = ['InputError', 'check_data', 'load_annotations']

"""Tier 3: what runs inside and around mmengine's Runner."""

from .condensation_hook import CondensationHook
from .launch import prepare

__all__ = ['CondensationHook', 'prepare']

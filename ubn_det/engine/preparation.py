"""What tools/train.py and tools/test.py make of a config: it is checked and watched."""

import argparse

from mmengine.config import Config

from ubn_det.reliability import launch

from .condensation_hook import CondensationHook


def load_config(args: argparse.Namespace) -> Config:
    """Read the config ``args.config``, apply the options of the command line and prepare it."""
    cfg = launch.read_config(args)
    prepare(cfg)
    return cfg


def prepare(cfg: Config) -> None:
    """Make a config safe to run, and several processes on CPU possible.

    CondensationHook and NonFiniteStepHook are added where they are not there yet, and
    AtomicCheckpointHook takes the place of mmengine's CheckpointHook.

    Args:
        cfg (Config): Config with its ``launcher`` set, changed in place.
    """
    launch.add_hook(cfg, CondensationHook)
    launch.prepare(cfg)

"""What the tools make of a config: with the hooks, once each."""

import argparse

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

from ubn_det import UBN
from ubn_det.engine import add_arguments, load_config, prepare

MMDET = "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"


def parse(config, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_arguments(parser)
    return load_config(parser.parse_args([str(config), *options]))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'detector.py'
    path.write_text(MMDET)
    return path


def test_untouched_mmdet_config_needs_one_option(config):
    cfg = parse(config, '--cfg-options', 'model.backbone.norm_cfg.type=UBN')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert sum(isinstance(m, UBN) for m in model.modules()) == 53
    assert cfg.custom_hooks == [dict(type='CondensationHook'), dict(type='NonFiniteStepHook')]


def test_hooks_are_added_once_and_others_stay():
    hooks = [dict(type='EMAHook'), dict(type='NonFiniteStepHook', patience=3)]
    cfg = Config(dict(custom_hooks=hooks, launcher='none'))
    prepare(cfg)
    prepare(cfg)
    assert cfg.custom_hooks == [*hooks, dict(type='CondensationHook')]
    # Wherever it is already.
    default = dict(condensation=dict(type='CondensationHook', interval=5), timer=None)
    cfg = Config(dict(default_hooks=default, launcher='none'))
    prepare(cfg)
    assert cfg.custom_hooks == [dict(type='NonFiniteStepHook')]

"""Layers, conversion, folding and guards where mmcv and mmdet are not installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('mmcv', 'mmdet'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
"""

USE = """
import sys
import ubn_det.layers, ubn_det.ops, ubn_det.engine
import mmengine.model
import torch
from mmengine.registry import MODELS
from torch import nn
from ubn_det import UBN, UBN2d, build_with_ubn, convert, convert_sync_ubn, fuse

layer = MODELS.build(dict(type='UBN', num_features=4))
layer(torch.randn(2, 4, 5, 5)).sum().backward()
assert layer.center_weight.grad is not None

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
nn.init.normal_(model[1].running_mean)
x = torch.randn(2, 3, 8, 8)
expected = model.eval()(x)
assert type(convert(model)[1]) is UBN2d
torch.testing.assert_close(model(x), expected)
assert len(fuse(model, (x,)).folded) == 1
torch.testing.assert_close(model(x), expected)

convert_sync_ubn(nn.Sequential(UBN(4)))
built = build_with_ubn(nn.BatchNorm2d, num_features=4)
assert type(built) is UBN2d
for function in (
    nn.SyncBatchNorm.convert_sync_batchnorm,
    mmengine.model.convert_sync_batchnorm,
    torch.nn.utils.fuse_conv_bn_eval,
):
    try:
        function(UBN(4), UBN(4))
    except RuntimeError as error:
        assert 'drop its rectifiers' in str(error), error
    else:
        raise AssertionError(f'{function} is not guarded')
assert not {name.partition('.')[0] for name in sys.modules} & {'mmcv', 'mmdet'}
"""


def run(code, *path):
    path = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )


def test_all_but_mmcvs_guards_works():
    done = run(BLOCK + USE)
    assert done.returncode == 0, done.stderr


def test_mmcv_that_is_installed_and_broken_is_no_absent_one(tmp_path):
    # Its guards would be missing without a word.
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('import a_module_that_is_not_there')
    done = run('import ubn_det', tmp_path)
    assert "No module named 'a_module_that_is_not_there'" in done.stderr

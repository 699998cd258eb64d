"""What a config's list of hooks drops of its base's is said at the start of a run."""

import logging
import re
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from tiny_config import ROOT
from torch import nn
from torch.utils.data import DataLoader

from ubn_det import UBN2d
from ubn_det.engine import prepare

RTMDET = "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n"
YOLOX = "_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'\n"
OURS = "dict(type='CondensationHook')"


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = UBN2d(4)

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.norm(self.conv(inputs)).square().mean())


def said_at_the_start(path, options=None, by_tools=False):
    """Train an iteration with the hooks of a config file; return what was warned of its list."""
    cfg = Config.fromfile(path, import_custom_modules=False)
    if options:
        cfg.merge_from_dict(options)
    if by_tools:
        cfg.launcher = 'none'
        prepare(cfg)
    names = {'CondensationHook', 'NonFiniteStepHook', 'PreciseStatisticsHook'}
    # Hooks of mmdet's need its models: those of this package are enough to start with.
    hooks = [hook for hook in cfg.custom_hooks or [] if hook.type in names]
    hooks += [hook for hook in cfg.default_hooks.values() if hook.type in names]
    model = Model()
    runner = Runner(
        model=model,
        work_dir=str(path.parent / 'run'),
        train_dataloader=DataLoader(
            [dict(inputs=torch.randn(2, 3, 4, 4))], collate_fn=lambda x: x[0]
        ),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=None),
        experiment_name=str(uuid.uuid4()),
        # The rest of it says nothing here, and takes seconds to print.
        cfg=Config(
            {key: cfg.get(key) for key in ('custom_hooks', 'default_hooks')}, filename=path
        ),
    )
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    runner.logger.handlers.append(handler)
    runner.train()
    return [message for message in records if 'custom_hooks' in message]


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ('base', 'dropped'),
    [
        (RTMDET, 'EMAHook and PipelineSwitchHook'),
        (YOLOX, 'EMAHook and SyncNormHook and YOLOXModeSwitchHook'),
    ],
)
def test_list_that_drops_hooks_of_the_base_warns(write, base, dropped):
    path = write('child.py', f'{base}custom_hooks = [{OURS}, dict(type="NonFiniteStepHook")]')
    (said,) = said_at_the_start(path)
    assert f'whose {dropped} will not run' in said
    assert (
        "Move CondensationHook to default_hooks=dict(any_name=dict(type='CondensationHook'" in said
    )
    # A file that another one is based on, and options of the command line.
    (of_child,) = said_at_the_start(write('grandchild.py', "_base_ = './child.py'\n"))
    assert of_child == said
    options = dict(custom_hooks=[dict(type='CondensationHook')])
    (by_option,) = said_at_the_start(write('plain.py', base), options)
    assert f'whose {dropped} will not run' in by_option


@pytest.mark.parametrize(
    'lists',
    [
        # Beside the base's.
        f'default_hooks = dict(condensation={OURS})',
        f'custom_hooks = [*_base_.custom_hooks, {OURS}]',
        # Not of ours.
        "custom_hooks = [dict(type='NumClassCheckHook')]",
        '',
    ],
)
@pytest.mark.parametrize('by_tools', [False, True])
def test_what_drops_nothing_of_the_base_is_silent(write, lists, by_tools):
    assert said_at_the_start(write('child.py', RTMDET + lists), by_tools=by_tools) == []


def test_every_page_and_config_adds_its_hooks_to_those_of_the_base():
    pages = [ROOT / 'README.md', *ROOT.glob('docs/*.md'), *ROOT.glob('configs/**/*.py')]
    pages += [*ROOT.glob('demo/mask-rcnn_*.py'), *ROOT.glob('benchmarks/study/**/*.py')]
    found = [path.name for path in pages if re.search(r'custom_hooks\s*=', path.read_text())]
    assert found == []

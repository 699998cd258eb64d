"""Tests of CondensationHook in real runs on CPU: what it logs, what it says, what it refuses."""

import json
import logging
import uuid
from pathlib import Path

import mmdet.models
import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.ops import SyncBatchNorm as MMCVSyncBatchNorm
from mmdet.models.layers import FrozenBatchNorm2d
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope
from mmengine.runner import FlexibleRunner, Runner
from mmengine.visualization import Visualizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from ubn_det import UBN, CondensationHook, SyncUBN, UBN2d

assert mmdet.models, 'imported for its registrations'

SIDE = 32
RESNET = dict(type='mmdet.ResNet', depth=18, base_channels=8, norm_eval=False, init_cfg=None)
# bn1 of a ResNet-18, two in each of its 8 blocks, and one for each of 3 strided shortcuts.
NUM_RESNET = 20


class Model(BaseModel):
    """Components in a row, each given as a config, and a loss that needs no labels.

    Args:
        backbone (dict | list[dict]): A list becomes a ModuleList.
        neck (dict, optional): Gets what the backbone returns.
        replace (tuple[str, type], optional): Path of a module, all of whose UBN are replaced by
            this class after all is built.
    """

    def __init__(self, backbone, neck=None, replace=None, **kwargs):
        super().__init__(**kwargs)
        if isinstance(backbone, dict):
            self.backbone = MODELS.build(backbone)
        else:
            self.backbone = nn.ModuleList([MODELS.build(cfg) for cfg in backbone])
        self.neck = None if neck is None else MODELS.build(neck)
        if replace is not None:
            replace_ubn(self.get_submodule(replace[0]), replace[1])

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        for part in self.backbone if isinstance(self.backbone, nn.ModuleList) else [self.backbone]:
            x = part(x)
        if self.neck is not None:
            x = self.neck(x)
        x = x[-1] if isinstance(x, (tuple, list)) else x
        return dict(loss=(x.square()).mean()) if mode == 'loss' else x


class Block(nn.Module):
    """Convolutions, each followed by a norm layer made directly from the given arguments."""

    def __init__(self, norms):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in norms)
        self.norms = nn.ModuleList(MODELS.build(dict(num_features=3, **norm)) for norm in norms)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


class Images(Dataset):
    """Images in runs of four, by turns very different and very alike: so are batches of four."""

    metainfo = {}

    def __init__(self, length=24, side=8):
        generator = torch.Generator().manual_seed(1)
        noise = torch.tensor([2.0, 0.2]).repeat_interleave(4).repeat(length)[:length]
        self.images = 1 + noise.view(-1, 1, 1, 1) * torch.randn(
            length, 3, side, side, generator=generator
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index])


class Nothing(BaseMetric):
    """A metric, since an evaluation loop needs one."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


class Recorder(Hook):
    """Keeps the state of all UBN after each iteration, whatever CondensationHook reads."""

    def __init__(self):
        self.states = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.states[runner.iter + 1] = {
            name: dict(
                score=layer.condensation.item(),
                threshold=layer.condensation_threshold,
                mean=layer.condensation_mean.item(),
                var=layer.condensation_var.item(),
                open=layer.num_batches_tracked.item(),
                closed=layer.num_batches_condensed.item(),
            )
            for name, layer in runner.model.named_modules()
            if isinstance(layer, UBN) and layer.track_running_stats
        }


class Records(logging.Handler):
    """Collects what is logged, repeated warnings included, which the log file leaves out."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def messages(self, level):
        """Return what the hook itself logged; mmengine warns of its own affairs."""
        hook = CondensationHook.__module__.split('.')[-1]
        return [r.getMessage() for r in self.records if (r.levelno, r.module) == (level, hook)]


def replace_ubn(module, norm):
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, UBN):
                setattr(parent, name, norm(child.num_features))


@pytest.fixture(autouse=True)
def clean():
    for registry, cls in ((MODELS, Model), (MODELS, Block), (DATASETS, Images)):
        registry.register_module(module=cls, force=True)
    METRICS.register_module(module=Nothing, force=True)
    yield
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    for cls in (MMLogger, Visualizer, DefaultScope, MessageHub):
        cls._instance_dict.clear()
    for registry, name in ((MODELS, 'Model'), (MODELS, 'Block'), (DATASETS, 'Images')):
        registry.module_dict.pop(name)
    METRICS.module_dict.pop('Nothing')


def make_config(work_dir, model, hook=None, max_iters=12, max_epochs=None, **settings):
    """Make a config; by epochs of 6 iterations where ``max_epochs`` is given."""
    by_epoch = max_epochs is not None
    length = dict(max_epochs=max_epochs) if by_epoch else dict(max_iters=max_iters)
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=False)
    config = dict(
        work_dir=str(work_dir),
        experiment_name=str(uuid.uuid4()),
        model=model,
        train_dataloader=dict(
            dataset=dict(type='Images'), sampler=sampler, batch_size=4, num_workers=0
        ),
        train_cfg=dict(by_epoch=by_epoch, **length),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=4),
            checkpoint=dict(type='CheckpointHook', interval=1000),
        ),
        custom_hooks=[hook or dict(type='CondensationHook')],
        log_processor=dict(by_epoch=by_epoch),
        randomness=dict(seed=0),
    )
    config.update(settings)
    return Config(config)


def add_evaluation(config):
    """Let a config be validated and tested as well."""
    loader = dict(
        dataset=dict(type='Images', length=2),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=1,
        num_workers=0,
    )
    for name in ('val', 'test'):
        config[f'{name}_dataloader'] = loader
        config[f'{name}_evaluator'] = dict(type='Nothing')
        config[f'{name}_cfg'] = dict()
    return config


def start(config):
    """Return a Runner with ``records``, what it logs from now on."""
    if isinstance(config.model, nn.Module):
        # A config with a module in it cannot be printed, so this is what a user does.
        runner = Runner(**config)
    else:
        runner = Runner.from_cfg(config)
    runner.records = Records()
    runner.logger.handlers.append(runner.records)
    runner.recorder = Recorder()
    runner.register_hook(runner.recorder)
    return runner


def train(config):
    runner = start(config)
    runner.train()
    return runner


def images(side=SIDE):
    """Return settings for images of another size, with which a ResNet still has maps."""
    return dict(
        train_dataloader=dict(
            dataset=dict(type='Images', length=8, side=side),
            sampler=dict(type='InfiniteSampler', shuffle=False),
            batch_size=2,
            num_workers=0,
        )
    )


def block(*norms, **kwargs):
    return dict(type='Model', backbone=dict(type='Block', norms=list(norms)), **kwargs)


def find_hook(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, CondensationHook))


def read_scalars(runner):
    """Return step -> scalars of the hook, as a user finds them in the work folder."""
    found = {}
    path = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    for line in path.read_text().splitlines():
        scalars = json.loads(line)
        if any(name.startswith('conden') for name in scalars):
            step = scalars.pop('step')
            assert step not in found
            found[step] = scalars
    return found


def summary(runner):
    """Return the one line of the start of a run."""
    (line,) = runner.records.messages(logging.INFO)
    return line


def warnings(runner):
    return runner.records.messages(logging.WARNING)


LAYERS = ('backbone.norms.0', 'backbone.norms.1')
# As the first layer: every second batch is over this, after the first two.
UNDECIDED = dict(type='UBN', condensation_threshold=0.6, warmup=2)
SCORED = dict(type='UBN', condensation_threshold=0.6)


def expected_scalars(states, steps):
    """Compute the scalars of the given steps from the layers' state after each iteration."""
    expected, before = {}, dict.fromkeys(LAYERS, dict(open=0, closed=0))
    for step in steps:
        now = states[step]
        scalars = {}
        for name in LAYERS:
            closed = now[name]['closed'] - before[name]['closed']
            total = closed + now[name]['open'] - before[name]['open']
            scalars[f'condensation/{name}'] = now[name]['score']
            threshold = now[name]['threshold']
            if threshold == 'auto':
                threshold = now[name]['mean'] + 3 * now[name]['var'] ** 0.5 + 0.03
            scalars[f'condensation_threshold/{name}'] = threshold
            scalars[f'condensed_share/{name}'] = closed / total
        for tag in ('condensation', 'condensation_threshold', 'condensed_share'):
            values = [scalars[f'{tag}/{name}'] for name in LAYERS]
            scalars[f'{tag}/mean'] = sum(values) / 2
            scalars[f'{tag}/max'] = max(values)
        expected[step], before = pytest.approx(scalars, abs=1e-6), now
    return expected


@pytest.mark.parametrize('other', [0.9, 'auto'])
@pytest.mark.parametrize(
    'hook, length, steps',
    [
        (dict(), dict(max_iters=13), [4, 8, 12]),
        (dict(interval=5), dict(max_iters=10), [5, 10]),
        # The iterations of an epoch are counted from its start, as LoggerHook does it.
        (dict(interval=3), dict(max_epochs=2), [3, 6, 9, 12]),
        (dict(), dict(max_epochs=2), [4, 10]),
    ],
)
def test_scalars_at_the_log_interval(tmp_path, hook, length, steps, other):
    model = block(UNDECIDED, dict(type='UBN', condensation_threshold=other))
    config = make_config(tmp_path, model, dict(type='CondensationHook', **hook), **length)
    runner = train(config)
    states = runner.recorder.states
    assert read_scalars(runner) == expected_scalars(states, steps)
    # What is compared says something.
    assert states[steps[-1]][LAYERS[0]]['closed'] == steps[-1] // 2 - 1


def test_interval_is_that_of_a_run_without_logger_hook(tmp_path):
    config = make_config(tmp_path, block(UNDECIDED), max_iters=51)
    config.default_hooks.logger = None
    assert set(read_scalars(train(config))) & {10, 20, 25, 50} == {50}


def test_scalars_in_tensorboard(tmp_path):
    model = block(UNDECIDED, SCORED)
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    visualizer = dict(type='Visualizer', vis_backends=backends)
    runner = train(make_config(tmp_path, model, visualizer=visualizer))
    runner.visualizer.close()
    events = EventAccumulator(str(Path(runner.log_dir) / 'vis_data')).Reload()
    tags = [tag for tag in events.Tags()['scalars'] if tag.startswith('conden')]
    found = {step: {} for step in (4, 8, 12)}
    for tag in tags:
        for event in events.Scalars(tag):
            found[event.step][tag] = event.value
    assert found == expected_scalars(runner.recorder.states, found)


def test_share_of_closed_gates_since_the_last_log(tmp_path):
    # No score is as low as the threshold, so that all but the first 3 batches are closed.
    always = dict(type='UBN', condensation_threshold=-1, warmup=3)
    never = dict(type='UBN', condensation_threshold=1)
    runner = train(make_config(tmp_path, block(always, never)))
    scalars = read_scalars(runner)
    shares = {step: s[f'condensed_share/{LAYERS[0]}'] for step, s in scalars.items()}
    assert shares == {4: 0.25, 8: 1.0, 12: 1.0}
    assert [s['condensed_share/mean'] for s in scalars.values()] == [0.125, 0.5, 0.5]
    assert [s['condensed_share/max'] for s in scalars.values()] == [0.25, 1.0, 1.0]
    assert {s[f'condensed_share/{LAYERS[1]}'] for s in scalars.values()} == {0.0}


def test_layer_without_a_threshold_has_no_score(tmp_path):
    # 0 would read as samples that have nothing in common.
    model = block(dict(type='UBN'), SCORED)
    scalars = read_scalars(train(make_config(tmp_path, model, max_iters=4)))[4]
    assert f'condensation/{LAYERS[0]}' not in scalars
    assert scalars['condensation/mean'] == scalars[f'condensation/{LAYERS[1]}']


def test_share_does_not_count_batches_of_an_earlier_run(tmp_path):
    norm = dict(type='UBN', condensation_threshold=-1, warmup=3)
    settings = dict(
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=4),
            checkpoint=dict(type='CheckpointHook', interval=6, by_epoch=False),
        )
    )
    first = train(make_config(tmp_path, block(norm), max_iters=6, **settings))
    counts = first.recorder.states[6][LAYERS[0]]
    assert (counts['open'], counts['closed']) == (3, 3)
    config = make_config(tmp_path / 'second', block(norm), max_iters=10, **settings)
    config.update(resume=True, load_from=str(tmp_path / 'iter_6.pth'))
    second = train(config)
    assert {k: v[f'condensed_share/{LAYERS[0]}'] for k, v in read_scalars(second).items()} == {
        8: 1.0
    }


class Reads(TorchFunctionMode):
    """Records each function of torch that is called, those that leave the device included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, '__name__', str(func)))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_between_logs(tmp_path, monkeypatch):
    called = {}
    after_train_iter = CondensationHook.after_train_iter

    def record(self, runner, *args, **kwargs):
        with Reads() as reads:
            after_train_iter(self, runner, *args, **kwargs)
        called[runner.iter + 1] = reads.names

    monkeypatch.setattr(CondensationHook, 'after_train_iter', record)
    # What a visualizer does with the numbers is its own affair.
    monkeypatch.setattr(Visualizer, 'add_scalars', lambda *args, **kwargs: None)
    # The warning about starvation comes along and must not read either.
    starved = dict(type='UBN', condensation_threshold=-1, warmup=0, patience=2)
    train(make_config(tmp_path, block(starved, UNDECIDED)))
    assert list(called) == list(range(1, 13))
    for step, names in called.items():
        if step % 4:
            assert names == []
        else:
            # One transfer for the scores and one for the counters, however many layers there are.
            transfers = {'tolist', 'item', 'cpu', 'numpy', '__bool__', '__float__', '__int__'}
            assert [name for name in names if name in transfers] == ['tolist', 'tolist']


@pytest.mark.parametrize('interval', [0, -3, 2.5, '10'])
def test_bad_interval(interval):
    with pytest.raises(ValueError, match=f'^interval must be .*got {interval!r}'):
        CondensationHook(interval=interval)


def test_line_at_the_start_counts(tmp_path):
    norms = [
        dict(type='UBN'),
        dict(type='UBN2d'),
        dict(type='SyncUBN'),
        dict(type='BN'),
        dict(type='UBN', track_running_stats=False),
    ]
    runner = train(make_config(tmp_path, block(*norms), max_iters=1))
    assert summary(runner) == (
        'UBN: 4 layers (1 SyncUBN), 3 train their statistics, 1 do not, '
        '0 have their rectifiers frozen at the identity; 1 layers of plain BN left over'
    )
    assert warnings(runner) == []


def test_layers_without_running_statistics_are_not_followed(tmp_path):
    model = block(dict(type='UBN', track_running_stats=False), SCORED)
    runner = train(make_config(tmp_path, model, max_iters=4))
    assert set(read_scalars(runner)[4]) == {
        f'{tag}/{name}'
        for tag in ('condensation', 'condensation_threshold', 'condensed_share')
        for name in (LAYERS[1], 'mean', 'max')
    }


def test_layers_that_never_have_running_statistics_are_not_in_evaluation_mode(tmp_path):
    model = block(dict(type='UBN', track_running_stats=False))
    runner = train(make_config(tmp_path, model, max_iters=1))
    assert '0 train their statistics, 1 do not' in summary(runner)
    assert warnings(runner) == []


@pytest.mark.parametrize('frozen_stages, frozen', [(-1, 0), (0, 1), (1, 5)])
def test_partly_frozen_backbone_is_counted_without_a_warning(tmp_path, frozen_stages, frozen):
    backbone = dict(norm_cfg=dict(type='UBN'), frozen_stages=frozen_stages, **RESNET)
    model = dict(type='Model', backbone=backbone)
    runner = train(make_config(tmp_path, model, max_iters=1, **images()))
    assert summary(runner) == (
        f'UBN: {NUM_RESNET} layers (0 SyncUBN), {NUM_RESNET - frozen} train their statistics, '
        f'{frozen} do not, {frozen} have their rectifiers frozen at the identity; '
        '0 layers of plain BN left over'
    )
    assert warnings(runner) == []


def test_norms_that_cannot_be_configured_are_counted(tmp_path):
    # The neck of CenterNet has BN of its own.
    neck = dict(
        type='mmdet.CTResNetNeck',
        in_channels=64,
        num_deconv_filters=(8, 8),
        num_deconv_kernels=(4, 4),
        use_dcn=False,
        init_cfg=None,
    )
    backbone = dict(norm_cfg=dict(type='UBN'), **RESNET)
    model = dict(type='Model', backbone=backbone, neck=neck)
    runner = train(make_config(tmp_path, model, max_iters=1, **images()))
    assert f'UBN: {NUM_RESNET} layers' in summary(runner)
    assert summary(runner).endswith('4 layers of plain BN left over')


def test_norm_eval_of_a_whole_backbone_warns(tmp_path):
    backbone = dict(RESNET, norm_cfg=dict(type='UBN'), norm_eval=True)
    model = dict(type='Model', backbone=backbone)
    runner = train(make_config(tmp_path, model, max_iters=4, **images()))
    assert f'0 train their statistics, {NUM_RESNET} do not' in summary(runner)
    (warning,) = warnings(runner)
    assert f'All {NUM_RESNET} UBN layers are in evaluation mode' in warning
    assert 'model.backbone.norm_eval=True (set norm_eval=False)' in warning
    # There is nothing to follow.
    assert read_scalars(runner) == {}


def test_norm_eval_that_shows_only_in_training_mode_is_found(tmp_path):
    # A Runner's model is in training mode when it is made, norms with norm_eval=True included.
    backbone = dict(RESNET, norm_cfg=dict(type='UBN'), norm_eval=True)
    runner = start(
        make_config(tmp_path, dict(type='Model', backbone=backbone), max_iters=1, **images())
    )
    assert runner.model.backbone.bn1.training
    runner.train()
    (warning,) = warnings(runner)
    assert 'in evaluation mode' in warning


def test_frozen_stages_of_a_whole_backbone_warn(tmp_path):
    model = dict(
        type='Model',
        backbone=dict(norm_cfg=dict(type='UBN'), frozen_stages=4, **RESNET),
        # Gives the optimizer something to train.
        neck=dict(type='mmdet.FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4),
    )
    runner = train(make_config(tmp_path, model, max_iters=1, **images()))
    evaluation, stuck = warnings(runner)
    assert f'All {NUM_RESNET} UBN layers are in evaluation mode' in evaluation
    assert f'The rectifiers of all {NUM_RESNET} UBN layers are frozen at 0' in stuck
    for warning in (evaluation, stuck):
        assert 'model.backbone.frozen_stages=4 (set frozen_stages=-1)' in warning


def test_inherited_requires_grad_false_warns(tmp_path):
    (tmp_path / 'base.py').write_text(f"""
model = dict(
    type='Model',
    backbone=dict(
        type='mmdet.ResNet', depth=18, norm_eval=False, init_cfg=None,
        norm_cfg=dict(type='BN', requires_grad=False)))
settings = {make_config(tmp_path, None, max_iters=1, **images()).to_dict()!r}
""")
    for delete in (False, True):
        norm_cfg = "dict(type='UBN'" + (', _delete_=True)' if delete else ')')
        (tmp_path / 'child.py').write_text(
            f"_base_ = 'base.py'\nmodel = dict(backbone=dict(norm_cfg={norm_cfg}))\n"
        )
        child = Config.fromfile(tmp_path / 'child.py')
        config = Config(dict(child.settings, model=child.model, experiment_name=f'{delete}'))
        runner = train(config)
        if delete:
            assert warnings(runner) == []
            assert '0 have their rectifiers frozen' in summary(runner)
        else:
            (warning,) = warnings(runner)
            assert f'The rectifiers of all {NUM_RESNET} UBN layers are frozen at 0' in warning
            assert 'Set requires_grad=True in norm_cfg' in warning
            assert f'{NUM_RESNET} train their statistics' in summary(runner)


def test_frozen_rectifiers_that_are_not_zero_do_not_warn(tmp_path):
    runner = start(make_config(tmp_path, block(dict(type='UBN'), dict(type='UBN', scaling=False))))
    for layer in runner.model.backbone.norms:
        layer.requires_grad_(False)
        nn.init.ones_(layer.center_weight)
    runner.train()
    assert warnings(runner) == []
    assert '0 have their rectifiers frozen at the identity' in summary(runner)


class _Repeat(nn.Module):
    """Gives a part of a detector the number of channels that it expects."""

    def __init__(self, channels, part):
        super().__init__()
        self.channels = channels
        self.part = MODELS.build(part)

    def forward(self, x):
        return self.part(x[:, :1].expand(-1, self.channels, -1, -1))


@pytest.mark.parametrize(
    'part, channels, num',
    [
        # A stage of a ResNet as a head, in detectors of the C4 kind.
        (dict(type='mmdet.ResLayer', depth=50, stage=1, stride=1), 256, 13),
        (dict(type='mmdet.EfficientNet', arch='b0', out_indices=(6,)), 3, 49),
    ],
)
@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_that_a_module_ignores_warns(tmp_path, part, channels, num, norm_eval):
    part = dict(part, norm_cfg=dict(type='UBN'), norm_eval=norm_eval)
    model = Model(backbone=dict(type=_Repeat, channels=channels, part=part))
    runner = train(make_config(tmp_path, model, max_iters=1, **images()))
    assert summary(runner).startswith(f'UBN: {num} layers (0 SyncUBN), {num} train')
    name = part['type'].removeprefix('mmdet.')
    expected = [f'norm_eval=True of backbone.part ({name}) is ignored for its {num} UBN layers']
    assert [w.split(',')[0] for w in warnings(runner)] == (expected if norm_eval else [])


def test_norm_cfg_that_has_no_effect_raises(tmp_path):
    (tmp_path / 'base.py').write_text("""
norm_cfg = dict(type='BN')
model = dict(
    type='Model', backbone=dict(type='mmdet.ResNet', depth=18, norm_cfg=norm_cfg, init_cfg=None))
""")
    (tmp_path / 'child.py').write_text("_base_ = 'base.py'\nnorm_cfg = dict(type='UBN')\n")
    child = Config.fromfile(tmp_path / 'child.py')
    config = make_config(tmp_path, child.model, norm_cfg=child.norm_cfg, **images())
    with pytest.raises(RuntimeError, match='norm_cfg=.*top level.*changes nothing'):
        train(config)


@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), None, 'UBN'])
def test_other_norm_cfg_at_the_top_level_is_no_error(tmp_path, norm_cfg):
    train(make_config(tmp_path, block(dict(type='BN')), max_iters=1, norm_cfg=norm_cfg))


def test_norm_cfg_that_the_model_uses_is_no_error(tmp_path):
    norm_cfg = dict(type='UBN')
    model = dict(type='Model', backbone=dict(norm_cfg=norm_cfg, **RESNET))
    train(make_config(tmp_path, model, max_iters=1, norm_cfg=norm_cfg, **images()))


REPLACEMENTS = (nn.BatchNorm2d, nn.SyncBatchNorm, MMCVSyncBatchNorm, FrozenBatchNorm2d)
# How a config may name the layer.
UBN_TYPES = ('UBN', 'mmengine.UBN', 'SyncUBN', UBN, UBN2d, SyncUBN)


@pytest.mark.parametrize('norm', REPLACEMENTS)
@pytest.mark.usefixtures('process_group')
def test_replaced_layers_raise_and_name_the_component(tmp_path, norm):
    backbone = dict(norm_cfg=dict(type='UBN'), **RESNET)
    model = dict(type='Model', backbone=backbone, replace=('backbone', norm))
    # mmengine turns SyncBatchNorm back into a class of its own where there is one process.
    name = '_BatchNormXd' if 'Sync' in norm.__name__ else norm.__name__
    with pytest.raises(
        RuntimeError,
        match=f'model.backbone asks for UBN but the model has {name} there.*sync_bn.*use_syncbn',
    ):
        train(make_config(tmp_path, model, **images()))


@pytest.mark.parametrize('kind', UBN_TYPES)
def test_component_that_asks_is_found_however_it_names_the_layer(tmp_path, kind):
    backbone = dict(norm_cfg=dict(type=kind), **RESNET)
    model = dict(type='Model', backbone=backbone, replace=('backbone', nn.BatchNorm2d))
    with pytest.raises(RuntimeError, match='model.backbone asks for UBN'):
        train(make_config(tmp_path, model, **images()))
    model.pop('replace')
    train(make_config(tmp_path, model, max_iters=1, **images()))


def test_replaced_layers_of_one_component_of_several(tmp_path):
    norm = dict(norm_cfg=dict(type='UBN'))
    neck = dict(type='mmdet.FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4, **norm)
    model = dict(type='Model', backbone=dict(RESNET, **norm), neck=neck)
    model['replace'] = ('neck', nn.BatchNorm2d)
    with pytest.raises(RuntimeError, match='model.neck asks for UBN.*BatchNorm2d'):
        train(make_config(tmp_path, model, **images()))

    part = dict(type=ConvModule, in_channels=3, out_channels=3, kernel_size=1, **norm)
    model = dict(type='Model', backbone=[part, part], replace=('backbone.1', nn.BatchNorm2d))
    with pytest.raises(RuntimeError, match='model.backbone.1 asks for UBN'):
        train(make_config(tmp_path, model))


def test_replaced_layers_that_a_list_asked_for(tmp_path):
    model = block(dict(type='UBN'), replace=('backbone', nn.BatchNorm2d))
    with pytest.raises(RuntimeError, match='model.backbone.*asks for UBN'):
        train(make_config(tmp_path, model))


@pytest.mark.parametrize('loop', ['val', 'test'])
def test_replaced_layers_raise_in_evaluation_too(tmp_path, loop):
    backbone = dict(norm_cfg=dict(type='UBN'), **RESNET)
    model = dict(type='Model', backbone=backbone)
    config = add_evaluation(make_config(tmp_path, model, **images()))
    assert getattr(start(config), loop)() == dict(count=2)
    config.model.replace = ('backbone', nn.BatchNorm2d)
    config.experiment_name = 'replaced'
    with pytest.raises(RuntimeError, match='model.backbone asks for UBN'):
        getattr(start(config), loop)()


def test_training_with_validation_follows_training_only(tmp_path):
    model = block(UNDECIDED, SCORED)
    config = add_evaluation(make_config(tmp_path, model, max_epochs=2))
    config.train_cfg.val_interval = 1
    runner = train(config)
    assert read_scalars(runner) == expected_scalars(runner.recorder.states, [4, 10])


def test_averaged_weights_in_validation_do_not_disturb(tmp_path):
    model = block(UNDECIDED, SCORED)
    config = add_evaluation(make_config(tmp_path, model, max_epochs=2))
    config.train_cfg.val_interval = 1
    config.custom_hooks = [
        dict(type='EMAHook', update_buffers=True),
        dict(type='CondensationHook'),
    ]
    config.default_hooks.checkpoint.interval = 2
    runner = train(config)
    states = runner.recorder.states
    assert read_scalars(runner) == expected_scalars(states, [4, 10])
    assert [states[12][LAYERS[0]][key] for key in ('open', 'closed')] == [7, 5]
    # The checkpoint has the averaged weights with the counters of the model. mmengine's average
    # has those of its first iteration.
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    (ema,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    averaged = ema.ema_model.module.state_dict()
    for layer in LAYERS[:2]:
        for counter in ('num_batches_tracked', 'num_batches_condensed', 'consecutive_condensed'):
            name = f'{layer}.{counter}'
            count = runner.model.state_dict()[name]
            assert saved['state_dict'][name] == saved['ema_state_dict'][f'module.{name}'] == count
        assert averaged[f'{layer}.num_batches_tracked'] == 1
        for name in (f'{layer}.weight', f'{layer}.running_mean'):
            assert torch.equal(saved['state_dict'][name], averaged[name])
    assert saved['state_dict'][f'{LAYERS[0]}.num_batches_tracked'] == 7
    assert all(torch.isfinite(value).all() for value in saved['state_dict'].values())


class _WithoutNorm(nn.Conv2d):
    def __init__(self, norm_cfg):
        super().__init__(3, 3, 1)


def test_component_that_has_no_norm_warns(tmp_path):
    model = dict(
        type='Model',
        backbone=dict(type='Block', norms=[dict(type='UBN')]),
        neck=dict(type=_WithoutNorm, norm_cfg=dict(type='UBN')),
    )
    runner = train(make_config(tmp_path, model, max_iters=1))
    assert warnings(runner) == ['model.neck asks for UBN but has no norm layer']


def test_efficient_evaluation_of_a_component_with_ubn_raises(tmp_path):
    backbone = dict(norm_cfg=dict(type='UBN'), **RESNET)
    config = make_config(tmp_path, dict(type='Model', backbone=backbone), **images())
    config.efficient_conv_bn_eval = ['backbone']
    with pytest.raises(RuntimeError, match='leave out.*efficient_conv_bn_eval'):
        train(config)


def test_starvation_warns_once_per_layer(tmp_path):
    norms = [
        dict(type='UBN', condensation_threshold=-1, warmup=0, patience=2),
        dict(type='UBN', condensation_threshold=-1, warmup=0, patience=100),
        dict(type='UBN', condensation_threshold=-1, warmup=6, patience=2),
    ]
    runner = train(make_config(tmp_path, block(*norms), max_iters=20))
    readmitted = [m.num_batches_readmitted.item() for m in runner.model.backbone.norms]
    # Two closed, one let through, and so on from the first batch and from the seventh.
    assert readmitted == [6, 0, 4]
    first, second = warnings(runner)
    for warning, layer in ((first, 'backbone.norms.0'), (second, 'backbone.norms.2')):
        assert 'The gate was closed 2 batches in a row' in warning
        assert f'in {layer}. If' in warning


def test_starvation_of_layers_of_different_patience_warns_in_one_line(tmp_path):
    norms = [
        dict(type='UBN', condensation_threshold=-1, warmup=0, patience=patience)
        for patience in (3, 1, 3)
    ]
    (warning,) = warnings(train(make_config(tmp_path, block(*norms))))
    assert 'closed 1 or 3 batches in a row' in warning
    assert 'in backbone.norms.0, backbone.norms.1, backbone.norms.2. If' in warning


def test_starvation_of_an_earlier_run_does_not_warn(tmp_path):
    runner = start(make_config(tmp_path, block(dict(type='UBN')), max_iters=4))
    # As after loading a checkpoint to go on with other settings.
    runner.model.backbone.norms[0].num_batches_readmitted.fill_(3)
    runner.train()
    assert warnings(runner) == []


class Stream(Dataset):
    """Images of batches of four: random ones, in ``condensed`` batches one image with noise."""

    metainfo = {}

    def __init__(self, condensed, num_batches=150):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(4 * num_batches, 3, 8, 8, generator=generator)
        common = torch.randn(num_batches, 3, 8, 8, generator=generator).repeat_interleave(4, 0)
        is_condensed = torch.tensor([i in condensed for i in range(num_batches)])
        share = 0.9 * is_condensed.repeat_interleave(4).view(-1, 1, 1, 1)
        self.images = share * common + (1 - share) * noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index])


def train_on_stream(work_dir, condensed, *norms, interval=10):
    config = make_config(work_dir, block(*norms), max_iters=150)
    config.default_hooks.logger.interval = interval
    config.train_dataloader.dataset = dict(type=Stream, condensed=condensed)
    return train(config)


FOLLOWING = dict(type='UBN', condensation_threshold='auto', warmup=20)


@pytest.mark.parametrize('interval', [10, 50])
@pytest.mark.parametrize(
    'condensed, since', [(range(82, 92), 80), (range(55, 150, 15), 50)], ids=['tail', 'some']
)
def test_condensed_data_are_named_once(tmp_path, condensed, since, interval):
    runner = train_on_stream(
        tmp_path, condensed, FOLLOWING, FOLLOWING, dict(type='UBN'), interval=interval
    )
    (warning,) = warnings(runner)
    expected = since // interval * interval
    assert f'look condensed since iteration {expected}:' in warning
    assert 'of backbone.norms.0, backbone.norms.1. Look at the data loader' in warning
    for word in ('order', 'shuffle=True', 'repeated', 'frames'):
        assert word in warning


@pytest.mark.parametrize('condensed', [(), range(60, 64)], ids=['none', 'four in a row'])
def test_ordinary_data_are_not_named(tmp_path, condensed):
    runner = train_on_stream(tmp_path, condensed, FOLLOWING, FOLLOWING)
    closed = [m.num_batches_condensed.item() for m in runner.model.backbone.norms]
    assert all(len(condensed) <= n < 5 for n in closed)
    assert warnings(runner) == []


def test_gates_of_few_layers_do_not_name_the_data(tmp_path):
    # Of four followed layers one has to close; the fifth is not asked.
    strict = FOLLOWING | dict(condensation_z=0, condensation_margin=0)
    relaxed = FOLLOWING | dict(condensation_margin=2)
    for number, is_named in ((3, True), (4, False)):
        norms = [strict, *[relaxed] * number, dict(type='UBN', condensation_threshold=-1)]
        runner = train_on_stream(tmp_path / str(number), (), *norms)
        assert runner.model.backbone.norms[0].num_batches_condensed > 20
        named = [w for w in warnings(runner) if 'look condensed' in w]
        assert len(named) == is_named
        assert all('of backbone.norms.0. Look' in warning for warning in named)


def test_a_lasting_change_of_the_data_is_said_to_be_followed(tmp_path):
    runner = train_on_stream(tmp_path, range(60, 150), FOLLOWING | dict(patience=20))
    data, change = warnings(runner)
    assert 'look condensed since iteration 60' in data
    assert 'closed 20 batches in a row, so that the change of the data' in change
    assert 'in backbone.norms.0. If it is none, raise patience' in change
    (layer,) = runner.model.backbone.norms
    assert layer.num_batches_condensed == 20 and 1 <= layer.num_batches_readmitted <= 3


@pytest.mark.parametrize('interval', [None, 50])
def test_epoch_that_is_shorter_than_the_interval_is_logged_and_warns(tmp_path, interval):
    # LoggerHook logs at the end of such an epoch; a run on a small data set has no others.
    model = block(dict(type='UBN', condensation_threshold=-1, warmup=0, patience=2))
    hook = dict(type='CondensationHook', interval=interval)
    config = make_config(tmp_path, model, hook, max_epochs=2)
    config.default_hooks.logger.interval = 50
    runner = train(config)
    assert list(read_scalars(runner)) == [6, 12]
    assert len(warnings(runner)) == 1


def test_model_built_by_hand(tmp_path):
    model = Model(backbone=dict(type='Block', norms=[UNDECIDED, SCORED]))
    runner = train(make_config(tmp_path, model, CondensationHook(), max_iters=8))
    assert read_scalars(runner) == expected_scalars(runner.recorder.states, [4, 8])


def test_flexible_runner(tmp_path):
    config = make_config(tmp_path, block(UNDECIDED, SCORED), max_iters=8, env_cfg=dict())
    runner = FlexibleRunner.from_cfg(config)
    runner.recorder = Recorder()
    runner.register_hook(runner.recorder)
    runner.train()
    assert read_scalars(runner) == expected_scalars(runner.recorder.states, [4, 8])


@pytest.mark.usefixtures('process_group')
def test_wrapped_model(tmp_path):
    model = Model(backbone=dict(type='Block', norms=[UNDECIDED, dict(SCORED, type='SyncUBN')]))
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    runner = start(make_config(tmp_path, wrapped, max_iters=4))
    runner.train()
    assert summary(runner).startswith('UBN: 2 layers (1 SyncUBN), 2 train')
    # By the names of the model itself.
    states = {4: {name: runner.recorder.states[4][f'module.{name}'] for name in LAYERS}}
    assert read_scalars(runner) == expected_scalars(states, [4])


def test_model_of_bn_alone_is_passed_over(tmp_path):
    model = block(dict(type='BN'), dict(type='BN'))
    runner = train(make_config(tmp_path, model))
    assert read_scalars(runner) == {}
    assert warnings(runner) == []
    assert runner.records.messages(logging.INFO) == []
    assert find_hook(runner)._layers == {}

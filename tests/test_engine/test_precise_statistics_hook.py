"""PreciseStatisticsHook in real runs on CPU, against the formulas in float64."""

import logging
import os
import random
import uuid
from pathlib import Path

import distributed
import mmdet.models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS, METRICS, MODELS
from mmengine.runner import BaseLoop, Runner
from reference import RECTIFIERS, statistics, ubn
from tiny_config import write_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Sampler

from ubn_det import UBN
from ubn_det.engine import PreciseStatisticsHook, prepare

assert mmdet.models, 'imported for its registrations'

C = 4
SEED = 11
# Both sides compute in float64 and differ in the order of their sums only.
EXACT = dict(rtol=1e-9, atol=1e-9)
# A gate that every batch but the first finds closed.
CLOSED = dict(type='UBN', condensation_threshold=-1, warmup=1, patience=1000)
STATISTICS = ('running_mean', 'running_var')


@pytest.fixture(scope='module', autouse=True)
def _registered():
    """Register what the configs name, and take it back."""
    registered = {
        MODELS: [PreciseModel],
        DATASETS: [PreciseImages],
        DATA_SAMPLERS: [UnevenSampler],
        METRICS: [PreciseMetric],
        HOOKS: [PreciseWitness],
        LOOPS: [PreciseLoop],
    }
    for registry, classes in registered.items():
        for cls in classes:
            registry.register_module(module=cls, force=True)
    yield
    for registry, classes in registered.items():
        for cls in classes:
            registry.module_dict.pop(cls.__name__)


class PreciseModel(BaseModel):
    """Convolutions with a norm each, the second pair called twice; random in all parameters.

    It remembers more than its norms do: a count in a buffer, in an attribute and in a list.
    """

    def __init__(self, norm, num_norms=2, untouched=(), norm_eval=False):
        super().__init__()
        self.norm_eval = norm_eval
        generator = torch.Generator().manual_seed(3)
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else C, C, 1).double() for i in range(num_norms)
        )
        self.norms = nn.ModuleList(
            MODELS.build(dict(norm, num_features=C)).double() for _ in range(num_norms)
        )
        # Never called.
        self.extra = nn.ModuleList(MODELS.build(cfg).double() for cfg in untouched)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
            for layer in (*self.norms, *self.extra):
                if layer.running_mean is not None:
                    layer.running_mean.fill_(5)
                    layer.running_var.fill_(7)
        self.register_buffer('calls', torch.zeros(()))
        self.num_calls = 0
        self.sizes = []
        self.fed = []

    def train(self, mode=True):
        super().train(mode)
        if self.norm_eval:
            self.norms[0].eval()
        return self

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs)
        if mode == 'loss':
            self.calls += 1
            self.num_calls += 1
            self.sizes.append(tuple(x.shape))
            Record.loss_inputs.append((torch.is_grad_enabled(), x))
            # Something random, as the sampling of regions.
            torch.rand(()), np.random.rand(), random.random()
        x = self.norms[0](self.convs[0](x)).relu()
        for conv, norm in zip(list(self.convs)[1:], list(self.norms)[1:], strict=True):
            norm(conv(x[..., ::2]))
            x = norm(conv(x))
        return dict(loss=x.square().mean()) if mode == 'loss' else [x.mean()]


class Record:
    """What happened in a run.

    Attributes:
        loss_inputs (list): Each training forward: with gradient or not, and its images.
    """

    loss_inputs: list = []

    @classmethod
    def clear(cls):
        cls.loss_inputs = []


class PreciseImages(Dataset):
    """Images whose width depends on their place, with noise drawn anew from every generator."""

    metainfo = {}

    def __init__(self, length=24, noise=1.0):
        generator = torch.Generator().manual_seed(1)
        self.images = [
            (1 + i % 5) * torch.randn(3, 4, 4, generator=generator).double() + i % 3
            for i in range(length)
        ]
        self.noise = noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return dict(inputs=self.images[index] + self.noise * noise)


class UnevenSampler(Sampler):
    """Even in training, and of ``lengths`` by rank with another seed."""

    def __init__(self, dataset, seed, lengths=(8, 4)):
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.length = 8 if seed == SEED else lengths[rank]
        self.offset = 3 * rank

    def __iter__(self):
        return iter(range(self.offset, self.offset + self.length))

    def __len__(self):
        return self.length


class PreciseMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


class PreciseLoop(BaseLoop):
    """A loop that mmengine does not have."""

    max_epochs, max_iters, epoch, iter, val_interval, val_begin = 1, 1, 0, 0, 1, 1

    def run(self):
        self.runner.call_hook('before_train')


class PreciseWitness(Hook):
    """Keeps buffers at evaluation, and when they changed between two iterations."""

    priority = 'LOWEST'

    def __init__(self):
        self.at_evaluation = {}
        self.after_evaluation = {}

    def before_val_epoch(self, runner):
        self.at_evaluation[runner.iter] = state(runner.model)

    def after_val_epoch(self, runner, metrics=None):
        self.after_evaluation[runner.iter] = state(runner.model)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def make_config(folder, norm, train_cfg=None, hook=None, sampler=None, dataset=None, **settings):
    """Return the config of a run of 4 iterations that evaluates and saves after 2 and 4."""
    model = dict(type='PreciseModel', norm=norm, **settings.pop('model', {}))
    loading = dict(
        dataset=dict(type='PreciseImages', **dataset or {}),
        sampler=sampler or dict(type='InfiniteSampler', shuffle=True),
        batch_size=2,
        num_workers=0,
    )
    config = dict(
        default_scope='mmengine',
        experiment_name=uuid.uuid4().hex,
        work_dir=str(folder),
        model=model,
        train_dataloader=loading,
        val_dataloader=dict(loading, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='PreciseMetric'),
        val_cfg=dict(),
        train_cfg=train_cfg or dict(by_epoch=False, max_iters=4, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
        ),
        custom_hooks=[dict(type='PreciseWitness')],
        randomness=dict(seed=SEED),
    )
    if hook is not None:
        config['custom_hooks'].append(dict(type='PreciseStatisticsHook', **hook))
    config['custom_hooks'] += settings.pop('hooks', [])
    config['default_hooks'].update(settings.pop('default_hooks', {}))
    config.update(settings)
    return Config(config)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if record.module == 'precise_statistics_hook':
            self.messages.append(record.getMessage())


def train(config):
    """Run the config; the runner has a ``witness`` and ``warnings``, what the hook warned of."""
    Record.clear()
    runner = Runner.from_cfg(config)
    warnings = Warnings()
    runner.logger.handlers.append(warnings)
    runner.train()
    runner.warnings = warnings.messages
    runner.witness = next(h for h in runner.hooks if isinstance(h, PreciseWitness))
    return runner


def passes():
    """Return the images of the forwards without gradient, pass by pass."""
    found, was_training = [], True
    for with_gradient, x in Record.loss_inputs:
        if not with_gradient:
            if was_training:
                found.append([])
            found[-1].append(x)
        was_training = with_gradient
    return found


def expect(values, batches):
    """Return the statistics that PreciseModel's norms have over batches, by their names.

    Args:
        values (dict): State dict with the model's parameters.
        batches (list): Images; those of several ranks, which are normalized together, as a tuple.
    """
    params = [
        {k: values[f'norms.{i}.{k}'] for k in NAMES if f'norms.{i}.{k}' in values} for i in (0, 1)
    ]
    seen = ([], [])
    for parts in batches:
        parts = parts if isinstance(parts, tuple) else (parts,)
        parts = [conv(x, values, 0) for x in parts]
        seen[0].extend(parts)
        mean, var, _ = statistics(parts, params[0])
        for x in parts:
            x = ubn(x, params[0], 1e-5, mean, var)[0].relu()
            seen[1].extend([conv(x[..., ::2], values, 1), conv(x, values, 1)])
    expected = {}
    for i in (0, 1):
        mean, var, count = statistics(seen[i], params[i])
        expected[f'norms.{i}.running_mean'] = mean
        expected[f'norms.{i}.running_var'] = var * count / (count - 1)
    return expected


NAMES = ('weight', 'bias', *RECTIFIERS)


def conv(x, values, index):
    weight = values[f'convs.{index}.weight'][:, :, 0, 0]
    bias = values[f'convs.{index}.bias'][:, None, None]
    return torch.einsum('oc,nchw->nohw', weight, x) + bias


def assert_has(values, expected):
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, msg=lambda m, n=name: f'{n}: {m}', **EXACT)


def load(runner, name):
    path = Path(runner.work_dir) / name
    return torch.load(path, weights_only=False)


BN = dict(type='BN')


@pytest.mark.parametrize('norm', [BN, CLOSED, dict(type='SyncUBN')], ids=lambda n: n['type'])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_evaluation_and_checkpoint_have_the_statistics_of_many_batches(tmp_path, norm, by_epoch):
    settings = {}
    if by_epoch:
        settings = dict(
            # 2 batches an epoch.
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(length=4),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        )
    num_batches = 2 if by_epoch else 3
    runner = train(make_config(tmp_path, norm, hook=dict(num_batches=3), **settings))
    assert [len(batches) for batches in passes()] == [num_batches] * 2
    names = ['epoch_1.pth', 'epoch_2.pth'] if by_epoch else ['iter_2.pth', 'iter_4.pth']
    for iteration, batches, name in zip((2, 4), passes(), names, strict=True):
        values = runner.witness.at_evaluation[iteration]
        assert_has(values, expect(values, batches))
        saved = load(runner, name)['state_dict']
        for key, value in values.items():
            assert torch.equal(saved[key], value), key
    # Others each time.
    assert not torch.equal(passes()[0][0], passes()[1][0])
    assert not runner.warnings


def forget(values):
    return {k: v for k, v in values.items() if not k.endswith(STATISTICS)}


@pytest.mark.parametrize('norm', [BN, dict(type='UBN', condensation_threshold=None)])
@pytest.mark.parametrize('num_workers', [0, 1])
def test_training_goes_on_as_without_it(tmp_path, norm, num_workers):
    runs = []
    for hook in (None, dict(num_batches=5, interval=1)):
        config = make_config(tmp_path / str(hook), norm, hook=hook)
        config.train_dataloader.update(
            num_workers=num_workers, persistent_workers=bool(num_workers)
        )
        runner = train(config)
        runs.append(runner)
        runner.images = [x for with_gradient, x in Record.loss_inputs if with_gradient]
        runner.drawn = torch.rand(()), np.random.rand(), random.random()
        assert len(passes()) == (4 if hook else 0)
        # Its workers are waited for, for seconds, where the garbage collector ends them.
        runner.train_loop.dataloader_iterator._iterator = None
        runner.train_dataloader._iterator = None
    without, with_hook = runs
    for one, other in zip(without.images, with_hook.images, strict=True):
        assert torch.equal(one, other)
    assert without.drawn == with_hook.drawn
    expected, found = state(without.model), state(with_hook.model)
    for name, value in forget(expected).items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(found['norms.0.running_var'], expected['norms.0.running_var'])
    for name in ('num_calls', 'sizes', 'training'):
        assert getattr(with_hook.model, name) == getattr(without.model, name)
    for one, other in zip(without.model.norms, with_hook.model.norms, strict=True):
        for name in ('training', 'momentum', 'condensation_threshold'):
            assert getattr(one, name, None) == getattr(other, name, None)
        assert not other._forward_pre_hooks
        assert all(p.requires_grad for p in other.parameters())


def test_counters_and_score_stay(tmp_path):
    runner = train(make_config(tmp_path, CLOSED, hook=dict(num_batches=5)))
    first, second = runner.model.norms
    assert (first.num_batches_tracked, first.num_batches_condensed) == (1, 3)
    assert (second.num_batches_tracked, second.num_batches_condensed) == (1, 7)
    assert second.consecutive_condensed == 7


@pytest.mark.parametrize('noise', [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, noise):
    settings = dict(hook=dict(num_batches=3), dataset=dict(noise=noise))
    whole = train(make_config(tmp_path / 'whole', CLOSED, **settings))
    last = passes()[-1]
    short = dict(by_epoch=False, max_iters=2, val_interval=2)
    train(make_config(tmp_path / 'parts', CLOSED, train_cfg=short, **settings))
    resumed = train(make_config(tmp_path / 'parts', CLOSED, resume=True, **settings))
    for one, other in zip(passes()[-1], last, strict=True):
        assert torch.equal(one, other)
    # mmengine does not restore the random state, of which the training batches have noise then.
    for name, value in state(whole.model).items():
        if name != 'calls' and not noise:
            assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize('update_buffers', [False, True])
def test_averaged_weights_get_their_own_statistics(tmp_path, update_buffers):
    ema = dict(type='EMAHook', momentum=0.3, update_buffers=update_buffers)
    settings = dict(
        norm=dict(type='UBN', condensation_threshold=None),
        hooks=[ema],
    )
    plain = train(make_config(tmp_path / 'plain', **settings))
    runner = train(make_config(tmp_path / 'hook', hook=dict(num_batches=3), **settings))
    for iteration, batches in zip((2, 4), passes(), strict=True):
        values = runner.witness.at_evaluation[iteration]
        assert_has(values, expect(values, batches))
        saved = load(runner, f'iter_{iteration}.pth')
        for key, value in values.items():
            if key.startswith('norms') and ('running' in key or 'weight' in key):
                assert torch.equal(saved['state_dict'][key], value), key
        # The weights are averages, and the model in training is left alone.
        source = plain.witness.after_evaluation[iteration]
        assert not torch.equal(values['norms.0.weight'], source['norms.0.weight'])
        for key, value in source.items():
            assert torch.equal(runner.witness.after_evaluation[iteration][key], value), key
            assert torch.equal(saved['ema_state_dict'][f'module.{key}'], value), key
    # For an evaluation by itself mmengine starts from new averages, which are the model's own.
    runner.val()
    for key, value in state(runner.model).items():
        assert torch.equal(runner.witness.at_evaluation[4][key], value), key


def test_what_does_not_train_its_statistics_stays(tmp_path):
    untouched = [
        dict(type='BN', num_features=C),
        dict(type='UBN', num_features=C, momentum=0.0),
        dict(type='UBN', num_features=C, track_running_stats=False),
    ]
    model = dict(untouched=untouched, norm_eval=True)
    runner = train(make_config(tmp_path, CLOSED, hook=dict(num_batches=3), model=model))
    for layer in (runner.model.norms[0], *runner.model.extra[:2]):
        assert bool((layer.running_mean == 5).all() and (layer.running_var == 7).all())
    assert not bool((runner.model.norms[1].running_mean == 5).any())
    assert len(runner.warnings) == 2
    # That with momentum 0 is not waited for.
    assert '1 layers' in runner.warnings[0] and runner.warnings[0].endswith(': extra.0')


def test_nothing_to_do_is_said(tmp_path):
    model = dict(num_norms=1, norm_eval=True)
    runner = train(make_config(tmp_path, BN, hook={}, model=model))
    assert not passes()
    assert 'norm_eval' in runner.warnings[0]


def iterations_of(runner):
    """Return after how many iterations the passes came."""
    count, found = 0, []
    for with_gradient, _ in Record.loss_inputs:
        count += with_gradient
        if not with_gradient and count not in found:
            found.append(count)
    return found


@pytest.mark.parametrize(
    ('train_cfg', 'checkpoint', 'hook', 'expected'),
    [
        (dict(val_interval=2), dict(interval=3), {}, [2, 3, 4, 6, 7]),
        (dict(val_interval=2, val_begin=4), dict(interval=100), {}, [4, 6, 7]),
        (
            dict(val_interval=5, dynamic_intervals=[(4, 1)]),
            dict(interval=4, save_begin=1),
            {},
            [1, 3, 4, 5, 6, 7],
        ),
        (dict(val_interval=2), dict(interval=1), dict(interval=3), [3, 6, 7]),
        (dict(val_interval=7), dict(interval=-1), {}, [7]),
    ],
)
def test_when_statistics_are_set(tmp_path, train_cfg, checkpoint, hook, expected):
    config = make_config(
        tmp_path,
        BN,
        train_cfg=dict(by_epoch=False, max_iters=7, **train_cfg),
        hook=dict(num_batches=1, **hook),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, **checkpoint)),
        dataset=dict(length=2),
    )
    runner = train(config)
    assert iterations_of(runner) == expected
    if not hook:
        assert set(runner.witness.at_evaluation) <= set(expected)


@pytest.mark.parametrize(
    ('train_cfg', 'checkpoint', 'hook', 'expected'),
    [
        (dict(val_interval=2), dict(interval=3), {}, [4, 6, 8, 10]),
        (dict(val_interval=5), dict(by_epoch=False, interval=3), {}, [3, 6, 9, 10]),
        (dict(val_interval=1), dict(interval=1), dict(interval=4), [8, 10]),
        (dict(val_interval=9, val_begin=9), dict(interval=-1), {}, [10]),
    ],
)
def test_when_statistics_are_set_by_epoch(tmp_path, train_cfg, checkpoint, hook, expected):
    config = make_config(
        tmp_path,
        BN,
        train_cfg=dict(by_epoch=True, max_epochs=5, **train_cfg),
        hook=dict(num_batches=1, **hook),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', **checkpoint)),
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(length=4),
    )
    assert iterations_of(train(config)) == expected


@pytest.mark.parametrize(
    ('kwargs', 'error', 'name'),
    [
        (dict(num_batches=0), ValueError, 'num_batches'),
        (dict(num_batches=True), TypeError, 'num_batches'),
        (dict(num_batches=None), TypeError, 'num_batches'),
        (dict(num_batches='20'), TypeError, 'num_batches'),
        (dict(interval=0), ValueError, 'interval'),
        (dict(interval=2.0), TypeError, 'interval'),
    ],
)
def test_bad_arguments(kwargs, error, name):
    with pytest.raises(error, match=name):
        PreciseStatisticsHook(**kwargs)


def test_unknown_loop(tmp_path):
    settings = dict(train_cfg=dict(type='PreciseLoop'))
    with pytest.raises(ValueError, match='PreciseLoop evaluates: set its interval'):
        train(make_config(tmp_path, BN, hook={}, **settings))
    train(make_config(tmp_path, BN, hook=dict(interval=5), **settings))


def test_data_loader_without_a_config(tmp_path):
    config = make_config(tmp_path, BN, hook={})
    runner = Runner.from_cfg(config)
    runner._train_dataloader = Runner.build_dataloader(config.train_dataloader)
    with pytest.raises(ValueError, match='train_dataloader as a config, got a DataLoader'):
        runner.train()


def test_averages_that_are_not_all_that_is_evaluated(tmp_path):
    config = make_config(tmp_path, BN, hook={}, hooks=[dict(type='EMAHook')])
    runner = Runner.from_cfg(config)
    # As mmpretrain's.
    next(h for h in runner.hooks if isinstance(h, EMAHook)).evaluate_on_origin = True
    with pytest.raises(ValueError, match='evaluate_on_origin'):
        runner.train()


def train_on_rank(rank, folder, norm, lengths):
    """Train on two ranks; the images of the last pass, the state at evaluation, the warnings."""
    for registry, cls in (
        (MODELS, PreciseModel),
        (DATASETS, PreciseImages),
        (DATA_SAMPLERS, UnevenSampler),
        (METRICS, PreciseMetric),
        (HOOKS, PreciseWitness),
    ):
        registry.register_module(module=cls, force=True)
    # As launchers set it.
    os.environ['LOCAL_RANK'] = str(rank)
    config = make_config(
        folder,
        norm,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        sampler=dict(type='UnevenSampler', lengths=lengths),
        hook=dict(num_batches=3),
        launcher='pytorch',
    )
    prepare(config)
    runner = train(config)
    images = passes()[-1] if passes() else []
    return images, runner.witness.at_evaluation[4], runner.warnings, state(runner.model.module)


@pytest.mark.parametrize(
    'norm', [BN, CLOSED, dict(CLOSED, type='SyncUBN')], ids=lambda n: n['type']
)
def test_ranks_share_their_statistics(tmp_path, norm):
    # The second rank has 2 batches, the first one 4.
    results = distributed.run(2, train_on_rank, str(tmp_path), norm, (8, 4))
    images = [images for images, *_ in results]
    assert [len(i) for i in images] == [2, 2]
    values = {k.removeprefix('module.'): v for k, v in results[0][1].items()}
    batches = images[0] + images[1]
    if norm['type'] == 'SyncUBN':
        batches = list(zip(*images, strict=True))
    expected = expect(values, batches)
    for _, found, warnings, _ in results:
        assert_has({k.removeprefix('module.'): v for k, v in found.items()}, expected)
        assert not warnings


def test_a_rank_without_batches_hangs_nobody(tmp_path):
    results = distributed.run(2, train_on_rank, str(tmp_path), BN, (8, 0))
    for images, _, warnings, values in results:
        assert not images
        assert not bool((values['norms.0.running_mean'] == 5).any())
        assert ['left all running statistics' in w for w in warnings] == [True] * 2


def test_detector(tmp_path):
    """Masks, boxes and a data pipeline; the checkpoint is what was evaluated."""
    extra = (
        "custom_imports = dict(imports=['ubn_det'])\n"
        "custom_hooks = [dict(type='PreciseStatisticsHook', num_batches=2)]"
    )
    config = Config.fromfile(write_config(tmp_path, max_iters=2, extra=extra))
    config.work_dir = str(tmp_path / 'work')
    prepare(config)
    runner = Runner.from_cfg(config)
    seen = []

    def look(module, args):
        if module.training and not torch.is_grad_enabled():
            seen.append(args[0].detach().double())

    stem = runner.model.backbone.bn1
    stem.register_forward_pre_hook(look)
    runner.train()
    mean, var, count = statistics(seen, {'center_weight': stem.center_weight.detach().double()})
    saved = load(runner, 'iter_2.pth')['state_dict']
    for name, value in runner.model.state_dict().items():
        assert torch.equal(saved[name], value), name
    assert len(seen) == 2
    tolerance = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stem.running_mean.double(), mean, **tolerance)
    torch.testing.assert_close(stem.running_var.double(), var * count / (count - 1), **tolerance)
    layers = [m for m in runner.model.modules() if isinstance(m, _BatchNorm)]
    # One step, from a mean of 0 and a variance of 1, leads less far.
    assert layers and all(isinstance(m, UBN) and m.running_mean.abs().max() > 0 for m in layers)

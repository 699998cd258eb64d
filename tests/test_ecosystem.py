"""Tests of UBN under what torch, MMEngine and MMDetection do to models that have BN.

Each calls the real function. What BN does just as well is compared with BN; where UBN differs by
its nature, the test says so and holds it to that.
"""

import copy
import io
import pickle
import types
from pathlib import Path

import distributed
import mmdet.models
import pytest
import torch
import torch.distributed as dist
import torch.func
from mmdet.engine.hooks import MeanTeacherHook
from mmdet.engine.hooks.sync_norm_hook import SyncNormHook
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs, demo_mm_proposals
from mmengine.config import Config
from mmengine.hooks import SyncBuffersHook
from mmengine.model import BaseModel, ExponentialMovingAverage, StochasticWeightAverage
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import AveragedModel, update_bn

from ubn_det import UBN, SyncUBN
from ubn_det.layers.ubn import EXTRA_PARAMETERS, GATE_BUFFERS, RECTIFIER_GAIN

MMDET_CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
COUNTERS = ('num_batches_tracked', 'num_batches_condensed')


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, UBN)]


def randomize(model, std=0.3):
    """Give all UBN random parameters and statistics, as after some training."""
    for layer in layers_of(model):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def set_rectifiers(model, std):
    for layer in layers_of(model):
        for name in EXTRA_PARAMETERS:
            if getattr(layer, name) is not None:
                nn.init.normal_(getattr(layer, name), std=std)


def make_model(norm=None, **kwargs):
    """Return convolution, UBN, convolution."""
    if norm is None:
        norm = randomize(UBN(4, **{'condensation_threshold': 0.6, **kwargs}))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))


def make_resnet(norm='UBN', **kwargs):
    settings = dict(
        type='ResNet', depth=18, base_channels=4, stem_channels=4, norm_eval=False, init_cfg=None
    )
    if not isinstance(norm, dict):
        norm = dict(type=norm)
    return MODELS.build({**settings, 'norm_cfg': norm, **kwargs})


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, **kwargs):
    kwargs = kwargs or dict(rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, **kwargs)


def is_finite(model):
    return all(torch.isfinite(value).all() for value in model.state_dict().values())


class TestPadding:
    """Instance means see the padding, so that evaluation depends on it (as RBN's does)."""

    @staticmethod
    def change_from_padding(model, x):
        padded = nn.functional.pad(x, (0, x.shape[-1]))
        with torch.no_grad():
            expected, actual = model(x), model(padded)
        # Far enough from the padding for no convolution to see it.
        corner = (..., slice(4), slice(4))
        return (actual[corner] - expected[corner]).abs().max() / expected[corner].abs().max()

    @pytest.mark.parametrize('std, low, high', [(0, 0, 1e-5), (0.3, 1e-3, 10)])
    def test_of_one_image(self, std, low, high):
        backbone = make_resnet(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
        model = nn.Sequential(backbone).eval()
        for layer in layers_of(model):
            nn.init.uniform_(layer.running_var, 0.5, 2)
        set_rectifiers(model, std)
        change = self.change_from_padding(lambda x: model(x)[0], torch.randn(1, 3, 128, 128))
        assert low <= change <= high

    @pytest.mark.parametrize('std', [0, 0.3])
    def test_by_batch_mates(self, std):
        model = make_model(UBN(4)).eval()
        nn.init.normal_(model[1].running_mean)
        set_rectifiers(model, std)
        preprocess = MODELS.build(dict(type='DetDataPreprocessor', pad_size_divisor=32))
        small, large = torch.rand(3, 64, 64), torch.rand(3, 64, 128)

        def run(*images):
            samples = [mmdet.structures.DetDataSample() for _ in images]
            for sample, image in zip(samples, images, strict=True):
                sample.set_metainfo(dict(img_shape=image.shape[1:]))
            inputs = preprocess(dict(inputs=list(images), data_samples=samples))['inputs']
            with torch.no_grad():
                return model(inputs)[0, :, :60, :60]

        # Batches of one, MMDetection's default for tests, are padded to the divisor only.
        with torch.no_grad():
            assert_same(run(small), model(small[None])[0, :, :60, :60])
        assert torch.allclose(run(small, large), run(small), atol=1e-5) is (std == 0)
        # A batch mate of the same size changes nothing.
        assert_same(run(small, small.flip(1)), run(small), rtol=1e-5, atol=1e-6)

    def test_flip_is_exact(self):
        model = make_model(affine_kernel=1).eval()
        flip = copy.deepcopy(model)
        flip[0].weight.data = flip[0].weight.data.flip(-1)
        x = torch.randn(2, 3, 16, 16)
        assert_same(flip(x.flip(-1)).flip(-1), model(x), rtol=1e-5, atol=1e-5)


class TestAveraging:
    """Averages of weights: their model evaluates as its averaged numbers say."""

    AVERAGES = {
        'EMA': lambda model, buffers: ExponentialMovingAverage(
            model, momentum=0.25, update_buffers=buffers
        ),
        'SWA': lambda model, buffers: StochasticWeightAverage(model, update_buffers=buffers),
        'torch': lambda model, buffers: AveragedModel(model, use_buffers=buffers),
    }

    @pytest.mark.parametrize('name', AVERAGES)
    @pytest.mark.parametrize('buffers', [True, False])
    @pytest.mark.parametrize('layer', [UBN, SyncUBN])
    def test_average(self, name, buffers, layer):
        model = make_model(randomize(layer(4, warmup=2, condensation_threshold=0.6)))
        average = self.AVERAGES[name](model, buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        states, batches = [], []
        for step in range(6):
            batch = torch.randn(3, 3, 6, 6)
            if step == 4:
                # Must not reach the averages.
                batch[0, 0, 0, 0] = torch.inf
            batches.append(batch)
            optimizer.zero_grad()
            if step != 4:
                model(batch).square().mean().backward()
                optimizer.step()
            else:
                model(batch)
            average.update_parameters(model)
            states.append(copy.deepcopy(model.state_dict()))
        assert is_finite(average)

        expected = states[0]
        for step, state in enumerate(states[1:], start=1):
            weight = 0.25 if name == 'EMA' else 1 / (step + 1)
            for key, value in expected.items():
                if value.is_floating_point():
                    value.lerp_(state[key], weight)
        found = average.module.state_dict()
        parameters = [key for key, _ in model.named_parameters()]
        statistics = ['1.running_mean', '1.running_var', '1.condensation']
        for key in parameters + (statistics if buffers else []):
            assert_same(found[key], expected[key], rtol=1e-5, atol=1e-6)
        for key in [] if buffers else statistics:
            assert_same(found[key], states[-1][key])
        # Integers are taken once at the start where buffers are averaged: what counts batches in
        # an averaged model says nothing.
        counts = [found[f'1.{key}'].item() for key in COUNTERS]
        assert counts == ([1, 0] if buffers else [5, 1])

        # A fresh model with these numbers does the same.
        fresh = make_model(layer(4))
        fresh.load_state_dict(found)
        x = torch.randn(2, 3, 6, 6)
        actual = average.eval()(x)
        assert torch.isfinite(actual).all()
        assert_same(actual, fresh.eval()(x))

    @pytest.mark.parametrize('layer', [UBN, SyncUBN])
    def test_training_goes_on_from_an_average(self, layer):
        model = make_model(layer(4, warmup=2, condensation_threshold=-1))
        average = ExponentialMovingAverage(model, update_buffers=True)
        for _ in range(4):
            model(torch.randn(3, 3, 6, 6))
            average.update_parameters(model)
        assert [getattr(model[1], key).item() for key in COUNTERS] == [2, 2]
        # What a checkpoint of EMAHook has as its weights. The warm-up starts over at most.
        model.load_state_dict(average.module.state_dict())
        for _ in range(3):
            model(torch.randn(3, 3, 6, 6)).sum().backward()
        assert [getattr(model[1], key).item() for key in COUNTERS] == [2, 2]
        assert is_finite(model)

    @pytest.mark.parametrize('momentum', [0.1, None])
    def test_update_bn(self, momentum):
        # Neither the threshold nor old counters keep the statistics from being computed anew.
        layer = UBN(4, momentum=momentum, condensation_threshold=-1, warmup=0)
        model = make_model(randomize(layer))
        for name in ('num_batches_tracked', *GATE_BUFFERS):
            getattr(layer, name).fill_(7)
        batches = [2 + torch.randn(3, 3, 6, 6) for _ in range(5)]
        update_bn(batches, model)
        assert layer.momentum is momentum or layer.momentum == momentum
        assert [getattr(layer, key).item() for key in COUNTERS] == [5, 0]

        centered = [model[0](batch).detach() for batch in batches]
        weight = RECTIFIER_GAIN * layer.center_weight.detach().view(-1, 1, 1)
        centered = [x + weight * x.mean((2, 3), keepdim=True) for x in centered]
        mean = torch.stack([x.mean((0, 2, 3)) for x in centered]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in centered]).mean(0)
        assert_same(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        assert_same(layer.running_var, var, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('skip_buffer', [True, False])
    def test_mean_teacher(self, skip_buffer):
        # MMDetection's default leaves the teacher with the statistics of its start.
        model = nn.Module()
        model.student, model.teacher = make_model(), make_model()
        hook = MeanTeacherHook(momentum=0.5, skip_buffer=skip_buffer)
        hook.momentum_update(model, 1)
        start = model.teacher[1].running_mean.clone()
        followed = torch.equal(start, model.student[1].running_mean)
        assert followed is not skip_buffer
        for _ in range(3):
            model.student(3 + torch.randn(2, 3, 6, 6))
            hook.momentum_update(model, 0.5)
        assert torch.equal(model.teacher[1].running_mean, start) is skip_buffer
        assert_same(model.teacher[1].center_weight, model.student[1].center_weight)
        assert model.teacher[1].num_batches_tracked == 0
        assert is_finite(model)


class TestEmptyBatch:
    """A head that gets no regions must not lose its statistics."""

    @pytest.fixture
    def roi_head(self):
        cfg = Config.fromfile(MMDET_CONFIGS / 'mask_rcnn' / 'mask-rcnn_r50_fpn_1x_coco.py').model
        norm_cfg = dict(type='UBN')
        head = cfg.roi_head
        for extractor in (head.bbox_roi_extractor, head.mask_roi_extractor):
            extractor.out_channels = 8
        head.bbox_head.update(
            type='Shared4Conv1FCBBoxHead',
            in_channels=8,
            conv_out_channels=8,
            fc_out_channels=8,
            num_classes=4,
            norm_cfg=norm_cfg,
        )
        head.mask_head.update(in_channels=8, conv_out_channels=8, num_classes=4, norm_cfg=norm_cfg)
        head.update(train_cfg=cfg.train_cfg.rcnn, test_cfg=cfg.test_cfg.rcnn)
        return MODELS.build(head)

    def test_in_training_without_objects(self, roi_head):
        shapes = [(3, 64, 64)] * 2
        feats = [torch.rand(2, 8, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]

        def train(num_items):
            samples = demo_mm_inputs(
                2, shapes, num_items=num_items, num_classes=4, with_mask=True
            )['data_samples']
            proposals = demo_mm_proposals(shapes, 20)
            losses = roi_head.loss(feats, proposals, samples)
            sum(value for key, value in losses.items() if 'loss' in key).backward()

        train([0, 0])
        mask_layers, box_layers = layers_of(roi_head.mask_head), layers_of(roi_head.bbox_head)
        assert [len(mask_layers), len(box_layers)] == [4, 4]
        fresh = UBN(8).state_dict()
        for layer in mask_layers:
            state = layer.state_dict()
            # No batch, not even one that was refused.
            assert_same({key: state[key] for key in fresh}, fresh)
            assert not any(p.grad.any() for p in layer.parameters())
        assert {layer.num_batches_tracked.item() for layer in box_layers} == {1}
        train([3, 2])
        assert {layer.num_batches_tracked.item() for layer in mask_layers} == {1}
        assert is_finite(roi_head)
        roi_head.eval()
        assert torch.isfinite(roi_head.mask_head(torch.rand(2, 8, 14, 14))).all()

    @pytest.mark.parametrize('training', [True, False])
    def test_of_the_mask_head(self, roi_head, training):
        head = roi_head.mask_head.train(training)
        randomize(head)
        before = copy.deepcopy(head.state_dict())
        y = head(torch.empty(0, 8, 14, 14, requires_grad=True))
        assert y.shape == (0, 4, 28, 28)
        y.sum().backward()
        assert_same(head.state_dict(), before)
        # Every parameter takes part, which DistributedDataParallel demands.
        assert all(p.grad is not None for layer in layers_of(head) for p in layer.parameters())


class TestActivationCheckpointing:
    """A forward that is run again in the backward pass decides and counts nothing again."""

    @staticmethod
    def train_both(plain, checkpointed, shape, dtype=torch.float64):
        """Train two copies on the same batches and compare all that they compute."""
        closed = []
        plain.to(dtype)
        checkpointed.to(dtype)
        for _ in range(5):
            x = 1 + torch.randn(shape, dtype=dtype)
            xs = [x.clone().requires_grad_() for _ in range(2)]
            for model, x in zip((plain, checkpointed), xs, strict=True):
                model.zero_grad()
                y = model(x)
                parts = y if isinstance(y, tuple) else [y]
                sum(part.square().mean() for part in parts).backward()
            assert_same(gradients_of(checkpointed), gradients_of(plain), rtol=1e-9, atol=1e-9)
            assert_same(xs[1].grad, xs[0].grad, rtol=1e-9, atol=1e-9)
            assert_same(checkpointed.state_dict(), plain.state_dict())
            closed += [layer.num_batches_condensed.item() for layer in layers_of(plain)]
        # The gate closes in between: this is where making the decision again would go wrong.
        assert 0 < max(closed) < 5

    @pytest.mark.filterwarnings('ignore:.*use_reentrant')
    @pytest.mark.parametrize('affine_kernel', [1, 3])
    def test_with_cp_of_resnet(self, affine_kernel):
        norm = dict(
            type='UBN',
            condensation_threshold=0.0,
            warmup=1,
            affine_kernel=affine_kernel,
        )
        settings = dict(
            depth=50, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)
        )
        plain = make_resnet(norm, **settings)
        for layer in layers_of(plain):
            for parameter in layer.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        checkpointed = make_resnet(norm, with_cp=True, **settings)
        checkpointed.load_state_dict(plain.state_dict())
        self.train_both(plain, checkpointed, (2, 3, 32, 32))

    @pytest.mark.filterwarnings('ignore:.*use_reentrant')
    def test_of_mmengine(self):
        plain = nn.Sequential(
            nn.Conv2d(3, 3, 1), make_model(condensation_threshold=-1, warmup=2, patience=2)
        )
        checkpointed = copy.deepcopy(plain)
        turn_on_activation_checkpointing(checkpointed, '1')
        self.train_both(plain, checkpointed, (2, 3, 8, 8))


class TestSeveralForwards:
    """A layer that is called more than once before the backward pass."""

    @pytest.mark.parametrize(
        'arguments',
        [
            dict(condensation_threshold=-1, warmup=1),
            dict(condensation_threshold=-1, warmup=1, affine_kernel=1),
            dict(condensation_threshold=None, centering=False, scaling=False),
        ],
    )
    def test_in_training(self, arguments):
        layer = randomize(UBN(4, **arguments)).double()
        one_by_one = copy.deepcopy(layer)
        batches = [torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(3)]
        sum(layer(batch).square().sum() for batch in batches).backward()
        for batch in batches:
            one_by_one(batch).square().sum().backward()
        assert_same(gradients_of(layer), gradients_of(one_by_one), rtol=1e-9, atol=1e-9)
        assert_same(layer.state_dict(), one_by_one.state_dict())

    @pytest.mark.parametrize(
        'arguments',
        [
            dict(),
            dict(affine_kernel=3),
            dict(centering=False, scaling=False),
            dict(centering=False, scaling=False, condensation_threshold=None),
        ],
    )
    def test_in_evaluation_and_then_in_training(self, arguments):
        # Training moves the statistics that evaluation has used, before its backward pass.
        layer = randomize(UBN(4, **arguments)).double()
        reference = copy.deepcopy(layer).eval()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        reference(xs[0]).square().sum().backward()
        y = layer.eval()(xs[1])
        layer.train()(1 + torch.randn(2, 4, 5, 5, dtype=torch.float64))
        y.square().sum().backward()
        assert_same(xs[1].grad, xs[0].grad, rtol=1e-9, atol=1e-9)
        assert_same(gradients_of(layer), gradients_of(reference), rtol=1e-9, atol=1e-9)

    def test_shared_head_counts_each_level(self):
        # Heads share their layers between levels: an iteration is as many batches, in the warm-up
        # and in all else that is counted, and the score is that of the last level.
        head = MODELS.build(
            dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=4,
                feat_channels=4,
                stacked_convs=1,
                norm_cfg=dict(type='UBN', condensation_threshold=-1, warmup=7),
            )
        )
        feats = [torch.rand(2, 4, size, size) for size in (16, 8, 4, 2, 1)]
        with torch.no_grad():
            head(feats)
        (layer, _) = layers_of(head)
        assert [getattr(layer, key).item() for key in COUNTERS] == [5, 0]
        with torch.no_grad():
            last = nn.functional.conv2d(feats[-1], head.cls_convs[0].conv.weight, padding=1)
        score = nn.functional.cosine_similarity(*last.flatten(1), dim=0)
        assert_same(layer.condensation, score, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            head(feats)
        assert [getattr(layer, key).item() for key in COUNTERS] == [7, 3]


class TestTypes:
    @pytest.mark.parametrize('arguments', [dict(), dict(centering=False, scaling=False)])
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_autocast_keeps_the_type(self, arguments, training, dtype):
        model = make_resnet(dict(type='UBN', **arguments))
        model.train(training)
        types = set()
        for layer in layers_of(model):
            layer.register_forward_hook(
                lambda layer, args, y: types.add((args[0].dtype, y.dtype)) or None
            )
        with torch.autocast('cpu', dtype=dtype):
            y = model(torch.randn(2, 3, 64, 64))[-1]
        assert types == {(dtype, dtype)}
        y.float().square().mean().backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert is_finite(model)

    def test_values_that_half_precision_cannot_square(self):
        layer = UBN(4, condensation_threshold=0.6)
        x = (3000 + 1000 * torch.randn(4, 4, 8, 8)).half()
        y = layer(x)
        assert y.dtype == torch.half
        assert torch.isfinite(y).all()
        assert layer.num_batches_tracked == 1
        expected = nn.BatchNorm2d(4)(x.float())
        assert_same(y.float(), expected, rtol=0, atol=5e-3)

    def test_half_converts_the_statistics_and_not_the_counters(self):
        layer = randomize(UBN(4, condensation_threshold=0.6)).half()
        assert {p.dtype for p in layer.parameters()} == {torch.half}
        types = {name: buffer.dtype for name, buffer in layer.named_buffers()}
        assert types.pop('running_mean') == types.pop('running_var') == torch.half
        for name in ('condensation', 'condensation_mean', 'condensation_var'):
            assert types.pop(name) == torch.half
        assert set(types.values()) == {torch.int64}
        assert torch.isfinite(layer(torch.randn(2, 4, 5, 5).half())).all()
        assert torch.isfinite(layer.eval()(torch.randn(2, 4, 5, 5).half())).all()

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('affine_kernel', [1, 3])
    def test_channels_last_is_kept(self, training, affine_kernel):
        layer = randomize(UBN(4, affine_kernel=affine_kernel)).train(training)
        x = torch.randn(2, 4, 5, 6)
        expected = copy.deepcopy(layer)(x)
        y = layer(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert expected.is_contiguous()
        assert_same(y, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('shape', [(1, 4), (1, 4, 1, 1)])
    def test_single_value_raises_as_in_bn(self, shape):
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            UBN(4)(torch.randn(shape))
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4)(torch.randn(shape))

    @pytest.mark.parametrize('shape', [(4,), (2, 4, 3, 3, 3, 3)])
    def test_other_dimensions_raise(self, shape):
        with pytest.raises(ValueError, match=f'got {len(shape)}-D input'):
            UBN(4)(torch.randn(shape))

    @pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
    def test_amp_optim_wrapper_raises_on_cpu(self):
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        with pytest.raises(AssertionError, match='only available'):
            AmpOptimWrapper(optimizer=optimizer)


class TestCheckpoints:
    @staticmethod
    def save(model, path, **kwargs):
        torch.save(dict(state_dict=model.state_dict(), **kwargs), path)
        return str(path)

    @staticmethod
    def make_bn():
        model = make_resnet('BN')
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1)
                module.num_batches_tracked.fill_(9)
        # What a ResNet returns from eval() is None.
        model.eval()
        return model

    def assert_is(self, model, bn):
        for layer in layers_of(model):
            assert not any(getattr(layer, name).any() for name in GATE_BUFFERS)
            extras = [getattr(layer, name) for name in EXTRA_PARAMETERS]
            assert not any(extra.any() for extra in extras if extra is not None)
            assert layer.num_batches_tracked == 9
        x = torch.randn(2, 3, 64, 64)
        model.eval()
        with torch.no_grad():
            assert_same(model(x), bn(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('norm', ['UBN', 'SyncUBN'])
    @pytest.mark.parametrize('trained', [False, True])
    @pytest.mark.parametrize('metadata', [True, False])
    @pytest.mark.parametrize('loader', ['torch', 'mmengine'])
    def test_bn_into_ubn(self, tmp_path, norm, trained, metadata, loader):
        bn, model = self.make_bn(), make_resnet(dict(type=norm, affine_kernel=3))
        if trained:
            randomize(model)
            for layer in layers_of(model):
                layer.num_batches_condensed.fill_(5)
        state = bn.state_dict()
        if loader == 'torch':
            model.load_state_dict(state if metadata else dict(state), strict=True)
        else:
            torch.save(dict(state_dict=state if metadata else dict(state)), tmp_path / 'bn.pth')
            load_checkpoint(model, str(tmp_path / 'bn.pth'), map_location='cpu', strict=True)
        self.assert_is(model, bn)
        # The loaders hand over copies: the state itself has not grown.
        assert not any('center_weight' in key for key in state)

    def test_pretrained_bn_of_a_part_of_a_model(self, tmp_path):
        bn = self.make_bn()
        path = self.save(nn.ModuleDict(dict(backbone=bn)), tmp_path / 'detector.pth')
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
        model = make_resnet('UBN', init_cfg=init_cfg)
        model.init_weights()
        self.assert_is(model, bn)

    def test_ubn_into_bn_is_said(self, tmp_path, capsys):
        path = self.save(make_resnet('UBN'), tmp_path / 'ubn.pth')
        with pytest.raises(RuntimeError, match=r'Unexpected key.*bn1.center_weight'):
            make_resnet('BN').load_state_dict(torch.load(path)['state_dict'])
        with pytest.raises(RuntimeError, match='unexpected key.*bn1.center_weight'):
            load_checkpoint(make_resnet('BN'), path, strict=True)
        capsys.readouterr()
        load_checkpoint(make_resnet('BN'), path)
        assert 'bn1.center_weight' in capsys.readouterr().out

    def test_ubn_into_ubn(self, tmp_path):
        model, again = randomize(make_resnet('UBN')), make_resnet('SyncUBN')
        model(torch.randn(2, 3, 64, 64))
        load_checkpoint(again, self.save(model, tmp_path / 'ubn.pth'), strict=True)
        assert_same(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize('wrapped', [True, False])
    def test_optimizer_of_bn_does_not_fit(self, wrapped):
        optimizers = [
            torch.optim.AdamW(model.parameters()) for model in (self.make_bn(), make_resnet('UBN'))
        ]
        if wrapped:
            optimizers = [OptimWrapper(optimizer=optimizer) for optimizer in optimizers]
        with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
            optimizers[1].load_state_dict(optimizers[0].state_dict())

    def test_into_a_wrapper_for_augmented_tests(self, tmp_path):
        class Detector(BaseModel):
            def __init__(self, norm):
                super().__init__()
                self.backbone = make_resnet(norm)

            def forward(self):
                raise NotImplementedError

        bn = Detector('BN')
        wrapper = DetTTAModel(tta_cfg=None, module=Detector('UBN'))
        load_checkpoint(wrapper, self.save(bn, tmp_path / 'bn.pth'), strict=True)
        assert_same(wrapper.module.backbone.conv1.weight, bn.backbone.conv1.weight)

    def test_meta_device(self):
        with torch.device('meta'):
            layer = UBN(4, affine_kernel=3)
        assert {t.device.type for t in layer.state_dict().values()} == {'meta'}
        layer = layer.to_empty(device='cpu')
        for tensor in layer.state_dict().values():
            tensor.fill_(9)
        layer.reset_parameters()
        assert_same(layer.state_dict(), UBN(4, affine_kernel=3).state_dict())


class TestCopies:
    def test_after_training(self):
        # Nothing with a graph may be left in the layer.
        model = make_model(affine_kernel=3)
        x = torch.randn(2, 3, 6, 6)
        model(x).sum().backward()
        model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(again.state_dict(), model.state_dict())
            assert_same(again.eval()(x), model.eval()(x))

    def test_with_a_process_group(self, process_group):
        group = dist.new_group([0])
        model = make_model(randomize(SyncUBN(4, process_group=group)))
        x = torch.randn(2, 3, 6, 6)
        model(x)
        again = ExponentialMovingAverage(model).module
        assert again[1].process_group is group
        assert_same(again.train()(x), model(x))
        loaded = pickle.loads(pickle.dumps(model))
        assert_same(loaded.eval()(x), model.eval()(x))
        with pytest.raises(RuntimeError, match='did not survive pickling'):
            loaded.train()(x)


class TestTransforms:
    def test_functional_batch_norm_without_statistics(self):
        model = torch.func.replace_all_batch_norm_modules_(make_model())
        layer = model[1]
        assert type(layer) is UBN
        assert layer.running_mean is None
        x = torch.randn(2, 3, 6, 6)
        y = model.train()(x)
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        # Evaluation normalizes with the batch too, as BN without statistics does.
        assert_same(model.eval()(x), y)
        assert_same(layer.condensation.item(), 0.0)

    def test_functional_transform(self):
        model = torch.func.replace_all_batch_norm_modules_(make_model()).double()
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        parameters = dict(model.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        found = torch.func.grad(loss)(parameters)
        loss(parameters).backward()
        assert_same(found, gradients_of(model), rtol=1e-9, atol=1e-9)

    @pytest.mark.filterwarnings('ignore::DeprecationWarning')
    @pytest.mark.parametrize('affine_kernel', [1, 3])
    def test_trace_of_evaluation(self, affine_kernel):
        model = make_model(affine_kernel=affine_kernel).eval()
        with torch.no_grad():
            traced = torch.jit.trace(model, torch.randn(2, 3, 6, 6))
            frozen = torch.jit.freeze(traced)
            for shape in ((2, 3, 6, 6), (1, 3, 9, 5)):
                x = torch.randn(shape)
                for module in (traced, frozen):
                    assert_same(module(x), model(x), rtol=1e-5, atol=1e-5)
            torch.jit.save(traced, file := io.BytesIO())
            file.seek(0)
            assert_same(torch.jit.load(file)(x), model(x), rtol=1e-5, atol=1e-5)
            # It runs where this package is not installed.
            assert 'ubn_det::' not in str(traced.inlined_graph)

    @pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
    @pytest.mark.parametrize('norm', [UBN, nn.BatchNorm2d])
    def test_trace_of_training_bakes_it_in(self, norm):
        # The same with BN: a trace of training mode stays in training mode.
        model = make_model(norm(4))
        nn.init.normal_(model[1].running_mean, std=3)
        x = torch.randn(2, 3, 6, 6)
        traced = torch.jit.trace(model, x)
        assert model[1].num_batches_tracked > 1
        traced.eval()
        assert (traced(x) - model.eval()(x)).abs().max() > 0.1

    @pytest.mark.filterwarnings('ignore::DeprecationWarning')
    def test_script_raises(self):
        with pytest.raises(RuntimeError, match='UBN'):
            torch.jit.script(make_model())

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('affine_kernel', [1, 3])
    @pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
    def test_compile(self, training, affine_kernel, backend):
        torch.compiler.reset()
        model = make_model(condensation_threshold=-1, warmup=2, affine_kernel=affine_kernel)
        model.double().train(training)
        reference = copy.deepcopy(model)
        compiled = torch.compile(model, backend=backend, fullgraph=True)

        def train():
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            ys = [module(x) for module in (compiled, reference)]
            assert_same(*ys)
            for y in ys:
                y.square().sum().backward()

        train()
        with torch.compiler.set_stance('fail_on_recompile'):
            for _ in range(3):
                train()
        # What is compiled keeps the instance means of small maps, too, and does not sum them anew.
        assert_same(gradients_of(model), gradients_of(reference), rtol=1e-9, atol=1e-9)
        assert_same(model.state_dict(), reference.state_dict())
        if training:
            assert [getattr(model[1], key).item() for key in COUNTERS] == [2, 2]

    @pytest.mark.parametrize('training', [True, False])
    def test_compile_by_inductor(self, training):
        torch.compiler.reset()
        model = make_model(condensation_threshold=-1, warmup=1).double().train(training)
        reference = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            ys = [module(x) for module in (compiled, reference)]
            torch.testing.assert_close(*ys, rtol=1e-9, atol=1e-9)
            for y in ys:
                y.square().sum().backward()
        torch.testing.assert_close(model.state_dict(), reference.state_dict())
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize('training', [True, False])
    def test_recompiles_only_where_bn_does(self, training):
        def recompilations(norm):
            torch.compiler.reset()
            model = make_model(norm).train(training)
            counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            for shape in [(2, 3, 6, 6), (2, 3, 8, 9), (3, 3, 12, 7), (5, 3, 40, 30), (4, 3, 5, 5)]:
                compiled(torch.randn(shape)).sum().backward()
            return counter.frame_count

        assert (
            recompilations(UBN(4, condensation_threshold=0.6))
            == recompilations(nn.BatchNorm2d(4))
            <= 3
        )


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_fully_shard(dtype):
    model = make_model()
    reference = copy.deepcopy(model)
    policy = dict(mp_policy=MixedPrecisionPolicy(param_dtype=dtype)) if dtype else {}
    fully_shard(model, mesh=init_device_mesh('cpu', (1,)), **policy)
    x = torch.randn(2, 3, 6, 6)
    ys = [module(x) for module in (model, reference)]
    tolerance = dict(rtol=0.1, atol=0.1) if dtype else dict(rtol=0, atol=0)
    torch.testing.assert_close(ys[0].float(), ys[1], **tolerance)
    for y in ys:
        y.square().sum().backward()
    for sharded, plain in zip(model.parameters(), reference.parameters(), strict=True):
        if dtype is None:
            assert_same(sharded.grad.full_tensor(), plain.grad)
        assert torch.isfinite(sharded.grad.full_tensor()).all()
    assert model[1].num_batches_tracked == 1


def train_on_rank(rank, layer, broadcast_buffers):
    """Train on batches whose gates close on one rank and stay open on the other."""
    torch.manual_seed(0)
    model = make_model(layer(4, condensation_threshold=0.5, warmup=1))
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1 + rank)
    for step in range(5):
        # Alike on rank 0, different on rank 1, which has nothing in the fourth.
        batch = torch.randn(3, 3, 6, 6) + (1 - rank) * 5 * torch.ones(3, 3, 1, 1)
        if rank == 1 and step == 3:
            batch = batch[:0]
        optimizer.zero_grad()
        wrapped(batch).square().sum().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize('layer', [UBN, SyncUBN])
@pytest.mark.parametrize('broadcast_buffers', [False, True])
def test_ranks_whose_gates_differ(layer, broadcast_buffers):
    first, second = distributed.run(2, train_on_rank, layer, broadcast_buffers)
    for name in ('0.weight', '1.weight', '1.center_weight', '1.scale_weight', '1.scale_bias'):
        assert_same(first[name], second[name])
    counts = [[state[f'1.{key}'].item() for key in COUNTERS] for state in (first, second)]
    same = all(torch.equal(first[name], second[name]) for name in first)
    if layer is SyncUBN:
        assert same
        assert sum(counts[0]) == 5
    elif not broadcast_buffers:
        # As in BN, the statistics are each rank's own, and so are the decisions.
        assert counts == [[1, 4], [4, 0]]
        assert not same
    # Where they are broadcast, rank 0 sets those of all ranks before each forward.


def reduce_on_rank(rank, hook_class):
    """Return the states before and after a hook that averages over the ranks."""
    torch.manual_seed(rank)
    model = nn.Sequential(randomize(UBN(4, warmup=1, condensation_threshold=-1)), SyncUBN(4))
    for _ in range(3):
        model[1](torch.randn(2, 4, 3, 3))
    for _ in range(3 + 3 * rank):
        model[0](torch.randn(2, 4, 3, 3))
    before = copy.deepcopy(model.state_dict())
    runner = types.SimpleNamespace(model=model)
    hook = hook_class()
    if hook_class is SyncBuffersHook:
        hook.after_train_epoch(runner)
    hook.before_val_epoch(runner)
    assert torch.isfinite(model.eval()(torch.randn(2, 4, 3, 3))).all()
    return before, model.state_dict()


@pytest.mark.parametrize('hook_class', [SyncBuffersHook, SyncNormHook])
def test_hooks_that_average_over_ranks(hook_class):
    (first, after), (second, other) = distributed.run(2, reduce_on_rank, hook_class)
    buffers = [name for name, _ in UBN(4).named_buffers()]
    for name, value in after.items():
        if name.split('.')[1] in buffers:
            mean = (first[name].double() + second[name].double()) / 2
            # Counters become the truncated mean, which is no longer a number of batches.
            mean = mean.to(value.dtype)
            assert_same(other[name], value)
        elif hook_class is SyncNormHook:
            mean = (first[name] + second[name]) / 2
        else:
            mean = first[name]
        assert_same(value, mean, rtol=1e-6, atol=1e-7)
    assert [first['0.num_batches_condensed'], second['0.num_batches_condensed']] == [2, 5]
    assert after['0.num_batches_condensed'] == 3
    # SyncUBN's are the same on all ranks to begin with.
    for name in buffers:
        assert_same(first[f'1.{name}'], second[f'1.{name}'])
        assert_same(after[f'1.{name}'], first[f'1.{name}'], rtol=1e-6, atol=1e-7)

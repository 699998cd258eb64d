"""Tests that nothing replaces or folds a UBN in silence, and that BN is treated as before."""

import copy
import importlib
import inspect
import logging
import subprocess
import sys
import types
from pathlib import Path

import mmcv.cnn
import mmcv.ops
import mmdet
import mmdet.models
import mmengine._strategy.distributed
import mmengine.model
import mmengine.model.utils
import mmengine.runner.runner
import pytest
import torch
import torch.ao.quantization
import torch.fx.experimental.optimization
import torch.nn.utils.fusion
import torch.utils.mkldnn
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine._strategy.distributed import DDPStrategy
from mmengine.config import Config, ConfigDict
from mmengine.model import efficient_conv_bn_eval
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.fx.proxy import TraceError

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, guards


def import_benchmark():
    """Import mmdet's benchmark, which cannot be imported without psutil."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec('psutil') is None:
            patch.setitem(sys.modules, 'psutil', types.SimpleNamespace(Process=None))
        return importlib.import_module('mmdet.utils.benchmark')


BENCHMARK = import_benchmark()
# The module, which the package hides behind the function of the same name.
FUSE_MODULE = importlib.import_module('mmcv.cnn.utils.fuse_conv_bn')
MMDET_CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'

# Each looks its function up when it is called: what a user gets, through every name it has.
CONVERSIONS = {
    'torch': lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    'torch, keyword': lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(module=model),
    'mmengine.model': lambda model: mmengine.model.convert_sync_batchnorm(model),
    'mmengine.model.utils': lambda model: mmengine.model.utils.convert_sync_batchnorm(model),
    'mmengine, mmcv': lambda model: mmengine.model.convert_sync_batchnorm(model, 'mmcv'),
    'Runner.wrap_model': lambda model: wrap_in_runner(model, 'torch'),
    'Runner.wrap_model, mmcv': lambda model: wrap_in_runner(model, 'mmcv'),
    'DDPStrategy.convert_model': lambda model: convert_in_strategy(model, 'torch'),
    'DDPStrategy.convert_model, mmcv': lambda model: convert_in_strategy(model, 'mmcv'),
}
FUSIONS = {
    'mmcv.cnn': lambda model: mmcv.cnn.fuse_conv_bn(model),
    'mmcv.cnn.utils': lambda model: mmcv.cnn.utils.fuse_conv_bn(model),
    'mmcv.cnn.utils.fuse_conv_bn': lambda model: FUSE_MODULE.fuse_conv_bn(model),
    'mmdet.utils.benchmark': lambda model: BENCHMARK.fuse_conv_bn(model),
}
PAIR_FUSIONS = {
    'torch.nn.utils': lambda pair: torch.nn.utils.fuse_conv_bn_eval(*pair),
    'torch.nn.utils.fusion': lambda pair: torch.nn.utils.fusion.fuse_conv_bn_eval(*pair),
    'torch.fx': lambda pair: torch.fx.experimental.optimization.fuse_conv_bn_eval(*pair),
    'keywords': lambda pair: torch.nn.utils.fuse_conv_bn_eval(conv=pair[0], bn=pair[1]),
}
GUARDED = {
    'torch': lambda: nn.SyncBatchNorm.convert_sync_batchnorm,
    'mmengine.model': lambda: mmengine.model.convert_sync_batchnorm,
    'mmengine.model.utils': lambda: mmengine.model.utils.convert_sync_batchnorm,
    'mmengine.runner.runner': lambda: mmengine.runner.runner.convert_sync_batchnorm,
    'mmengine._strategy': lambda: mmengine._strategy.distributed.convert_sync_batchnorm,
    'mmcv.cnn': lambda: mmcv.cnn.fuse_conv_bn,
    'mmdet.utils.benchmark': lambda: BENCHMARK.fuse_conv_bn,
    'torch.nn.utils': lambda: torch.nn.utils.fuse_conv_bn_eval,
    'torch.fx': lambda: torch.fx.experimental.optimization.fuse_conv_bn_eval,
    'mmengine efficient evaluation': lambda: (
        efficient_conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model
    ),
    'ConvModule': lambda: ConvModule.turn_on_efficient_conv_bn_eval,
}


def wrap_in_runner(model, sync_bn):
    """Do what a Runner started by a launcher does to its model, short of the DDP wrapper."""
    runner = types.SimpleNamespace(
        distributed=True,
        cfg=ConfigDict(sync_bn=sync_bn),
        logger=logging.getLogger('test'),
    )
    mmengine.registry.MODEL_WRAPPERS.register_module('Keep', module=_Keep, force=True)
    try:
        return Runner.wrap_model(runner, dict(type='Keep'), model).module
    finally:
        mmengine.registry.MODEL_WRAPPERS.module_dict.pop('Keep')


class _Keep(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def convert_in_strategy(model, sync_bn):
    strategy = types.SimpleNamespace(sync_bn=sync_bn, logger=logging.getLogger('test'))
    return DDPStrategy.convert_model(strategy, model)


def make_model(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(norm, nn.ReLU()), nn.Conv2d(4, 2, 1))


def randomize(model):
    """Give all norms random parameters and statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def summary(model):
    """Return the classes of a model, and the identity of all of its tensors."""
    classes = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    return classes, tensors


@pytest.mark.parametrize('entry', CONVERSIONS)
@pytest.mark.parametrize('layer', [UBN, UBN1d, UBN2d, UBN3d, SyncUBN])
@pytest.mark.parametrize('nested', [True, False])
def test_conversion_to_sync_bn_raises(entry, layer, nested):
    norm = layer(4)
    model = make_model(norm) if nested else norm
    before = summary(model)
    found = rf'{layer.__name__} {"1.0" if nested else ".the module itself."}$'
    with pytest.raises(RuntimeError, match=rf'convert_sync_ubn.*use_syncbn=False.*{found}'):
        CONVERSIONS[entry](model)
    assert summary(model) == before


@pytest.mark.parametrize('entry', CONVERSIONS)
@pytest.mark.usefixtures('process_group')
def test_conversion_of_bn_is_untouched(entry):
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    model = make_model(norm)
    kept = model[0], model[2]
    assert CONVERSIONS[entry](model) is model
    converted = model[1][0]
    assert type(converted) is (mmcv.ops.SyncBatchNorm if 'mmcv' in entry else nn.SyncBatchNorm)
    assert (converted.eps, converted.momentum) == (1e-3, 0.3)
    assert (model[0], model[2]) == kept
    now = [converted.weight, converted.bias, converted.running_mean, converted.running_var]
    assert all(a is b for a, b in zip(now, tensors, strict=True))


def test_conversion_of_bn_passes_all_arguments_and_errors():
    group = object()
    for convert in (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4), group),
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4), process_group=group),
    ):
        assert convert().process_group is group
    with pytest.raises(ValueError, match='sync_bn should be'):
        mmengine.model.convert_sync_batchnorm(nn.BatchNorm2d(4), implementation='none')
    with pytest.raises(TypeError, match='missing 1 required'):
        nn.SyncBatchNorm.convert_sync_batchnorm()


def test_class_derived_from_sync_batch_norm_is_guarded():
    class Derived(nn.SyncBatchNorm):
        pass

    with pytest.raises(RuntimeError, match='convert_sync_ubn'):
        Derived.convert_sync_batchnorm(make_model(UBN(4)))


@pytest.fixture
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture
def rtmdet_cfg(mmdet_scope):
    cfg = Config.fromfile(MMDET_CONFIGS / 'rtmdet' / 'rtmdet_tiny_8xb32-300e_coco.py').model
    cfg.backbone.init_cfg = None
    return cfg


def set_norm(cfg, norm):
    for part in (cfg.backbone, cfg.neck, cfg.bbox_head):
        part.norm_cfg = dict(type=norm)
    return cfg


def count(model, layer):
    return sum(type(module) is layer for module in model.modules())


def test_rtmdet_that_converts_itself_raises(rtmdet_cfg, monkeypatch):
    monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: 2)
    with pytest.raises(RuntimeError, match='use_syncbn=False'):
        MODELS.build(set_norm(rtmdet_cfg, 'UBN'))


@pytest.mark.parametrize('world_size, use_syncbn', [(2, False), (1, True)])
@pytest.mark.parametrize('layer', [UBN, SyncUBN])
def test_rtmdet_that_does_not_convert_itself_keeps_ubn(
    rtmdet_cfg, monkeypatch, world_size, use_syncbn, layer
):
    monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: world_size)
    rtmdet_cfg.use_syncbn = use_syncbn
    model = MODELS.build(set_norm(rtmdet_cfg, layer.__name__))
    assert count(model, layer) == 76
    assert count(model, nn.SyncBatchNorm) == 0


def test_rtmdet_of_bn_converts_itself_as_before(rtmdet_cfg, monkeypatch):
    monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: 2)
    model = MODELS.build(set_norm(rtmdet_cfg, 'BN'))
    assert count(model, nn.SyncBatchNorm) == 76
    assert count(model, nn.BatchNorm2d) == 0


@pytest.mark.parametrize('entry', FUSIONS)
@pytest.mark.parametrize('layer', [UBN, UBN2d, SyncUBN])
def test_fusion_raises(entry, layer):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), layer(4))).eval()
    before = summary(model)
    with pytest.raises(RuntimeError, match=rf'--fuse-conv-bn.*{layer.__name__} 0.1$'):
        FUSIONS[entry](model)
    assert summary(model) == before


@pytest.mark.parametrize('entry', FUSIONS)
def test_fusion_of_bn_is_untouched(entry):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fused = FUSIONS[entry](model)
    assert [type(module) for module in fused] == [nn.Conv2d, nn.Identity, nn.ReLU]
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('norm', ['UBN', 'BN'])
@pytest.mark.usefixtures('mmdet_scope')
def test_inference_benchmark_that_fuses(norm, tmp_path, monkeypatch):
    cfg = dict(type='ResNet', depth=18, norm_cfg=dict(type=norm), init_cfg=None)
    torch.save({'state_dict': MODELS.build(copy.deepcopy(cfg)).state_dict()}, tmp_path / 'a.pth')
    # The benchmark is for a GPU, the fusion before it is not.
    monkeypatch.setattr(nn.Module, 'cuda', lambda self: self)
    benchmark = BENCHMARK.InferenceBenchmark.__new__(BENCHMARK.InferenceBenchmark)
    benchmark.cfg, benchmark.distributed = ConfigDict(model=cfg), False
    checkpoint = str(tmp_path / 'a.pth')
    if norm == 'UBN':
        with pytest.raises(RuntimeError, match='--fuse-conv-bn'):
            benchmark._init_model(checkpoint, is_fuse_conv_bn=True)
        assert count(benchmark._init_model(checkpoint, is_fuse_conv_bn=False), UBN) == 20
    else:
        model = benchmark._init_model(checkpoint, is_fuse_conv_bn=True)
        assert count(model, nn.Identity) == 20


@pytest.mark.parametrize('entry', PAIR_FUSIONS)
def test_fusion_of_a_pair_raises(entry):
    with pytest.raises(RuntimeError, match=r'drop its rectifiers. Use ubn_det\.fuse\(model\)'):
        PAIR_FUSIONS[entry]((nn.Conv2d(3, 4, 1).eval(), UBN(4).eval()))


@pytest.mark.parametrize('entry', PAIR_FUSIONS)
def test_fusion_of_a_pair_of_bn_is_untouched(entry):
    pair = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(PAIR_FUSIONS[entry](pair)(x), pair(x), atol=1e-5, rtol=1e-5)


def make_conv_module(norm, efficient=True):
    norm_cfg = None if norm is None else dict(type=norm)
    return ConvModule(3, 4, 1, norm_cfg=norm_cfg, efficient_conv_bn_eval=efficient)


def test_efficient_evaluation_of_conv_module_raises():
    for norm in ('UBN', 'SyncUBN'):
        with pytest.raises(RuntimeError, match='efficient_conv_bn_eval=True of ConvModule'):
            make_conv_module(norm)
    conv, norm = nn.Conv2d(3, 4, 1), UBN(4)
    with pytest.raises(RuntimeError, match='efficient_conv_bn_eval=True of ConvModule'):
        ConvModule.create_from_conv_bn(conv, norm)
    module = make_conv_module('UBN', efficient=False)
    for turn_on in (
        module.turn_on_efficient_conv_bn_eval,
        lambda: module.turn_on_efficient_conv_bn_eval(efficient_conv_bn_eval=True),
    ):
        with pytest.raises(RuntimeError, match='efficient_conv_bn_eval=True of ConvModule'):
            turn_on()


def test_conv_module_without_efficient_evaluation_runs_ubn():
    conv, norm = nn.Conv2d(3, 4, 1), randomize(UBN(4))
    module = ConvModule.create_from_conv_bn(conv, norm, efficient_conv_bn_eval=False).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(module(x), norm(conv(x)))
    module.turn_on_efficient_conv_bn_eval(False)
    assert torch.equal(module(x), norm(conv(x)))


def test_efficient_evaluation_of_conv_module_of_bn_is_untouched():
    module = randomize(make_conv_module('BN')).eval()
    assert module.efficient_conv_bn_eval_forward is not None
    x = torch.randn(2, 3, 8, 8)
    expected = module.norm(module.conv(x)).relu()
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    module.turn_on_efficient_conv_bn_eval(False)
    assert module.efficient_conv_bn_eval_forward is None
    created = ConvModule.create_from_conv_bn(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert created.efficient_conv_bn_eval_forward is not None
    assert make_conv_module(None).efficient_conv_bn_eval_forward is None


class _TwoParts(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = make_model(first), make_model(second)

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_efficient_evaluation_of_mmengine_raises_where_it_covers_ubn():
    model = randomize(_TwoParts(nn.BatchNorm2d(4), UBN(4))).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    for modules in ('second', ['first', 'second']):
        with pytest.raises(RuntimeError, match='leave out.*efficient_conv_bn_eval.*UBN 1.0$'):
            efficient_conv_bn_eval.turn_on_efficient_conv_bn_eval(model, modules)
    assert 'forward' not in vars(model.second)
    # The first part has only BN and goes on as before.
    assert 'forward' in vars(model.first)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.train()
    model(x)
    assert model.first[1][0].num_batches_tracked == 1


def test_symbolic_trace_raises_since_it_would_bake_in_the_training_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), UBN(4))
    for mode in (True, False):
        with pytest.raises(TraceError, match='control flow'):
            torch.fx.symbolic_trace(model.train(mode))
    with pytest.raises(TraceError, match='control flow'):
        torch.fx.experimental.optimization.fuse(model.eval())


def test_quantization_and_mkldnn_raise():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), UBN2d(4)).eval()
    with pytest.raises(AssertionError, match='did not find fuser method'):
        torch.ao.quantization.fuse_modules(model, [['0', '1']])
    if torch.backends.mkldnn.is_available():
        converted = torch.utils.mkldnn.to_mkldnn(model)
        with pytest.raises((NotImplementedError, RuntimeError)):
            converted(torch.randn(2, 3, 8, 8).to_mkldnn())


@pytest.mark.parametrize('name', GUARDED)
def test_guard_is_installed_once(name):
    before = GUARDED[name]()
    assert before._ubn_guard
    inner = inspect.unwrap(before, stop=lambda f: not hasattr(f, '_ubn_guard'))
    assert inner is getattr(before, '__func__', before).__wrapped__
    guards.install()
    after = GUARDED[name]()
    # A bound method is made anew at each access.
    assert getattr(after, '__func__', after) is getattr(before, '__func__', before)


@pytest.mark.parametrize('name', GUARDED)
def test_guard_keeps_name_and_signature(name):
    guarded = GUARDED[name]()
    wrapped = getattr(guarded, '__func__', guarded).__wrapped__
    assert (guarded.__name__, guarded.__doc__) == (wrapped.__name__, wrapped.__doc__)
    expected = list(inspect.signature(wrapped).parameters.values())
    if inspect.ismethod(guarded):
        expected = expected[1:]
    assert list(inspect.signature(guarded).parameters.values()) == expected


@pytest.mark.parametrize('first', ['ubn_det', 'others'])
def test_guards_do_not_depend_on_the_order_of_imports(first):
    code = """
import importlib.util, sys, types
if importlib.util.find_spec('psutil') is None:
    sys.modules['psutil'] = types.SimpleNamespace(Process=None)
if sys.argv[1] == 'ubn_det':
    import ubn_det
import mmdet.utils.benchmark, mmengine._strategy.distributed, mmengine.runner.runner
import torch.fx.experimental.optimization
import ubn_det
for function in (
    mmdet.utils.benchmark.fuse_conv_bn,
    mmengine._strategy.distributed.convert_sync_batchnorm,
    mmengine.runner.runner.convert_sync_batchnorm,
    torch.fx.experimental.optimization.fuse_conv_bn_eval,
):
    try:
        function(ubn_det.UBN(4), ubn_det.UBN(4))
    except RuntimeError as error:
        assert 'drop its rectifiers' in str(error), error
    else:
        raise AssertionError(f'{function} is not guarded')
"""
    done = subprocess.run([sys.executable, '-c', code, first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

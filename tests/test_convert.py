"""Tests of the conversion of BN into UBN and back."""

import copy
import pickle

import mmcv.ops
import pytest
import torch
import torch.distributed as dist
from mmcv.cnn import ConvModule
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, convert, convert_sync_ubn

CLASSES = {nn.BatchNorm1d: UBN1d, nn.BatchNorm2d: UBN2d, nn.BatchNorm3d: UBN3d}
SHAPES = {1: (4, 5, 6), 2: (4, 5, 6, 7), 3: (4, 5, 3, 4, 6)}
EXTRAS = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
# Without a gate UBN is BN in training too.
OPEN = dict(condensation_threshold=None)


def randomize(layer):
    """Give a layer random parameters and statistics, as after some training."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for name, buffer in layer.named_buffers():
            if name.endswith('running_mean'):
                buffer.normal_()
            elif name.endswith('running_var'):
                buffer.uniform_(0.5, 2)
            elif name.endswith('num_batches_tracked'):
                buffer.fill_(7)
    return layer


def make_model():
    return randomize(
        nn.Sequential(
            ConvModule(3, 5, 3, norm_cfg=dict(type='BN')),
            nn.ModuleDict(
                dict(bn=nn.BatchNorm2d(5, eps=1e-3, momentum=0.3), gn=nn.GroupNorm(1, 5))
            ),
            nn.Conv2d(5, 5, 1),
            nn.Sequential(nn.BatchNorm2d(5, affine=False), nn.InstanceNorm2d(5, affine=True)),
        )
    )


def tensors_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def summary(model):
    classes = [(name, type(module)) for name, module in model.named_modules()]
    return classes, {name: id(t) for name, t in tensors_of(model).items()}


def norms_of(model):
    return {n: type(m).__name__ for n, m in model.named_modules() if 'BN' in type(m).__name__}


def assert_same_function(a, b, shape, rtol=1e-5, atol=1e-5):
    x = torch.randn(shape)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [module(x) for module, x in zip((a, b), xs, strict=True)]
    torch.testing.assert_close(*ys, rtol=rtol, atol=atol)
    weight = torch.randn_like(x)
    for y in ys:
        (y * weight).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=rtol, atol=atol)


# To UBN


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        dict(affine=False, eps=1e-2),
        dict(track_running_stats=False),
        dict(momentum=None),
        dict(bias=False, momentum=0.4),
    ],
)
def test_ubn_does_what_the_bn_did(cls, arguments, training):
    bn = randomize(cls(5, **arguments)).train(training)
    ubn = convert(copy.deepcopy(bn), OPEN)
    assert type(ubn) is CLASSES[cls]
    assert ubn.training is training
    assert ubn.condensation_threshold is None
    shape = SHAPES[list(CLASSES).index(cls) + 1]
    for _ in range(2):
        assert_same_function(bn, ubn, shape)
    for name, tensor in bn.state_dict().items():
        torch.testing.assert_close(ubn.state_dict()[name], tensor)
    for name, parameter in bn.named_parameters():
        torch.testing.assert_close(
            ubn.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


def test_tensors_arguments_and_flags_are_kept():
    bn = randomize(nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)).eval()
    bn.bias.requires_grad_(False)
    bn.note = 'mine'
    before = tensors_of(bn)
    ubn = convert(bn, dict(type='UBN', warmup=3, affine_kernel=5))
    after = tensors_of(ubn)
    assert list(after)[:2] == ['weight', 'bias']
    # The same objects, so that an optimizer goes on with them.
    assert all(after[name] is before[name] for name in before)
    assert list(ubn.state_dict()) == list(UBN2d(5, affine_kernel=5).state_dict())
    assert [ubn.weight.requires_grad, ubn.bias.requires_grad] == [True, False]
    assert all(getattr(ubn, name).requires_grad for name in EXTRAS)
    assert repr(ubn) == repr(UBN2d(5, eps=1e-3, momentum=0.3, warmup=3, affine_kernel=5))
    assert ubn.note == 'mine'
    assert not ubn.training


def test_frozen_layer_stays_what_it_is():
    bn = nn.BatchNorm2d(5).requires_grad_(False)
    assert not any(p.requires_grad for p in convert(bn).parameters())
    assert all(p.requires_grad for p in convert(nn.BatchNorm2d(5, affine=False)).parameters())


def test_model_is_changed_in_place_and_other_norms_are_kept():
    model = make_model()
    kept = [model[0].conv, model[1]['gn'], model[2], model[3][1]]
    names = list(model.state_dict())
    reference = copy.deepcopy(model).eval()
    assert convert(model) is model
    assert norms_of(model) == {'0.bn': 'UBN2d', '1.bn': 'UBN2d', '3.0': 'UBN2d'}
    assert [model[0].conv, model[1]['gn'], model[2], model[3][1]] == kept
    assert [name for name in model.state_dict() if name in names] == names
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model[0].eval()(x), reference[0](x))
    # Again, there is nothing to do.
    before = summary(model)
    assert convert(model) is model
    assert summary(model) == before


@pytest.mark.parametrize('name', ['UBN', 'SyncUBN', UBN, SyncUBN])
@pytest.mark.parametrize('cls', [*CLASSES, nn.SyncBatchNorm])
def test_type_decides_who_shares_statistics(cls, name):
    converted = convert(cls(5), dict(type=name))
    is_sync = name in ('SyncUBN', SyncUBN)
    assert type(converted) is (SyncUBN if is_sync else CLASSES.get(cls, UBN))


@pytest.mark.parametrize('norm_cfg', [None, {}, OPEN])
def test_without_a_type_sync_bn_becomes_sync_ubn(norm_cfg):
    assert type(convert(nn.SyncBatchNorm(5), norm_cfg)) is SyncUBN
    assert type(convert(nn.BatchNorm1d(5), norm_cfg)) is UBN1d


def test_number_of_dimensions_where_the_layer_takes_any():
    assert type(convert(nn.SyncBatchNorm(5), dict(type='UBN1d', affine_kernel=3))) is UBN1d
    assert type(convert(nn.BatchNorm1d(5), dict(type='UBN1d'))) is UBN1d
    assert type(convert(UBN(5), dict(type='BN3d'))) is nn.BatchNorm3d


def test_reverted_sync_bn_takes_any_dimensions():
    model = revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(5)))
    assert type(convert(model)[0]) is UBN


def test_process_group_is_kept(process_group):
    group = dist.new_group([0])
    assert convert(nn.SyncBatchNorm(5, process_group=group)).process_group is group
    assert convert(nn.SyncBatchNorm(5)).process_group is None
    other = dist.new_group([0])
    norm_cfg = dict(type='SyncUBN', process_group=other)
    assert convert(nn.SyncBatchNorm(5, process_group=group), norm_cfg).process_group is other
    sync_ubn = SyncUBN(5, process_group=group)
    assert convert(sync_ubn, dict(type='SyncBN')).process_group is group


def test_sync_bn_of_mmcv(process_group):
    layer = randomize(mmcv.ops.SyncBatchNorm(5, eps=1e-3)).eval()
    before = tensors_of(layer)
    reference = copy.copy(layer)
    converted = convert(layer)
    assert type(converted) is SyncUBN
    assert converted.process_group is None
    assert converted.eps == 1e-3
    assert all(tensors_of(converted)[name] is before[name] for name in before)
    assert not {'group', 'group_size', 'stats_mode'} & vars(converted).keys()
    assert_same_function(reference, converted, (2, 5, 4, 4))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_type_and_device_are_kept(dtype):
    ubn = convert(nn.BatchNorm2d(5, dtype=dtype))
    assert {p.dtype for p in ubn.parameters()} == {dtype}
    assert ubn.condensation.dtype == torch.float32
    ubn = convert(nn.BatchNorm2d(5, device='meta'))
    assert all(t.is_meta for t in tensors_of(ubn).values())


def test_counter_that_is_absent_is_made():
    bn = nn.BatchNorm2d(5)
    bn.num_batches_tracked = None
    ubn = convert(bn)
    ubn(torch.randn(2, 5, 4, 4))
    assert ubn.num_batches_tracked == 1


def test_optimizer_goes_on():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    convert(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before['1.weight'])


def test_layer_that_has_two_names_is_converted_under_both():
    model = nn.Module()
    shared = nn.BatchNorm2d(4)
    model.first, model.second = shared, shared
    model.levels = nn.ModuleList([shared, shared])
    convert(model, select='levels.1')
    found = [model.first, model.second, *model.levels]
    assert [type(layer) for layer in found] == [UBN2d] * 4
    assert len(set(map(id, found))) == 1


def test_converted_layer_can_be_copied_and_pickled():
    layer = convert(randomize(nn.BatchNorm2d(5)))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is UBN2d
        torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)


# Hooks

REGISTER = {
    'forward': lambda m, hook: m.register_forward_hook(hook),
    'forward, kwargs': lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    'before forward': lambda m, hook: m.register_forward_pre_hook(hook),
    'backward': lambda m, hook: m.register_full_backward_hook(hook),
    'before backward': lambda m, hook: m.register_full_backward_pre_hook(hook),
    'state dict': lambda m, hook: m.register_state_dict_post_hook(hook),
    'before state dict': lambda m, hook: m.register_state_dict_pre_hook(hook),
    'load': lambda m, hook: m.register_load_state_dict_post_hook(hook),
    'before load': lambda m, hook: m.register_load_state_dict_pre_hook(hook),
    'before load, private': lambda m, hook: m._register_load_state_dict_pre_hook(hook, True),
}


def make_old(kind):
    return nn.BatchNorm2d(4) if kind == 'convert' else UBN2d(4)


@pytest.mark.parametrize('how', REGISTER)
@pytest.mark.parametrize('kind', ['convert', 'convert_sync_ubn'])
def test_hooks_are_kept_and_get_the_new_layer(how, kind):
    model = nn.Sequential(make_old(kind))
    seen = []

    def hook(module, *args):
        seen.append(module)

    handle = REGISTER[how](model[0], hook)
    {'convert': convert, 'convert_sync_ubn': convert_sync_ubn}[kind](model)
    layer = model[0]

    def use():
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        model(x).square().sum().backward()
        model.load_state_dict(model.state_dict())

    use()
    assert seen
    assert all(module is layer for module in seen)
    handle.remove()
    seen.clear()
    use()
    assert not seen


# Which layers


def test_glob_and_function_choose_layers():
    converted = {'0.bn': 'UBN2d', '1.bn': 'UBN2d', '3.0': 'BatchNorm2d'}
    by_glob = convert(make_model(), select='*.bn')
    by_name = convert(make_model(), select=lambda name, layer: name.endswith('bn'))
    by_layer = convert(make_model(), select=lambda name, layer: layer.affine)
    for model in (by_glob, by_name, by_layer):
        found = {n: type(model.get_submodule(n)).__name__ for n in converted}
        assert found == converted


def test_glob_star_matches_dots_and_case_counts():
    assert set(norms_of(convert(make_model(), select='[03].*'))) == {'0.bn', '3.0'}
    with pytest.raises(ValueError, match='chooses none'):
        convert(make_model(), select='*.BN')


def test_selection_of_nothing_raises():
    with pytest.raises(ValueError, match=r"select='heads\.\*' chooses none of the 3 .*: 0\.bn, 1"):
        convert(make_model(), select='heads.*')
    with pytest.raises(ValueError, match='chooses none of the 0 layers'):
        convert(nn.Conv2d(3, 4, 1), select='*')


def test_model_without_bn_is_passed_through():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    before = summary(model)
    assert convert(model) is model
    assert summary(model) == before


# Back to BN


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize('name', ['BN', 'SyncBN'])
@pytest.mark.parametrize('is_sync', [False, True])
def test_way_back_is_exact_in_evaluation(cls, name, is_sync):
    original = randomize(cls(5, eps=1e-3, momentum=0.3)).eval()
    ubn = convert(copy.deepcopy(original), dict(type='UBN', affine_kernel=3))
    if is_sync:
        ubn = convert(copy.deepcopy(original), dict(type='SyncUBN'))
    before = tensors_of(ubn)
    num_dims = list(CLASSES).index(cls) + 1
    back = convert(ubn, dict(type=f'BN{num_dims}d' if name == 'BN' and is_sync else name))
    assert type(back) is (cls if name == 'BN' else nn.SyncBatchNorm)
    assert not back.training
    after = tensors_of(back)
    assert list(after) == list(tensors_of(original))
    assert all(after[name] is before[name] for name in after)
    assert vars(back).keys() == vars(type(back)(5)).keys()
    assert repr(back) == repr(type(back)(5, eps=1e-3, momentum=0.3))
    assert_same_function(back, original, SHAPES[num_dims])


def test_way_back_without_rectifiers():
    ubn = randomize(UBN2d(5, centering=False, scaling=False, affine_kernel=1)).eval()
    reference = copy.deepcopy(ubn)
    assert_same_function(convert(ubn, dict(type='BN')), reference, SHAPES[2])


def test_any_dimensions_become_bn_2d_as_in_mmcv():
    assert type(convert(UBN(5), dict(type='BN'))) is nn.BatchNorm2d


@pytest.mark.parametrize('extra', EXTRAS)
@pytest.mark.parametrize('value', [1e-30, float('nan')])
def test_layer_that_is_no_bn_is_named(extra, value):
    model = nn.Sequential(UBN2d(5), nn.Sequential(UBN2d(5, affine_kernel=3)))
    with torch.no_grad():
        getattr(model[1][0], extra).view(-1)[-1] = value
    before = summary(model)
    with pytest.raises(ValueError, match=rf'^1\.0: {extra} of this UBN2d is not 0'):
        convert(model, dict(type='BN'))
    assert summary(model) == before
    # The rest can go.
    convert(model, dict(type='BN'), select='0')
    assert [type(model[0]), type(model[1][0])] == [nn.BatchNorm2d, UBN2d]


def test_bn_stays_on_the_way_back():
    model = make_model()
    before = summary(model)
    assert summary(convert(model, dict(type='BN'))) == before


def test_group_that_was_lost_in_pickling_is_an_error(process_group):
    layer = SyncUBN(5, process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match='lost in pickling'):
        convert(pickle.loads(pickle.dumps(layer)), dict(type='SyncBN'))


# Errors


class Plain(nn.BatchNorm2d):
    """Derives from BN and adds a constructor."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)


class Activated(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class AlwaysInEvaluation(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Derived(UBN2d):
    pass


def parametrized():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, 'weight', nn.Softplus())
    return layer


def test_subclass_that_adds_a_constructor_is_bn():
    ubn = convert(Plain(4))
    assert type(ubn) is UBN2d
    assert ubn.eps == 1e-3


@pytest.mark.parametrize(
    ('layer', 'target', 'message'),
    [
        (lambda: Activated(4), 'UBN', 'Activated is a BatchNorm2d with a forward of its own'),
        (lambda: AlwaysInEvaluation(4), 'UBN', 'AlwaysInEvaluation .* with a train of its own'),
        (lambda: nn.LazyBatchNorm2d(), 'UBN', 'LazyBatchNorm2d is a '),
        (parametrized, 'UBN', 'ParametrizedBatchNorm2d is a '),
        (lambda: Derived(4), 'BN', 'Derived is a subclass of UBN'),
    ],
)
def test_class_that_does_more_is_named(layer, target, message):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer()))
    before = summary(model)
    with pytest.raises(TypeError, match=rf'^1\.0: {message}'):
        convert(model, dict(type=target))
    assert summary(model) == before
    convert(model, select='0')
    assert type(model[0]) is UBN2d


@pytest.mark.parametrize(
    ('layer', 'norm_cfg', 'error', 'message'),
    [
        (nn.BatchNorm2d(4), dict(type='GN'), ValueError, "type of norm_cfg must be .*'GN'"),
        (nn.BatchNorm2d(4), dict(eps=1e-3), ValueError, 'eps in norm_cfg: each layer keeps'),
        (nn.BatchNorm2d(4), dict(num_groups=2), TypeError, 'num_groups in norm_cfg is no arg'),
        (nn.BatchNorm2d(4), dict(process_group=None), TypeError, 'process_group in norm_cfg'),
        (UBN2d(4), dict(type='BN', warmup=1), TypeError, 'warmup in norm_cfg is no argument of'),
        (nn.BatchNorm2d(4), dict(type='UBN', warmup=-1), ValueError, r'module itself.: warmup'),
        (nn.BatchNorm2d(4), dict(affine_kernel=2), ValueError, 'affine_kernel must be odd'),
        (nn.BatchNorm2d(4, affine=False), dict(affine_kernel=3), ValueError, 'needs affine=True'),
        (nn.BatchNorm2d(4, bias=False), dict(affine_kernel=3), ValueError, 'needs a bias'),
        (nn.BatchNorm2d(4, eps=0), None, ValueError, 'eps must be positive'),
        (nn.BatchNorm2d(4), dict(type='UBN1d'), ValueError, 'BatchNorm2d has 2 dimensions'),
        (UBN1d(4), dict(type='BN2d'), ValueError, 'UBN1d has 1 dimensions'),
        (
            nn.BatchNorm3d(4),
            dict(type='SyncUBN', affine_kernel=3),
            ValueError,
            'affine_kernel of SyncUBN is a 2-d',
        ),
    ],
)
def test_bad_argument_is_named(layer, norm_cfg, error, message):
    with pytest.raises(error, match=message):
        convert(layer, norm_cfg)


@pytest.mark.parametrize('select', [3, ['*']])
def test_select_of_the_wrong_type_is_named(select):
    with pytest.raises(TypeError, match='select must be a glob or a function'):
        convert(make_model(), select=select)


def test_model_wrapped_for_parallel_training_raises(process_group):
    model = nn.Sequential(DistributedDataParallel(make_model()))
    before = summary(model)
    with pytest.raises(RuntimeError, match='DistributedDataParallel 0 is wrapped'):
        convert(model)
    assert summary(model) == before


def with_replaced_forward(model):
    layer = model[0].bn
    layer.forward = lambda x: nn.BatchNorm2d.forward(layer, x)
    return 'forward of this BatchNorm2d was replaced'


def with_compiled_layer(model):
    model[0].bn.compile()
    return '_compiled_call_impl of this BatchNorm2d was replaced'


def with_graph(model):
    model[0].forward = torch.fx.symbolic_trace(nn.Sequential(model[0].conv, model[0].bn)).forward
    return 'forward of ConvModule 0 runs a'


def with_hidden_reference(model):
    model[2].norms = [model[0].bn]
    return '0.bn is in the attribute norms of Conv2d 2 too'


def with_efficient_evaluation(model):
    model[0].turn_on_efficient_conv_bn_eval()
    return 'efficient_conv_bn_eval of ConvModule 0'


@pytest.mark.parametrize(
    'change',
    [
        with_replaced_forward,
        with_compiled_layer,
        with_graph,
        with_hidden_reference,
        with_efficient_evaluation,
    ],
)
def test_layer_that_would_go_on_as_bn_is_named(change):
    model = make_model()
    message = change(model)
    before = summary(model)
    with pytest.raises(RuntimeError, match=message):
        convert(model)
    assert summary(model) == before
    # Where that layer stays, nothing is wrong.
    convert(model, select='3.0')
    assert type(model[3][0]) is UBN2d

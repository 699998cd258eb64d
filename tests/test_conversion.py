"""Tests of the conversions between norm layers on one process."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from mmcv.cnn import ConvModule
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, convert_sync_ubn
from ubn_det.layers.ubn import EXTRA_PARAMETERS

ARGUMENTS = dict(
    eps=1e-3,
    momentum=0.3,
    condensation_threshold=0.4,
    on_condensed='freeze',
    warmup=2,
    patience=3,
    affine_kernel=3,
)


def randomize(layer):
    """Give a layer random parameters, and a state as after some training."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    shape = (4, layer.num_features, 6, 6)
    for _ in range(3):
        layer(1 + torch.randn(shape))
    return layer


def tensors_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_all_arguments_and_tensors_are_kept():
    layer = randomize(UBN(4, **ARGUMENTS))
    layer.weight.requires_grad_(False)
    before = tensors_of(layer)
    converted = convert_sync_ubn(layer)
    assert type(converted) is SyncUBN
    after = tensors_of(converted)
    assert list(after) == list(before)
    # The same objects, so that an optimizer goes on with them.
    assert all(after[name] is before[name] for name in before)
    assert converted.extra_repr() == layer.extra_repr()
    assert converted.process_group is None
    assert not converted.weight.requires_grad
    assert repr(converted) == repr(SyncUBN(4, **ARGUMENTS))


@pytest.mark.parametrize('training', [True, False])
def test_does_what_the_original_did(training):
    layer = randomize(UBN(4, **ARGUMENTS)).train(training)
    converted = convert_sync_ubn(copy.deepcopy(layer))
    assert converted.training is training
    for _ in range(6):
        # Later batches are condensed.
        x = 2 + torch.randn(4, 4, 6, 6)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [module(x) for module, x in zip((layer, converted), xs, strict=True)]
        assert torch.equal(*ys)
        for y in ys:
            y.square().sum().backward()
        assert torch.equal(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(converted.state_dict(), layer.state_dict(), rtol=0, atol=0)
    if training:
        assert layer.num_batches_condensed > 0
    for a, b in zip(layer.parameters(), converted.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize('layer', [UBN, UBN1d, UBN2d, UBN3d])
def test_every_class_is_converted(layer):
    assert type(convert_sync_ubn(layer(4))) is SyncUBN


@pytest.mark.parametrize('layer', [UBN, UBN2d])
def test_two_dimensional_neighbourhood_is_converted(layer):
    assert convert_sync_ubn(layer(4, affine_kernel=3)).neighbour_weight.shape == (4, 1, 3, 3)


@pytest.mark.parametrize('layer', [UBN1d, UBN3d])
def test_other_neighbourhood_raises(layer):
    model = nn.Sequential(UBN(4), layer(4, affine_kernel=3))
    with pytest.raises(ValueError, match=f'affine_kernel=3 of a {layer.__name__}'):
        convert_sync_ubn(model)


class Doubled(UBN2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Derived(SyncUBN):
    pass


def with_forward(layer):
    layer.forward = lambda input: 2 * type(layer).forward(layer, input)
    return layer


def compiled(layer):
    layer.compile(backend='eager')
    return layer


@pytest.mark.parametrize(
    ('layer', 'error', 'message'),
    [
        (lambda: Doubled(4), TypeError, 'Doubled is a subclass of UBN and may do more'),
        (lambda: with_forward(UBN(4)), RuntimeError, 'forward of this UBN was replaced'),
        (lambda: compiled(UBN(4)), RuntimeError, '_compiled_call_impl of this UBN was replaced'),
    ],
)
@pytest.mark.parametrize('nested', [True, False])
def test_layer_that_would_lose_its_forward_or_keep_the_old_one_raises(
    layer, error, message, nested
):
    layer = layer()
    model = nn.Sequential(UBN(4), nn.Sequential(layer)) if nested else layer
    before = [type(module) for module in model.modules()]
    name = r'1\.0' if nested else r'\(the module itself\)'
    with pytest.raises(error, match=f'{name}: {message}'):
        convert_sync_ubn(model)
    assert [type(module) for module in model.modules()] == before


def test_subclass_of_sync_ubn_stays():
    layer = Derived(4)
    assert convert_sync_ubn(nn.Sequential(layer))[0] is layer


def test_model_is_changed_in_place_and_other_norms_are_kept():
    model = nn.Sequential(
        ConvModule(3, 4, 1, norm_cfg=dict(type='UBN')),
        nn.ModuleDict(dict(bn=nn.BatchNorm2d(4), inner=nn.Sequential(UBN2d(4)))),
        nn.GroupNorm(2, 4),
        SyncUBN(4),
    )
    kept = [model[0].conv, model[1]['bn'], model[2], model[3]]
    names = list(model.state_dict())
    assert convert_sync_ubn(model) is model
    assert type(model[0].norm) is type(model[1]['inner'][0]) is SyncUBN
    assert [model[0].conv, model[1]['bn'], model[2], model[3]] == kept
    assert list(model.state_dict()) == names


def test_model_without_ubn_is_passed_through():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = list(model.modules())
    assert convert_sync_ubn(model) is model
    assert list(model.modules()) == before


def test_optimizer_goes_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), UBN(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_ubn(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    for extra in EXTRA_PARAMETERS:
        assert not torch.equal(getattr(model[1], extra), before[f'1.{extra}']), extra


def test_layer_that_has_two_names_is_converted_under_both():
    # As heads share a layer between levels. An unconverted one would keep statistics of its rank.
    model = nn.Module()
    shared = UBN(4)
    model.first, model.second = shared, shared
    model.levels = nn.ModuleList([shared, shared])
    convert_sync_ubn(model)
    found = [model.first, model.second, *model.levels]
    assert [type(layer) for layer in found] == [SyncUBN] * 4
    assert len(set(map(id, found))) == 1


def test_hooks_are_kept():
    layer = UBN(4)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append('forward'))
    converted = convert_sync_ubn(nn.Sequential(layer))
    converted(torch.randn(2, 4, 3, 3))
    assert calls == ['forward']


def test_process_group_is_set(process_group):
    group = dist.group.WORLD
    model = nn.Sequential(UBN(4), nn.Sequential(UBN(4)))
    convert_sync_ubn(model, process_group=group)
    assert model[0].process_group is model[1][0].process_group is group
    # What has one keeps it.
    assert convert_sync_ubn(model)[0].process_group is group


def test_converted_layer_can_be_copied_and_pickled():
    layer = convert_sync_ubn(randomize(UBN(4, **ARGUMENTS)))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is SyncUBN
        torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('norm', ['UBN', 'UBN2d', 'SyncUBN'])
def test_revert_of_mmengine_leaves_ubn(norm):
    # Called wherever there is one process: by the Runner, by inferencers, to count operations.
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(MODELS.build(dict(type=norm, num_features=4)))
    )
    model.add_module('sync_bn', nn.SyncBatchNorm(4))
    layer = model[1][0]
    before = {name: id(tensor) for name, tensor in tensors_of(layer).items()}
    reverted = revert_sync_batchnorm(model)
    assert reverted[1][0] is layer
    assert {name: id(tensor) for name, tensor in tensors_of(layer).items()} == before
    # What it is for still happens.
    assert not isinstance(reverted.sync_bn, nn.SyncBatchNorm)
    assert revert_sync_batchnorm(layer) is layer
    # And it runs on one process.
    assert layer(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)

"""Tests of what a layer takes a state dict for, when it loads one."""

import copy
import itertools
import logging

import pytest
import reference
import torch
from mmengine.runner.checkpoint import get_state_dict
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d
from ubn_det.layers import loading

RECTIFIERS = ('center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight')
GATE = (
    *('condensation', 'condensation_mean', 'condensation_var', 'num_batches_condensed'),
    *('num_batches_readmitted', 'consecutive_condensed', 'num_batches_scored'),
)
BN = ('weight', 'bias', 'running_mean', 'running_var')
EXACT = dict(rtol=0, atol=0)


def trained(cls=UBN2d, **kwargs):
    """Return a layer of which nothing is at its initial value."""
    layer = cls(4, **kwargs)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.uniform_(1, 2) if tensor.is_floating_point() else tensor.fill_(7)
    return layer


def trained_bn(**kwargs):
    bn = nn.BatchNorm2d(4, **kwargs)
    bn(torch.randn(3, 4, 5, 6) * 2 + 1)
    for parameter in bn.parameters():
        nn.init.normal_(parameter)
    return bn


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def check_unmoved(module, before):
    torch.testing.assert_close(snapshot(module), before, **EXACT)


def of_version(state, version):
    """Return a state dict as a module of this version leaves it; None for no versions at all."""
    if version is None:
        return dict(state)
    state = copy.copy(state)
    state._metadata = {
        name: {**entry, 'version': version} for name, entry in state._metadata.items()
    }
    return state


# Plain BN, and what is none


@pytest.mark.parametrize('names', [('weight',), BN[:2], BN[2:], ('weight', *BN[2:]), BN[:3]])
@pytest.mark.parametrize('load', ['torch', 'mmengine'])
def test_a_part_of_a_bn_leaves_the_rest_as_it_is(names, load, capsys):
    layer = trained()
    before = snapshot(layer)
    state = {name: torch.full((4,), 3.0) for name in names}
    # torch itself takes the counter of a state dict without versions for one of an old torch.
    missing = {*before} - {*names, 'num_batches_tracked'}
    if load == 'torch':
        found = layer.load_state_dict(state, strict=False)
        assert {*found.missing_keys} == missing
        assert not found.unexpected_keys
    else:
        mmengine_load_state_dict(layer, state)
        said = capsys.readouterr().out
        assert all(name in said for name in missing)
    check_unmoved(layer, {**before, **state})
    with pytest.raises(RuntimeError, match='Missing key.*"center_weight".*"condensation"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize('affine, track', [(True, True), (True, False), (False, True)])
def test_bn_is_whole_with_what_the_layer_shares_with_it(affine, track):
    bn = trained_bn(affine=affine, track_running_stats=track)
    layer = trained(affine=affine, track_running_stats=track)
    layer.load_state_dict(bn.state_dict())
    assert not any(getattr(layer, n).any() for n in RECTIFIERS if getattr(layer, n) is not None)
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x))


@pytest.mark.parametrize('missing', RECTIFIERS)
def test_a_missing_rectifier_of_ubn_is_missing(missing):
    layer, source = trained(), trained()
    before = snapshot(layer)
    state = source.state_dict()
    del state[missing]
    found = layer.load_state_dict(state, strict=False)
    assert found.missing_keys == [missing]
    check_unmoved(layer, {**state, missing: before[missing]})


def test_ubn_without_rectifiers_is_no_bn():
    layer = trained()
    before = snapshot(layer)
    plain = trained(centering=False, scaling=False, affine_kernel=1)
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert {*found.missing_keys} == {*RECTIFIERS}
    check_unmoved(layer, {**plain.state_dict(), **{name: before[name] for name in RECTIFIERS}})


@pytest.mark.parametrize('missing', [GATE, GATE[:1], GATE[3:], (*GATE[1:3], GATE[-1])], ids=str)
@pytest.mark.parametrize('kwargs', [{}, dict(centering=False, scaling=False, affine_kernel=1)])
def test_ubn_with_fewer_buffers_of_the_gate_starts_them_anew(missing, kwargs):
    layer, source = trained(**kwargs), trained(**kwargs)
    state = {name: tensor for name, tensor in source.state_dict().items() if name not in missing}
    layer.load_state_dict(state)
    fresh = snapshot(UBN2d(4, **kwargs))
    check_unmoved(layer, {**source.state_dict(), **{name: fresh[name] for name in missing}})


# assign


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('own_device', ['cpu', 'meta'])
def test_assigned_bn_gets_the_rest_where_and_of_what_type_it_is(dtype, own_device):
    # Any other device than that of the layer does.
    state = nn.BatchNorm2d(4, device='meta', dtype=dtype).state_dict()
    layer = UBN2d(4, device=own_device)
    layer.load_state_dict(state, assign=True)
    tensors = dict(itertools.chain(layer.named_parameters(), layer.named_buffers()))
    assert {tensor.device.type for tensor in tensors.values()} == {'meta'}
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {p.requires_grad for p in layer.parameters()} == {True}
    assert layer.condensation.dtype == torch.float32
    assert layer.num_batches_condensed.dtype == torch.long


def test_wrong_entry_is_not_assigned():
    layer = trained()
    before = snapshot(layer)
    state = {**trained_bn().state_dict(), 'weight': [1, 2, 3, 4]}
    with pytest.raises(RuntimeError, match='weight must be a Tensor, got list'):
        layer.load_state_dict(state, assign=True)
    check_unmoved(layer, before)


# Versions


@pytest.fixture
def warnings(monkeypatch):
    """Collect what is warned of, each time anew."""
    messages = []

    def record(message, logger=None, level=logging.INFO):
        assert logger == 'current'
        if level == logging.WARNING:
            messages.append(message)

    monkeypatch.setattr(loading, 'print_log', record)
    loading.warn_of_gain_once.cache_clear()
    yield messages
    loading.warn_of_gain_once.cache_clear()


@pytest.mark.parametrize('layer', [UBN, UBN1d, UBN2d, UBN3d, SyncUBN])
def test_version_is_kept_in_state_dicts_of_both_kinds(layer):
    assert layer._version > nn.BatchNorm2d._version
    model = nn.Sequential(layer(4))
    for state in (model.state_dict(), get_state_dict(model)):
        assert state._metadata['0']['version'] == layer._version


@pytest.mark.parametrize('version', [None, 1, 2])
@pytest.mark.parametrize('name', RECTIFIERS)
def test_rectifiers_of_an_unknown_version_are_warned_of_once(version, name, warnings):
    source = UBN2d(4)
    nn.init.normal_(getattr(source, name))
    model = nn.Sequential(UBN2d(4), UBN2d(4))
    state = nn.Sequential(source, source).state_dict()
    for _ in range(2):
        model.load_state_dict(of_version(state, version))
    (warning,) = warnings
    assert 'divide' in warning and all(name in warning for name in RECTIFIERS)
    assert torch.equal(getattr(model[0], name), getattr(source, name))


def test_warning_says_what_makes_a_layer_of_version_0_1_right(warnings):
    # As they were then: what the formulas take is the parameter itself.
    params = reference.random_params(4, dims=2, kernel=3, gain=1)
    layer = UBN2d(4, dtype=torch.float64, condensation_threshold=None)
    running = dict(running_mean=torch.randn(4), running_var=torch.rand(4) + 0.5)
    state = {**snapshot(layer), **params, **running}
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    expected, *_ = reference.ubn(
        x, params, layer.eps, *map(torch.Tensor.double, running.values()), gain=1
    )
    layer.load_state_dict(state)
    assert 'divide' in warnings[0] and 'by 10' in warnings[0]
    layer.load_state_dict({n: t / 10 if n in RECTIFIERS else t for n, t in state.items()})
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    'make_state',
    [
        lambda layer: trained().state_dict(),
        # At 0 they are the same in all versions.
        lambda layer: of_version(UBN2d(4).state_dict(), 2),
        lambda layer: dict(UBN2d(4).state_dict()),
        lambda layer: trained_bn().state_dict(),
        lambda layer: dict(trained_bn().state_dict()),
        # What the layer has already, as mmdet's SyncNormHook loads it: a mean over ranks.
        lambda layer: {n: t * (1 + 1e-6) for n, t in layer.state_dict().items()},
        lambda layer: dict(UBN2d(4, device='meta').state_dict()),
    ],
    ids=['current', 'zeros', 'zeros, no version', 'BN', 'BN, no version', 'its own', 'meta'],
)
def test_what_can_be_told_is_not_warned_of(make_state, warnings):
    layer = trained()
    state = make_state(layer)
    layer.load_state_dict(state, assign=state['weight'].is_meta)
    assert not warnings


def test_bn_takes_no_offence_at_the_version():
    state = UBN2d(4, centering=False, scaling=False, affine_kernel=1).state_dict()
    bn = trained_bn()
    bn.load_state_dict(state, strict=False)
    assert torch.equal(bn.weight, state['weight'])

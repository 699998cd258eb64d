"""torch's own recomputation of running statistics, ``swa_utils.update_bn``, on UBN."""

import copy

import pytest
import torch
from reference import condensation_score, statistics, ubn
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from ubn_det import UBN, SyncUBN, UBN2d
from ubn_det.layers.ubn import EXTRA_PARAMETERS

C = 4
# Both sides compute in float64 and differ in the order of their sums only.
EXACT = dict(rtol=1e-10, atol=1e-10)


def make_model(norm):
    """Make two convolutions with a layer each, random in all that is learnt or kept."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, C, 1), norm(C), nn.ReLU(), nn.Conv2d(C, C, 1), norm(C))
    model.double()
    with torch.no_grad():
        for layer in (model[1], model[4]):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                tensor.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(17)
    return model


def make_loader():
    """Make batches of different sizes, the samples of each alike."""
    shapes = [(3, 3, 4, 4), (2, 3, 5, 2), (5, 3, 1, 3)]
    return [
        torch.randn(shape, dtype=torch.float64) + 5 * (1 + i) for i, shape in enumerate(shapes)
    ]


def test_equals_bn_without_rectifiers():
    loader = make_loader()
    bn = make_model(nn.BatchNorm2d)
    ubn_model = make_model(lambda c: UBN(c, centering=False, scaling=False))
    for model in (bn, ubn_model):
        update_bn(loader, model)
    own = ubn_model.state_dict()
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(own[name], value, **EXACT)
    # Rectifiers at 0 are no rectifiers.
    rectified = make_model(UBN)
    update_bn(loader, rectified)
    torch.testing.assert_close(rectified.state_dict()['4.running_var'], own['4.running_var'])


@pytest.mark.parametrize('on_condensed', ['running', 'freeze'])
@pytest.mark.parametrize('norm', [UBN, UBN2d, SyncUBN])
def test_statistics_are_the_mean_over_batches(norm, on_condensed):
    def make_layer(num_features):
        return norm(num_features, on_condensed=on_condensed, condensation_threshold=-1, warmup=0)

    model = make_model(make_layer)
    layers = (model[1], model[4])
    with torch.no_grad():
        for layer in layers:
            for name in EXTRA_PARAMETERS:
                getattr(layer, name).normal_()
            for name in ('condensation', 'num_batches_condensed', 'consecutive_condensed'):
                getattr(layer, name).fill_(9)
    params = [{name: p.detach() for name, p in layer.named_parameters()} for layer in layers]
    loader = make_loader()
    moments = ([], [])
    for x in loader:
        with torch.no_grad():
            x = model[0](x)
            moments[0].append(statistics(x, params[0]))
            x = model[3](ubn(x, params[0], layers[0].eps)[0].relu())
            moments[1].append(statistics(x, params[1]))

    # Over the threshold with each batch: only a momentum of None keeps the gate open.
    model.eval()
    update_bn(loader, model)
    for layer, batches in zip(layers, moments, strict=True):
        mean = sum(mean for mean, _, _ in batches) / len(batches)
        var = sum(var * n / (n - 1) for _, var, n in batches) / len(batches)
        torch.testing.assert_close(layer.running_mean, mean, **EXACT)
        torch.testing.assert_close(layer.running_var, var, **EXACT)
        assert layer.num_batches_tracked == len(loader)
        assert layer.num_batches_condensed == layer.consecutive_condensed == 0
        assert layer.momentum == 0.1 and layer.condensation_threshold == -1
    score = condensation_score(model[0](loader[-1]).detach())
    torch.testing.assert_close(layers[0].condensation, score)
    assert not model.training and not layers[0].training


def test_a_batch_that_is_not_finite_is_left_out():
    loader = make_loader()
    expected, model = make_model(UBN), make_model(UBN)
    update_bn(loader, expected)
    bad = torch.full((2, 3, 2, 2), torch.nan).double()
    update_bn([loader[0], bad, *loader[1:]], model)
    for i in (1, 4):
        torch.testing.assert_close(model[i].running_mean, expected[i].running_mean, **EXACT)
        torch.testing.assert_close(model[i].running_var, expected[i].running_var, **EXACT)
        assert model[i].num_batches_tracked == len(loader)
        assert model[i].num_batches_condensed == 1


def test_averaged_model():
    loader = make_loader()
    model = make_model(UBN)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    expected = copy.deepcopy(model)
    for one, batches in ((averaged, loader), (expected, loader)):
        update_bn(batches, one)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(averaged.module.state_dict()[name], value, **EXACT)

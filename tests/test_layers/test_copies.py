"""Tests of copies of a compiled layer."""

import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from ubn_det import SyncUBN, UBN2d

COPIES = {'deepcopy': copy.deepcopy, 'pickle': lambda layer: pickle.loads(pickle.dumps(layer))}


def compiled(cls=UBN2d):
    layer = cls(4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.compile(backend='eager')
    return layer


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize('duplicate', COPIES.values(), ids=COPIES)
@pytest.mark.parametrize('cls', [UBN2d, SyncUBN])
def test_copy_of_a_compiled_layer_is_its_own(cls, duplicate):
    layer, x = compiled(cls), torch.randn(3, 4, 5, 6)
    layer(x)
    other, before = duplicate(layer), snapshot(layer)
    with torch.no_grad():
        other.bias.add_(100)
    y = other(x)
    torch.testing.assert_close(snapshot(layer), before, rtol=0, atol=0)
    assert other.num_batches_tracked == 2
    torch.testing.assert_close(y, layer(x) + 100, rtol=1e-4, atol=1e-4)


def test_average_of_a_compiled_model_does_not_move_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), compiled())
    average = ExponentialMovingAverage(model)
    before = snapshot(model)
    average(torch.randn(3, 3, 5, 6))
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
    assert average.module[1].num_batches_tracked == 1

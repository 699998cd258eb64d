"""Graphs of a model in evaluation that run without this package: torch.export and ONNX."""

import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from mmdet.models import ResNet
from torch import nn
from torch.export import Dim

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, fuse
from ubn_det.layers.ubn import EXTRA_PARAMETERS, RECTIFIER_GAIN

# Some of an exporter's own warnings.
pytestmark = pytest.mark.filterwarnings('ignore')


@torch.no_grad()
def randomize(model, std=0.5):
    """Give norms random values, rectifiers among them."""
    for module in model.modules():
        if isinstance(module, UBN):
            for name, parameter in module.named_parameters():
                parameter.normal_(0.5, std)
                if name in EXTRA_PARAMETERS:
                    # A kernel has as much weight in all as one factor.
                    parameter.div_(RECTIFIER_GAIN * parameter[0].numel())
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    model.eval()
    return model


class Layers(nn.Module):
    """A layer of every kind, each with an output of its own."""

    def __init__(self):
        super().__init__()
        self.of_maps = nn.ModuleList(
            [
                UBN2d(4),
                UBN(4, affine_kernel=3),
                SyncUBN(4, centering=False),
                UBN2d(4, scaling=False, affine=False),
                UBN2d(4, centering=False, scaling=False),
                UBN2d(4, centering=False, scaling=False, affine_kernel=5),
            ]
        )
        self.of_vectors = nn.ModuleList([UBN(4), UBN1d(4, affine_kernel=3)])
        self.of_series = UBN1d(4, affine_kernel=3)
        self.of_volumes = UBN3d(4, affine_kernel=3)

    def forward(self, maps, vectors, series, volumes):
        return (
            *[layer(maps) for layer in self.of_maps],
            *[layer(vectors) for layer in self.of_vectors],
            self.of_series(series),
            self.of_volumes(volumes),
        )


SHAPES = [(2, 4, 6, 7), (2, 4), (2, 4, 9), (2, 4, 3, 5, 6)]
OTHER_SHAPES = [(3, 4, 9, 5), (3, 4), (3, 4, 6), (3, 4, 5, 4, 3)]


def make_inputs(shapes):
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.fixture(scope='module')
def layers():
    """The layers, and their exported program of any batch and map size."""
    torch.manual_seed(0)
    model = randomize(Layers())
    batch = Dim('batch')
    dynamic = tuple(
        {0: batch, **{i: Dim.DYNAMIC for i in range(2, len(shape))}} for shape in SHAPES
    )
    return model, torch.export.export(model, make_inputs(SHAPES), dynamic_shapes=dynamic)


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    model = randomize(ResNet(18, base_channels=4, stem_channels=4, norm_cfg=dict(type='UBN')), 0.1)
    dynamic = ({0: Dim('batch'), 2: 32 * Dim('height'), 3: 32 * Dim('width')},)
    example = (torch.randn(2, 3, 64, 96),)
    return model, torch.export.export(model, example, dynamic_shapes=dynamic)


def run_onnx(program, path, inputs):
    """Convert an exported program to ONNX, and run it by onnxruntime."""
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    domains = {node.domain for node in onnx.load(path).graph.node}
    # No operators but those of ONNX itself.
    assert domains == {''}
    return tuple(torch.from_numpy(output) for output in outputs)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def operators_of(program):
    return {str(n.target) for n in program.graph.nodes if n.op == 'call_function'}


def test_exported_layers_equal_on_other_sizes(layers):
    model, program = layers
    for shapes in (SHAPES, OTHER_SHAPES):
        inputs = make_inputs(shapes)
        assert_same(program.module()(*inputs), model(*inputs))


def test_exported_layers_are_of_pytorchs_operators(layers):
    _, program = layers
    names = operators_of(program)
    assert names
    assert not any('ubn_det' in name for name in names)


def test_exported_file_runs_without_this_package(tmp_path):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), UBN2d(4, affine_kernel=3)))
    x = torch.randn(2, 3, 6, 7)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / 'model.pt2')
    torch.save((x, model(x).detach()), tmp_path / 'expected.pth')
    code = (
        'import sys, torch\n'
        'x, expected = torch.load("expected.pth")\n'
        'found = torch.export.load("model.pt2").module()(x)\n'
        'torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)\n'
        'assert "ubn_det" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)


def test_layers_by_onnxruntime(layers, tmp_path):
    model, program = layers
    inputs = make_inputs(OTHER_SHAPES)
    assert_same(run_onnx(program, tmp_path / 'layers.onnx', inputs), model(*inputs))


def test_backbone_by_export_and_onnxruntime(resnet, tmp_path):
    model, program = resnet
    assert not any('ubn_det' in name for name in operators_of(program))
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
    assert_same(program.module()(x), expected)
    assert_same(run_onnx(program, tmp_path / 'resnet.onnx', [x]), expected)


def test_plain_evaluation_has_a_gradient():
    # What is exported may be trained on: all in float64 by finite differences.
    layer = randomize(UBN2d(2, affine_kernel=3).double())
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    module = torch.export.export(layer, (x,)).module()
    assert torch.autograd.gradcheck(module, (x,))
    gradients = []
    for each in (layer, module):
        each.zero_grad()
        each(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    layer = randomize(UBN2d(4))
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    exported = torch.export.export(layer, (x,)).module()(x)
    assert exported.dtype == dtype
    torch.testing.assert_close(exported.float(), layer(x.float()), rtol=1e-2, atol=1e-2)


def test_fused_model_is_exported():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), UBN2d(4, affine_kernel=3))
    randomize(model)
    for name in ('center_weight', 'scale_weight'):
        nn.init.zeros_(getattr(model[1], name))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    fuse(model)
    program = torch.export.export(model, (x,))
    assert operators_of(program) == {'aten.conv2d.default'}
    assert_same([program.module()(x)], [expected])


def test_layer_that_normalizes_by_the_batch_by_onnxruntime(tmp_path):
    layer = randomize(UBN2d(4, track_running_stats=False))
    x = torch.randn(2, 4, 6, 6)
    program = torch.export.export(layer, (x,))
    assert not any('ubn_det' in name for name in operators_of(program))
    assert_same(run_onnx(program, tmp_path / 'layer.onnx', [x]), [layer(x)])

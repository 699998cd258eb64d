"""Tests of folding norms into convolutions: what is folded equals, and nothing wrong is folded."""

import copy
import itertools
import pickle

import mmcv.cnn
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models import FPN, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d, convert, fuse
from ubn_det.layers.ubn import EXTRA_PARAMETERS, RECTIFIER_GAIN

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: (nn.BatchNorm1d, UBN1d), 2: (nn.BatchNorm2d, UBN2d), 3: (nn.BatchNorm3d, UBN3d)}
INSTANCE = ('center_weight', 'scale_weight')


@torch.no_grad()
def randomize(model, trained=False):
    """Give norms random values; rectifiers that depend on the instance only where trained."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.normal_(0.5, 0.5)
                if name in EXTRA_PARAMETERS:
                    parameter.div_(RECTIFIER_GAIN)
                if name in INSTANCE and not trained:
                    parameter.zero_()
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    # mmdet's ResNet returns nothing.
    model.eval()
    return model


def check_fused(model, *inputs, rtol=1e-9, atol=1e-9):
    """Fuse, compare the outputs, and return the report."""
    with torch.no_grad():
        expected = model(*inputs)
        report = fuse(model)
        torch.testing.assert_close(model(*inputs), expected, rtol=rtol, atol=atol)
    return report


def check_kept(model, reason, *inputs):
    """Make sure that nothing is folded and that the reason is given."""
    before = {name: id(p) for name, p in model.named_parameters()}
    (fusion,) = check_fused(model, *inputs).kept
    assert reason in fusion.note
    assert {name: id(p) for name, p in model.named_parameters()} == before
    return fusion


# What is folded


@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('kind', [0, 1])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize(('groups', 'bias'), [(1, False), (2, True)])
def test_fused_pair_equals(kernel, kind, dims, transposed, groups, bias):
    norm = NORMS[dims][kind]
    arguments = dict(affine_kernel=kernel) if norm.__name__.startswith('UBN') else {}
    conv = (TRANSPOSED if transposed else CONVS)[dims]
    model = nn.Sequential(
        conv(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias), norm(6, eps=0.1, **arguments)
    )
    randomize(model.double())
    weight = model[0].weight.detach().clone()
    # Small maps: most of them is border.
    report = check_fused(model, torch.randn(2, 4, *[5] * dims, dtype=torch.float64))
    ((name, cls, convolution, note),) = report
    assert (name, cls, convolution) == ('1', norm.__name__, '0')
    if kernel == 3 and kind == 1:
        assert type(model[1]) is CONVS[dims]
        assert model[1].groups == 6
        assert f'{"x".join("3" * dims)} neighbourhood is a depthwise convolution' in note
    else:
        assert type(model[1]) is nn.Identity
    assert not torch.equal(model[0].weight, weight)
    assert report.folded == list(report)
    assert not report.kept
    assert str(report).startswith('1 norm layers folded, 0 kept\n1 (')


@pytest.mark.parametrize(
    'norm',
    [
        lambda: UBN2d(4, affine=False),
        lambda: UBN2d(4, centering=False),
        lambda: UBN2d(4, scaling=False),
        lambda: UBN2d(4, centering=False, scaling=False, affine_kernel=5),
        lambda: UBN(4, affine_kernel=3),
        lambda: SyncUBN(4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm2d(4, bias=False),
        lambda: nn.SyncBatchNorm(4),
    ],
)
def test_every_kind_of_norm_is_folded(norm):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm()).double())
    assert check_fused(model, torch.randn(2, 3, 5, 6, dtype=torch.float64)).folded


def test_kernel_of_zeros_leaves_nothing():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), UBN2d(4, affine_kernel=3)))
    nn.init.zeros_(model[1].neighbour_weight)
    check_fused(model, torch.randn(2, 3, 5, 6), rtol=1e-4, atol=1e-5)
    assert type(model[1]) is nn.Identity


def test_neighbourhood_of_more_dimensions_than_the_convolution_is_kept():
    # A depthwise Conv2d would take (N, C, L) for one sample.
    norm = UBN(4, centering=False, scaling=False)
    model = randomize(nn.Sequential(nn.Conv1d(3, 4, 3), norm).double())
    check_kept(model, 'the neighbourhood more', torch.randn(2, 3, 8, dtype=torch.float64))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_type_is_kept(dtype):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), UBN2d(4, affine_kernel=3)).to(dtype))
    model[0].weight.requires_grad_(False)
    fuse(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]


def test_pad_mode_and_dilation():
    conv = nn.Conv2d(3, 4, 3, padding=2, dilation=2, padding_mode='reflect')
    model = randomize(nn.Sequential(conv, UBN2d(4)).double())
    assert check_fused(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).folded


class Block(nn.Module):
    """A residual block."""

    def __init__(self, norm=UBN2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.norms = nn.ModuleDict(dict(a=norm(4), b=norm(4)))

    def forward(self, x):
        y = F.relu_(self.bn1(self.conv1(x)))
        for conv, norm in zip(self.convs, self.norms.values(), strict=True):
            y = norm(conv(y))
        return x + y


def test_pairs_in_containers_are_found():
    report = check_fused(randomize(Block().double()), torch.randn(2, 4, 6, 6).double())
    assert {f.name: f.convolution for f in report} == {
        'bn1': 'conv1',
        'norms.a': 'convs.0',
        'norms.b': 'convs.1',
    }


def test_block_that_is_called_several_times_is_folded():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, *levels):
            return [self.block(x) for x in levels]

    xs = [torch.randn(2, 4, size, size).double() for size in (4, 6)]
    assert len(check_fused(randomize(Levels().double()), *xs).folded) == 3


def test_only_what_is_exact_is_folded_in_a_trained_model():
    model = randomize(Block(), trained=True)
    nn.init.zeros_(model.bn1.center_weight)
    nn.init.zeros_(model.bn1.scale_weight)
    report = check_fused(model, torch.randn(2, 4, 6, 6), rtol=1e-4, atol=1e-4)
    assert [f.name for f in report.folded] == ['bn1']
    assert [f.name for f in report.kept] == ['norms.a', 'norms.b']


# What is kept


class Chain(nn.Module):
    """Convolution and norm whose forward is given."""

    def __init__(self, forward, norm=None, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


def in_order(m, x):
    return m.norm(m.conv(x))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x).relu()


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


KEPT = {
    'centering': (
        lambda: Chain(in_order, randomize(UBN2d(4, scaling=False), trained=True)),
        'center_weight is not 0',
    ),
    'scaling': (
        lambda: Chain(in_order, randomize(UBN2d(4, centering=False), trained=True)),
        'scale_weight is not 0',
    ),
    'batch statistics': (
        lambda: Chain(in_order, UBN2d(4, track_running_stats=False)),
        'no running statistics',
    ),
    'before the convolution': (lambda: Chain(lambda m, x: m.conv(m.norm(x))), 'no convolution'),
    'something between': (
        lambda: Chain(lambda m, x: m.norm(m.conv(x).relu())),
        'no convolution is directly before it',
    ),
    'output used elsewhere': (
        lambda: Chain(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x))),
        'its output is used elsewhere too',
    ),
    'output returned': (
        lambda: Chain(lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x))),
        'its output is used elsewhere too',
    ),
    'output changed': (
        lambda: Chain(lambda m, x: (lambda y: m.norm(y.relu_()))(m.conv(x))),
        'no convolution is directly before it',
    ),
    'convolution called twice': (
        lambda: Chain(lambda m, x: m.conv(m.norm(m.conv(x)))),
        'it is called several times',
    ),
    'norm called twice': (lambda: Chain(lambda m, x: m.norm(m.norm(m.conv(x)))), '2 calls of it'),
    'never called': (lambda: Chain(lambda m, x: m.conv(x)), '0 calls of it'),
    'data-dependent': (
        lambda: Chain(lambda m, x: m.norm(m.conv(x)) if x.sum() > -1e9 else x),
        'cannot be traced (TraceError',
    ),
    'other convolution': (
        lambda: Chain(in_order, conv=Doubled(4, 4, 1)),
        'a Doubled may do more than a convolution',
    ),
    'other norm': (
        lambda: Chain(in_order, norm=Activated(4)),
        'Activated is a BatchNorm2d with a forward of its own',
    ),
    'spectral norm': (
        lambda: Chain(in_order, conv=nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)).eval()),
        'has hooks',
    ),
    'weight norm': (
        lambda: Chain(in_order, conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))),
        'may do more than a convolution',
    ),
    'order of ConvModule': (
        lambda: ConvModule(4, 4, 1, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')),
        'no convolution is directly before it',
    ),
    'other order of ConvModule': (
        lambda: ConvModule(4, 4, 1, norm_cfg=dict(type='BN'), order=('conv', 'act', 'norm')),
        'no convolution is directly before it',
    ),
    'efficient_conv_bn_eval': (
        lambda: ConvModule(4, 4, 1, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True),
        '0 calls of it',
    ),
}


@pytest.mark.parametrize('case', KEPT)
def test_what_is_not_exact_is_kept_and_the_reason_given(case):
    make, reason = KEPT[case]
    model = make()
    if case not in ('centering', 'scaling'):
        randomize(model)
    check_kept(model.eval(), reason, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize('which', ['conv', 'norm'])
@pytest.mark.parametrize(
    'change',
    [
        lambda m: m.register_forward_hook(lambda module, args, output: output * 2),
        lambda m: m.register_forward_pre_hook(lambda module, args: None),
        lambda m: setattr(m, 'forward', lambda x: type(m).forward(m, x) * 2),
    ],
)
def test_changed_layer_is_kept(which, change):
    model = randomize(Chain(in_order))
    change(getattr(model, which))
    check_kept(model, 'it has hooks or a forward of its own', torch.randn(2, 4, 5, 5))


def test_norm_after_a_linear_layer_is_kept():
    model = randomize(nn.Sequential(nn.Linear(4, 5), UBN1d(5)))
    check_kept(model, 'no convolution is directly before it', torch.randn(3, 4))


def test_replaced_forward_of_the_block_is_kept():
    model = randomize(Chain(in_order))
    model.forward = lambda x: model.norm(model.conv(x)) + model.conv(x)
    check_kept(model, 'forward of Chain was replaced', torch.randn(2, 4, 5, 5))


def test_shared_layers_are_kept():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.BatchNorm2d(4))
    )
    report = check_fused(randomize(model), torch.randn(2, 4, 5, 5))
    assert [f.note for f in report] == ['0.0: it has several places in the model'] * 2

    shared = UBN2d(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), shared)
    check_kept(randomize(model), 'it has several places in the model', torch.randn(2, 4, 5, 5))


def test_container_that_two_blocks_share_is_kept():
    class User(nn.Module):
        def __init__(self, convs, norm):
            super().__init__()
            self.convs, self.norm = convs, norm

        def forward(self, x):
            x = self.convs[0](x)
            return x if self.norm is None else self.norm(x)

    convs = nn.ModuleList([nn.Conv2d(4, 4, 1)])
    model = nn.Sequential(User(convs, nn.BatchNorm2d(4)), User(convs, None))
    check_kept(randomize(model), 'several places in the model', torch.randn(2, 4, 5, 5))


def test_layer_that_another_module_calls_is_kept():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.inner(x) + self.inner[0](x)

    check_kept(randomize(Outer()), 'it is called several times', torch.randn(2, 4, 5, 5))


# Arguments that decide


def test_conv_module_is_folded_for_its_defaults():
    model = ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type='UBN', affine_kernel=3))
    model = randomize(nn.Sequential(model).double())
    x = torch.randn(2, 4, 5, 5).double()
    without_activation = model[0](x, activate=False)
    assert check_fused(model, x).folded
    torch.testing.assert_close(model[0](x, activate=False), without_activation)
    torch.testing.assert_close(model[0](x, norm=True), model(x))
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for call in (lambda m: m(x, norm=False), lambda m: m(x, True, False)):
            with pytest.raises(
                RuntimeError, match='norm of the fused ConvModule 0 has to be True'
            ):
                call(again[0])


def test_argument_that_changes_the_pair_is_guarded_and_another_is_not():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), UBN2d(4)

        def forward(self, x, skip=None, feature=None, scale=1.0):
            y = self.conv(x)
            z = self.norm(y)
            if skip is not None:
                z = z + skip
            if feature is not None:
                z = z + y
            return z * scale

    x = torch.randn(2, 4, 5, 5).double()
    model = randomize(Optional().double())
    expected = model(x, x, None, 3.0)
    assert check_fused(model, x).folded
    torch.testing.assert_close(model(x, x, scale=3.0), expected)
    with pytest.raises(RuntimeError, match='feature of the fused Optional has to be None'):
        model(x, feature=x)


# The example


class Bypass(nn.Module):
    """What no trace can see: a part of a block is called, where the data decide."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), UBN2d(4))

    def forward(self, x):
        return self.inner(x) + (self.inner[0](x) if x.sum() > -1e9 else 0)


def test_example_proves_the_fused_model():
    x = torch.randn(2, 4, 6, 6)
    assert len(fuse(randomize(Block()), (x,)).folded) == 3


def test_example_that_comes_out_otherwise_restores_the_model():
    x = torch.randn(2, 4, 5, 5)
    model = randomize(Bypass())
    norm, before = model.inner[1], copy.deepcopy(model.state_dict())
    expected = model(x)
    with pytest.raises(RuntimeError, match='other values for example_inputs.*It was restored'):
        fuse(model, (x,))
    assert model.inner[1] is norm
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), expected)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='the model is in training mode'):
        fuse(Block())
    model = Block().eval()
    model.norms['a'].train()
    with pytest.raises(ValueError, match=r'norms\.a is in training mode'):
        fuse(model)
    with pytest.raises(TypeError, match='example_inputs must be a tuple, got Tensor'):
        fuse(Block().eval(), torch.randn(2, 4, 5, 5))


def test_trace_leaves_nothing_behind():
    class Remembering(Chain):
        def forward(self, x):
            self.last_shape = x.shape
            self.conv.seen = x
            return super().forward(x)

    model = randomize(Remembering(in_order))
    report = fuse(model)
    assert report.folded
    assert not hasattr(model, 'last_shape')
    assert not hasattr(model.conv, 'seen')


class Counting(Chain):
    """Counts its calls, in a buffer that it moves in place and in one that it makes anew."""

    def __init__(self):
        super().__init__(in_order)
        self.register_buffer('moved', torch.zeros((), dtype=torch.long))
        self.register_buffer('made', torch.zeros(()))
        self.register_buffer('constant', torch.tensor([1, torch.nan]))
        self.register_buffer('sparse', torch.eye(3).to_sparse())

    def forward(self, x):
        self.moved += 1
        self.sparse *= 2
        self.made = self.made + 1
        if not hasattr(self, 'first'):
            self.register_buffer('first', torch.ones(2))
        # Its output depends on how often it was called.
        return super().forward(x) + self.made


@pytest.mark.parametrize('with_example', [False, True])
@pytest.mark.parametrize('inference', [False, True])
def test_buffers_that_a_forward_moves_stay_as_they_are(with_example, inference):
    with torch.inference_mode(inference):
        model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Counting()))
    before = {name: (b, b.clone()) for name, b in model[2].named_buffers(recurse=False)}
    with torch.inference_mode(inference):
        report = fuse(model, (torch.randn(2, 4, 5, 5),) if with_example else None)
    assert len(report.folded) == 2
    assert list(dict(model.named_buffers())) == [f'2.{name}' for name in before]
    for name, (buffer, value) in before.items():
        assert getattr(model[2], name) is buffer, name
        torch.testing.assert_close(buffer, value, rtol=0, atol=0, equal_nan=True)


class Scripted(nn.Module):
    """Counts its calls as Counting does, where Python sees nothing of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer('moved', torch.zeros(()))
        self.register_buffer('made', torch.zeros(()))

    def forward(self, x):
        self.moved += 1
        self.made = self.made + 1
        return x + self.made


def test_buffers_that_a_scripted_forward_moves_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), torch.jit.script(Scripted()))
    report = fuse(randomize(model), (torch.randn(2, 4, 5, 5),))
    assert len(report.folded) == 1
    assert {name: b.item() for name, b in model.named_buffers()} == {'2.moved': 0, '2.made': 0}


def test_buffers_that_nothing_moves_are_not_written_to():
    model = randomize(Chain(in_order, nn.GroupNorm(2, 4)))
    model.register_buffer('scale', torch.ones(4, 1, 1))
    y = (torch.ones(4, 1, 1, requires_grad=True) * model.scale).sum()
    fuse(model, (torch.randn(2, 4, 5, 5),))
    # What autograd kept of it is still valid.
    y.backward()


def test_model_without_norms_has_an_empty_report():
    assert str(fuse(nn.Sequential(nn.Conv2d(3, 4, 1)).eval())) == '0 norm layers folded, 0 kept'


# Real models


def make_resnet(norm_cfg, **arguments):
    return ResNet(18, base_channels=8, stem_channels=8, norm_cfg=norm_cfg, **arguments)


@pytest.mark.parametrize(
    'arguments', [{}, dict(deep_stem=True, avg_down=True), dict(style='caffe')]
)
def test_resnet_of_mmdet_is_folded_whole(arguments):
    model = randomize(make_resnet(dict(type='UBN'), **arguments))
    report = check_fused(model, torch.randn(2, 3, 48, 48), rtol=1e-3, atol=1e-3)
    assert len(report.folded) == 20 + 2 * ('deep_stem' in arguments)
    assert not report.kept
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


def test_new_ubn_is_folded_to_what_mmcv_folds_bn_to():
    bn = randomize(make_resnet(dict(type='BN')))
    ubn = convert(copy.deepcopy(bn))
    fuse(ubn)
    fused = mmcv.cnn.fuse_conv_bn(bn)
    assert list(ubn.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(ubn.state_dict(), fused.state_dict(), rtol=1e-4, atol=1e-5)


def test_trained_resnet_keeps_its_norms():
    model = randomize(make_resnet(dict(type='UBN')), trained=True)
    report = check_fused(model, torch.randn(2, 3, 48, 48))
    assert len(report.kept) == 20


def test_neck_of_mmdet_is_folded():
    model = randomize(FPN([4, 8], 6, num_outs=3, norm_cfg=dict(type='UBN'), act_cfg=None))
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    assert len(check_fused(model, features, rtol=1e-4, atol=1e-4).folded) == 4


@pytest.mark.parametrize(
    ('name', 'num_folded', 'num_kept'),
    # In DenseNet most norms come before their convolutions.
    [('resnet', 12, 0), ('mobilenet_v3_small', 34, 0), ('densenet', 4, 5)],
)
def test_model_of_torchvision(extra_packages, name, num_folded, num_kept):
    import torchvision.models as models

    if name == 'densenet':
        model = models.DenseNet(4, (1, 2), 4, num_classes=4)
    elif name == 'resnet':
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    else:
        model = models.mobilenet_v3_small(num_classes=4)
    # Half of it UBN, half of it BN.
    turn = itertools.cycle([True, False])
    model = convert(model, dict(affine_kernel=3), select=lambda name, layer: next(turn))
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)}
    assert kinds == {'UBN2d', 'BatchNorm2d'}
    report = check_fused(randomize(model), torch.randn(1, 3, 32, 32), rtol=1e-3, atol=1e-3)
    assert [len(report.folded), len(report.kept)] == [num_folded, num_kept]


@pytest.mark.parametrize(('name', 'num_norms'), [('resnet18', 20), ('mobilenetv2_035', 52)])
def test_model_of_timm(extra_packages, name, num_norms):
    import timm

    turn = itertools.cycle([True, False])
    model = timm.create_model(name, num_classes=4)
    convert(model, select=lambda name, layer: next(turn))
    report = check_fused(randomize(model), torch.randn(1, 3, 32, 32), rtol=1e-3, atol=1e-3)
    assert [len(report.folded), len(report.kept)] == [num_norms, 0]
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())

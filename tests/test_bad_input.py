"""Random nonsense in arguments, configs, state dicts and inputs: it works, or it is named.

Which of the two is written down here, case by case. What is refused leaves the layer as it was, to
the bit.
"""

import copy
import math
import numbers as kinds_of_numbers
from collections import Counter
from fractions import Fraction
from types import NoneType

import fuzzing
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from reference import random_params, ubn
from torch import nn

from ubn_det import UBN, SyncUBN, UBN1d, UBN2d, UBN3d

C = 3

LAYERS = (UBN, UBN1d, UBN2d, UBN3d, SyncUBN)
# Which inputs a layer takes, and how many dimensions its kernel has.
DIMS = {
    UBN: ((2, 3, 4, 5), 2),
    UBN1d: ((2, 3), 1),
    UBN2d: ((4,), 2),
    UBN3d: ((5,), 3),
    SyncUBN: ((2, 3, 4, 5), 2),
}
REFUSED = (TypeError, ValueError, RuntimeError)
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLAGS = ('affine', 'track_running_stats', 'centering', 'scaling')
COUNTERS = (
    'num_batches_tracked',
    'num_batches_condensed',
    'num_batches_readmitted',
    'consecutive_condensed',
    'num_batches_scored',
)

# Of sums of some hundred values, relative to the largest result. Half precision rounds what goes
# into a convolution, too.
CLOSE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.05,
    torch.bfloat16: 0.3,
}


def both_lengths(number):
    """Run a test on ``number`` cases, and as a soak on ten times as many."""
    return pytest.mark.parametrize(
        'number', [number, pytest.param(10 * number, marks=pytest.mark.slow)]
    )


# Values.


class Strange:
    """Like nothing that anybody expects."""


numbers = st.one_of(
    st.integers(-3, 9),
    st.integers().map(lambda n: n << 64),
    st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400]),
    st.floats(),
    st.floats(-1, 1),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
)
words = st.text(max_size=5) | st.sampled_from(
    ['running', 'freeze', 'freeze ', 'True', 'None', '0.5', '3', 'float32']
)
atoms = st.none() | st.booleans() | numbers | words | st.binary(max_size=3)
anything = st.one_of(
    atoms,
    st.lists(atoms, max_size=2),
    st.lists(atoms, max_size=2).map(tuple),
    st.dictionaries(words, atoms, max_size=1),
    st.sampled_from(
        [
            *(np.True_, np.int8(1), np.uint64(3), np.float16(0.5), np.float64(0.5)),
            *(np.float32(math.nan), np.array(1), np.array(0.5), np.ones(2), np.str_('x')),
        ]
    ),
    st.sampled_from(
        [
            *(torch.tensor(1), torch.tensor(0.5), torch.tensor(True), torch.ones(2)),
            *(torch.float32, torch.int64, torch.float8_e5m2, torch.Size([3])),
            *(torch.device('cpu'), torch.strided, nn.Parameter(torch.tensor(3.0))),
        ]
    ),
    st.sampled_from([..., int, float, Strange, Strange(), len, range(3), NotImplemented]),
)

# Some of these are good.
NEARLY = {
    'num_features': st.integers(-1, 5) | st.sampled_from([np.int64(3), 2**40]),
    'eps': st.floats() | st.sampled_from([1e-320, 1e300, 0, 1, 10**400, Fraction(1, 3)]),
    'momentum': st.none() | st.floats(-0.1, 1.1) | st.sampled_from([0, 1, Fraction(1, 3)]),
    **{name: st.booleans() | st.sampled_from([0, 1, np.True_]) for name in FLAGS},
    'condensation_threshold': (
        st.none() | st.floats(-1.1, 1.1) | st.sampled_from([-1, 0, 1, 'auto', 'auto', 'Auto'])
    ),
    'condensation_z': st.floats(-1, 5) | st.sampled_from([3, math.nan, math.inf, 10**400]),
    'condensation_margin': st.floats(-0.1, 2.1) | st.sampled_from([0, 1, Fraction(1, 3)]),
    'on_condensed': st.none() | st.sampled_from(['running', 'freeze', np.str_('freeze'), True]),
    'warmup': st.integers(-1, 3) | st.sampled_from([2**63 - 1, 2**63, 10**30]),
    'patience': st.integers(-1, 3) | st.sampled_from([2**63 - 1, 2**63, 10**30]),
    'affine_kernel': st.integers(-1, 5) | st.sampled_from([2**45 + 1, 2**63 + 1]),
    'device': st.sampled_from([None, 'cpu', 'meta', torch.device('cpu'), 'nowhere', 'cpu:x', '']),
    'dtype': st.sampled_from([None, *TYPES, torch.int64, torch.cfloat, torch.bool, 'float32']),
    'process_group': st.sampled_from([None, None, None, 'x', 0, 1, [0, 1], True]),
}


def is_size(value):
    """Whether it is a matter of memory, or of accelerators, whether ``value`` is too large."""
    return isinstance(value, (int, np.integer)) and 5 < value < 2**31


def is_integer(value, low, high=2**63 - 1):
    is_one = isinstance(value, kinds_of_numbers.Integral) and not isinstance(value, bool)
    return is_one and low <= value <= high


def is_number(value, low, high):
    is_one = isinstance(value, kinds_of_numbers.Real) and not isinstance(value, bool)
    return is_one and low <= value <= high


def is_device(value):
    if not isinstance(value, (str, torch.device)):
        return value is None
    try:
        return torch.device(value).type in ('cpu', 'meta')
    except RuntimeError:
        return False


# What a layer takes; all else is refused.
GOOD = {
    'num_features': lambda value: is_integer(value, 1, 2**31 - 1),
    'eps': lambda value: is_number(value, 0, torch.finfo(torch.float32).max) and value > 0,
    'momentum': lambda value: value is None or is_number(value, 0, 1),
    **{name: (lambda value: isinstance(value, bool)) for name in FLAGS},
    'condensation_threshold': lambda value: (
        value is None or is_number(value, -1, 1) or isinstance(value, str) and value == 'auto'
    ),
    'condensation_z': lambda value: is_number(value, 0, torch.finfo(torch.float32).max),
    'condensation_margin': lambda value: is_number(value, 0, 2),
    # Of the past; every layer does what 'freeze' did.
    'on_condensed': lambda value: value is None or isinstance(value, str) and value == 'freeze',
    'warmup': lambda value: is_integer(value, 0),
    'patience': lambda value: is_integer(value, 1),
    'affine_kernel': lambda value: value is None or is_integer(value, 1, 999) and value % 2 == 1,
    'device': is_device,
    'dtype': lambda value: value is None or isinstance(value, torch.dtype) and value in TYPES,
    'process_group': lambda value: value is None,
}


def refused(arguments):
    """Return the names of the arguments that a layer may not take."""
    names = {name for name, value in arguments.items() if not GOOD[name](value)}
    kernel = arguments.get('affine_kernel')
    # A neighbourhood has nothing to stand beside.
    if arguments.get('affine') is False and not names and kernel is not None and kernel > 1:
        names = {'affine_kernel'}
    # No deviation of fewer scores.
    if arguments.get('condensation_threshold') == 'auto' and arguments.get('warmup') in (0, 1):
        names.add('warmup')
    return names


@st.composite
def random_arguments(draw, kind):
    """Arguments of a layer, some of which may be anything."""
    names = [name for name in NEARLY if name != 'process_group' or kind is SyncUBN]
    arguments = {'num_features': C}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        values = anything
        if name in ('num_features', 'affine_kernel'):
            values = anything.filter(lambda value: not is_size(value))
        elif name == 'device':
            # An integer is an accelerator.
            values = anything.filter(lambda value: not isinstance(value, (int, np.integer)))
        arguments[name] = draw(NEARLY[name] if draw(st.integers(0, 2)) else values)
    return arguments


# What a layer does.


def tensors_of(layer):
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def bits(tensor):
    """Return what tells a tensor from any other."""
    tensor = tensor.detach()
    value = () if tensor.is_meta else tensor.reshape(-1).view(torch.uint8).tolist()
    return tensor.dtype, tensor.shape, tensor.device, value


def snapshot(layer):
    """Return all tensors as objects and as bits."""
    return {name: (tensor, bits(tensor)) for name, tensor in tensors_of(layer).items()}


def assert_unmoved(layer, before):
    after = snapshot(layer)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name][0] is tensor, name
        assert after[name][1] == value, name


def randomize(layer):
    """Give a layer values of which none is at its start; the same at every call."""
    torch.manual_seed(0)
    kernel_dims = layer.neighbour_weight.dim() - 2 if layer.affine_kernel > 1 else 0
    params = random_params(layer.num_features, kernel_dims, layer.affine_kernel)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name])
        for i, name in enumerate(COUNTERS):
            if layer.running_mean is not None:
                getattr(layer, name).fill_(i + 2)
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.condensation.fill_(0.25)
    return layer


def assert_close(found, expected, dtypes, what):
    close = max(CLOSE[dtype] for dtype in dtypes)
    scale = 1 + expected.abs().max().item()
    difference = (found.double() - expected).abs().max().item()
    assert difference <= close * scale, f'{what} is off by {difference}'


def assert_step_equals_reference(layer, x):
    """Compare the output and all gradients of one call with the reference."""
    x = x.detach().requires_grad_()
    y = layer(x)
    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device)
    dy = torch.randn(x.shape).to(x.dtype)
    y.backward(dy)

    constants = ()
    if not layer.training and layer.running_mean is not None:
        constants = [layer.running_mean.double(), layer.running_var.double()]
    leaves = {'x': x, **dict(layer.named_parameters())}
    values = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    expected, *_ = ubn(values['x'], {**values, 'x': None}, layer.eps, *constants)
    gradients = torch.autograd.grad(expected, values.values(), dy.double())
    dtypes = {t.dtype for t in (x, *tensors_of(layer).values()) if t.is_floating_point()}
    if layer.running_mean is not None:
        # The score is kept in float32, and does not enter.
        dtypes -= {layer.condensation.dtype} - {x.dtype, layer.running_mean.dtype}
    assert_close(y, expected.detach(), dtypes, 'y')
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, gradient, dtypes, f'gradient of {name}')
        leaf.grad = None


def random_input(layer):
    dims, kernel_dims = DIMS[type(layer)]
    num_dims = 2 + kernel_dims if layer.affine_kernel > 1 else dims[-1]
    dtype = next(iter(layer.parameters()), torch.zeros(())).dtype
    return torch.randn(5, layer.num_features, *[3] * (num_dims - 2)).to(dtype)


def assert_works(layer, make):
    """Train the layer, evaluate, copy, save and load it; ``make`` makes the same layer again."""
    if any(t.is_meta for t in tensors_of(layer).values()):
        layer.to_empty(device='cpu')
        layer.reset_parameters()
    kinds = dict(eps=float, momentum=float, condensation_threshold=(float, str))
    kinds.update(condensation_z=float, condensation_margin=float)
    kinds.update(num_features=int, warmup=int, patience=int, affine_kernel=int)
    for name, kind in kinds.items():
        assert isinstance(getattr(layer, name), kind) or getattr(layer, name) is None
    randomize(layer)
    for training in (True, True, False):
        assert_step_equals_reference(layer.train(training), random_input(layer))

    x = random_input(layer)
    again = make()
    if any(t.is_meta for t in tensors_of(again).values()):
        again.to_empty(device='cpu')
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer)):
        assert torch.equal(other.eval()(x), layer.eval()(x))
        assert repr(other) == repr(layer)


def assert_all_seen(seen, expected):
    # Hypothesis varies what it drew before: of many kinds, one may be absent by chance.
    assert len(expected - seen.keys()) <= 1, expected - seen.keys()


def assert_named(error, names):
    assert any(name.lower() in str(error).lower() for name in names), f'{error!r}: {names}'


# Arguments.


@both_lengths(1000)
@pytest.mark.parametrize('by', ['class', 'build_norm_layer', 'MODELS.build'])
def test_arguments_work_or_are_named(by, number, request):
    seen = Counter()

    def build(kind, arguments):
        if by == 'class':
            return kind(**arguments)
        # A config is the caller's, who may use it again.
        cfg = {'type': kind.__name__, **arguments}
        if by == 'MODELS.build':
            return MODELS.build(cfg)
        num_features = cfg.pop('num_features')
        return build_norm_layer(cfg, num_features)[1]

    @fuzzing.cases(request, number)
    @given(st.data())
    def check(data):
        # The last has one more argument.
        kind = data.draw(st.sampled_from((*LAYERS, SyncUBN, SyncUBN)))
        arguments = data.draw(random_arguments(kind))
        names = refused(arguments)
        if names:
            with pytest.raises(REFUSED) as raised:
                build(kind, arguments)
            assert_named(raised.value, names)
            seen.update((name, 'refused') for name in names if name in str(raised.value))
        else:
            layer = build(kind, arguments)
            assert type(layer) is kind
            assert_works(layer, lambda: build(kind, arguments))
            seen.update((name, 'accepted') for name in arguments)

    check()
    assert_all_seen(seen, {(name, how) for name in NEARLY for how in ('accepted', 'refused')})


@both_lengths(100)
def test_unknown_keys_of_a_config_are_named(number, request):
    @fuzzing.cases(request, number)
    @given(
        st.sampled_from(LAYERS),
        st.from_regex(r'[A-Za-z]\w{0,8}', fullmatch=True).filter(
            lambda key: key not in {*NEARLY, 'type', 'requires_grad', 'self'}
        ),
        anything,
    )
    def check(kind, key, value):
        cfg = {'type': kind.__name__, key: value}
        for build in (
            lambda: build_norm_layer(cfg, C),
            lambda: MODELS.build({**cfg, 'num_features': C}),
        ):
            with pytest.raises(TypeError) as raised:
                build()
            assert_named(raised.value, [key])

    check()


@both_lengths(100)
def test_a_process_group_that_is_none_is_refused(number, request):
    layer = SyncUBN(C)

    @fuzzing.cases(request, number)
    # A module takes parameters in before its properties see them.
    @given(anything.filter(lambda value: not isinstance(value, (NoneType, nn.Parameter))))
    def check(value):
        with pytest.raises(TypeError, match='process_group'):
            layer.process_group = value
        assert layer.process_group is None

    check()


# State dicts.

OPTIONS = st.fixed_dictionaries(
    {name: st.booleans() for name in FLAGS},
    optional={'dtype': st.sampled_from(TYPES)},
)


@st.composite
def random_layers(draw):
    kind = draw(st.sampled_from(LAYERS))
    options = draw(OPTIONS)
    if options['affine']:
        options['affine_kernel'] = draw(st.sampled_from([1, 3]))
    return randomize(kind(C, **options)).train(draw(st.booleans()))


def changed(draw, tensor):
    """Return something else than ``tensor``, and whether it may not be loaded for it."""
    is_count = not tensor.is_floating_point()
    if draw(st.booleans()):
        entry = draw(
            anything.filter(lambda value: not isinstance(value, torch.Tensor))
            | st.sampled_from([tensor.tolist(), tensor.float().numpy(), nn.Identity()])
        )
        return entry, True
    shape = draw(st.sampled_from([tensor.shape, (), (1,), (C + 1,), (C, 1), (0,), (C, 1, 3, 3)]))
    entry = torch.randint(9, tuple(shape))
    shape_is_wrong = entry.shape != tensor.shape and not (tensor.dim() == 0 and shape == (1,))
    kind = draw(st.sampled_from(['cast', 'fraction', 'no number', 'meta', 'sparse', 'quantized']))
    if kind == 'meta':
        return entry.to('meta', tensor.dtype), True
    if kind == 'sparse':
        return entry.to(tensor.dtype).to_sparse(), True
    if kind == 'quantized':
        return torch.quantize_per_tensor(entry.float(), 0.5, 0, torch.qint8), True
    if kind == 'cast':
        dtypes = [*TYPES, torch.int8, torch.int64, torch.bool, torch.cfloat, torch.float8_e5m2]
        entry = entry.to(draw(st.sampled_from(dtypes)))
        fits = entry.dtype in TYPES or (is_count and entry.dtype in (torch.int8, torch.int64))
        return entry, shape_is_wrong or not fits
    if kind == 'fraction':
        # A counter is cut off, as hooks have it that load a mean.
        return entry + 0.5, shape_is_wrong
    entry = entry + draw(st.sampled_from([math.nan, math.inf, 1e20]))
    return entry, shape_is_wrong or is_count


RECTIFIERS = {'center_weight', 'scale_weight', 'scale_bias', 'neighbour_weight'}
GATE = {'condensation', 'condensation_mean', 'condensation_var', *COUNTERS[1:]}


def starts_at_zero(own, present):
    """Return what a layer makes up where a state dict has no more than ``present`` of its own."""
    shared = own & {'weight', 'bias', 'running_mean', 'running_var'}
    lacking = own - present
    if not shared or not shared <= present:
        # A part of a layer.
        return set()
    if not present & (RECTIFIERS | GATE):
        # Plain BN.
        return lacking & (RECTIFIERS | GATE)
    return set() if lacking & RECTIFIERS else lacking & GATE


LOADERS = {
    'torch': lambda layer, state: layer.load_state_dict(state),
    'torch, not strict': lambda layer, state: layer.load_state_dict(state, strict=False),
    'mmengine': lambda layer, state: mmengine_load_state_dict(layer, state, strict=True),
    'mmengine, not strict': mmengine_load_state_dict,
}


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('prefix', ['', '0.'])
@both_lengths(200)
def test_state_dicts_are_loaded_or_named(load, prefix, number, request):
    seen = Counter()

    @fuzzing.cases(request, number)
    @given(st.data())
    def check(data):
        layer = data.draw(random_layers())
        own = {name: tensor.detach() for name, tensor in tensors_of(layer).items()}
        if not own:
            return
        before = snapshot(layer)
        state = {prefix + name: tensor + 1 for name, tensor in own.items()}
        wrong, missing, unexpected = set(), set(), set()
        for name in data.draw(st.lists(st.sampled_from([*own]), max_size=3, unique=True)):
            key = prefix + name
            if data.draw(st.integers(0, 3)) == 0:
                missing.add(key)
                del state[key]
            else:
                state[key], is_wrong = changed(data.draw, own[name])
                wrong |= {key} if is_wrong else set()
        if data.draw(st.integers(0, 3)) == 0:
            key = prefix + data.draw(st.text(min_size=1, max_size=8) | st.just('weight.x'))
            if key not in state and key[len(prefix) :] not in own:
                unexpected.add(key)
                state[key] = torch.ones(C)

        if data.draw(st.integers(0, 9)) == 0:
            # Weights of a plain BN, which have no more than these.
            missing |= {prefix + name for name in own.keys() & (RECTIFIERS | GATE)}
            for key in missing:
                state.pop(key, None)
            wrong -= missing

        model = nn.Sequential(layer) if prefix else layer
        given_state = dict(state)
        present = {name for name in own if prefix + name in state}
        made_up = starts_at_zero(own.keys(), present)
        # State dicts without versions, as these, are from before there was a counter.
        absent = missing - {prefix + name for name in (*made_up, 'num_batches_tracked')}
        faults = set(wrong)
        if not load.endswith('not strict'):
            faults |= absent | unexpected
        if faults and load != 'mmengine, not strict':
            with pytest.raises(RuntimeError) as raised:
                LOADERS[load](model, state)
            assert all(key in str(raised.value) for key in faults)
            seen['refused'] += 1
        else:
            LOADERS[load](model, state)
            seen['loaded'] += not wrong
        assert {key: id(value) for key, value in state.items()} == {
            key: id(value) for key, value in given_state.items()
        }

        if wrong:
            seen['wrong'] += 1
            assert_unmoved(layer, before)
            return
        for name, tensor in tensors_of(layer).items():
            if prefix + name in state:
                expected = state[prefix + name].to(tensor.dtype).reshape(tensor.shape)
                assert bits(tensor) == bits(expected), name
            elif name in made_up:
                assert not tensor.any(), name
            else:
                assert bits(tensor) == before[name][1], name
        seen['missing'] += bool(missing)
        seen['BN'] += bool(made_up & RECTIFIERS)

    check()
    kinds = ['loaded', 'wrong', 'missing', 'BN']
    assert all(seen[kind] for kind in kinds)
    assert bool(seen['refused']) == (load != 'mmengine, not strict')


# Inputs.


VIEWS = {
    'transposed': lambda x: x.mT.contiguous().mT,
    'expanded': lambda x: x[:1].expand(5, *x.shape[1:]),
    # Its sign is not in memory.
    'negated': lambda x: torch.complex(x, x).conj().imag,
    'parameter': nn.Parameter,
    'leaf': lambda x: x.requires_grad_(),
    'sparse': torch.Tensor.to_sparse,
    'blocked': torch.Tensor.to_mkldnn,
    'nested': lambda x: torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged),
    'meta': lambda x: x.to('meta'),
    'numpy': torch.Tensor.numpy,
    'list': torch.Tensor.tolist,
    'quantized': lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}
DTYPES = [
    *TYPES,
    *(torch.int64, torch.uint8, torch.bool, torch.cfloat, torch.complex32, torch.float8_e4m3fn),
]


@st.composite
def random_inputs(draw, layer):
    """An input that the layer takes, but for one or two things."""
    shape = list(random_input(layer).shape)
    dtype, view = torch.float32, lambda x: x
    changes = ['dims', 'channels', 'dtype', 'dtype', 'dtype', 'sizes', 'view', 'view', 'object']
    for change in draw(st.lists(st.sampled_from(changes), max_size=2, unique=True)):
        if change == 'object':
            return draw(anything.filter(lambda value: not isinstance(value, torch.Tensor)))
        if change == 'dims':
            shape = (shape + [2] * 4)[: draw(st.integers(0, 6))]
        elif change == 'channels' and len(shape) > 1:
            shape[1] = draw(st.sampled_from([0, 1, C + 1]))
        elif change == 'sizes':
            sizes = st.sampled_from([0, 1, 1, 2])
            shape = [size if i == 1 else draw(sizes) for i, size in enumerate(shape)]
        elif change == 'dtype':
            dtype = draw(st.sampled_from(DTYPES))
        elif change == 'view':
            view = VIEWS[draw(st.sampled_from([*VIEWS]))]
    torch.manual_seed(1)
    x = (2 * torch.randn(shape)).to(dtype)
    try:
        return view(x)
    except (IndexError, RuntimeError, TypeError, ValueError):
        # There is no such thing.
        return x


def flaws(layer, x):
    """Return words for all that keeps the layer from taking ``x``."""
    if not isinstance(x, torch.Tensor):
        return [type(x).__name__]
    found = []
    dims, kernel_dims = DIMS[type(layer)]
    if x.dim() not in dims:
        found.append(f'{x.dim()}-D')
    if x.layout != torch.strided:
        return [*found, str(x.layout), 'nested']
    if layer.affine_kernel > 1 and x.dim() > 2 + kernel_dims:
        found.append('affine_kernel')
    if x.dim() > 1 and x.shape[1] != C:
        found.append(f'num_features={C}')
    if x.dtype not in TYPES:
        found.append(str(x.dtype))
    if x.is_meta and tensors_of(layer):
        found.append('meta')
    takes_batch = layer.training or layer.running_mean is None
    if takes_batch and x.dim() > 1 and x.numel() == x.shape[1]:
        found.append('more than 1 value')
    return found


@both_lengths(2000)
def test_inputs_work_or_are_named(number, request):
    seen = Counter()

    @fuzzing.cases(request, number)
    @given(st.data())
    def check(data):
        layer = data.draw(random_layers())
        x = data.draw(random_inputs(layer))
        words = flaws(layer, x)
        before = snapshot(layer)
        if words:
            with pytest.raises(REFUSED) as raised:
                layer(x)
            assert_named(raised.value, words)
            assert_unmoved(layer, before)
            seen.update(words)
            return
        if not x.numel() or x.is_meta:
            y = layer(x)
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
            assert_unmoved(layer, before)
            seen['empty'] += 1
            return
        assert_step_equals_reference(layer, x)
        seen['accepted'] += 1

    check()
    refused = {f'{n}-D' for n in range(7)} | {'affine_kernel', f'num_features={C}', 'meta'}
    refused |= {'more than 1 value', 'ndarray', 'list', 'NoneType'}
    refused |= {str(dtype) for dtype in (torch.int64, torch.bool, torch.cfloat, torch.qint8)}
    refused |= {str(layout) for layout in (torch.sparse_coo, torch._mkldnn, torch.jagged)}
    assert_all_seen(seen, refused | {'accepted', 'empty'})


@pytest.mark.parametrize('options', [{}, dict(affine_kernel=3), dict(affine=False)], ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('input_type', TYPES)
@pytest.mark.parametrize('layer_type', TYPES)
def test_types_of_layer_and_input(layer_type, input_type, training, options):
    layer = randomize(UBN(C, **options).to(layer_type)).train(training)
    assert_step_equals_reference(layer, random_input(layer).to(input_type))
    assert {t.dtype for t in layer.parameters()} == {layer_type}


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('training', [True, False])
def test_a_layer_without_values_is_refused(kind, training):
    for names in (['weight'], ['scale_bias'], ['running_var'], ['num_batches_condensed']):
        layer = randomize(kind(C)).train(training)
        for name in names:
            tensor = getattr(layer, name)
            meta = tensor.to('meta')
            setattr(layer, name, nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta)
        before = snapshot(layer)
        with pytest.raises(RuntimeError, match=f'{names[0]} of this .* on the meta device'):
            layer(random_input(layer))
        assert_unmoved(layer, before)

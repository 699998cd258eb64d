"""Tests of the formula in PyTorch's operators against a text of its own, in float64."""

import itertools

import pytest
import reference
import torch

from ubn_det.ops import Parameters, condensation_score
from ubn_det.ops.reference import accumulate_dtype, apply_gain, describe, evaluate, train

EPS = 1e-3
GAIN = 10

# float64: two orders of summation of a few hundred terms of size 1 to 10.
CLOSE = dict(rtol=1e-10, atol=1e-10)

# Which parameters there are.
NAMES = {
    'none': (),
    'affine': ('weight', 'bias'),
    'centering': ('center_weight',),
    'scaling': ('scale_weight', 'scale_bias'),
    'rectifiers': ('center_weight', 'scale_weight', 'scale_bias'),
    'neighbourhood': ('weight', 'bias', 'neighbour_weight'),
    'all': Parameters._fields,
}
SHAPES = [
    *((6, 3), (3, 4, 7), (3, 4, 5, 6), (2, 3, 2, 3, 4)),
    # One sample, one value in a plane, one channel, a map smaller than the neighbourhood.
    *((1, 4, 5, 6), (5, 4, 1, 1), (3, 1, 4, 4), (2, 4, 2, 1)),
]

names = pytest.mark.parametrize('names', NAMES.values(), ids=NAMES)
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)


def make(shape, names, kernel=3):
    params = reference.random_params(shape[1], len(shape) - 2, kernel)
    params = {name: params[name].requires_grad_() for name in names if name in params}
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), params


def statistics(num_features):
    return torch.randn(num_features).double(), torch.rand(num_features).double() + 0.5


def check(y, expected, x, params):
    """Compare outputs and all gradients."""
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    leaves = [x, *params.values()]
    found = torch.autograd.grad(y, leaves, dy)
    for name, a, b in zip(
        ['x', *params], found, torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, n=name: f'{n}: {m}')


@names
@shapes
def test_train(shape, names):
    if len(shape) == 2 and 'neighbour_weight' in names:
        pytest.skip('the layer gives vectors with a neighbourhood a dimension of their own')
    x, params = make(shape, names)
    y, summary = train(x, Parameters(**params), EPS, GAIN, True, None)
    expected, mean, var = reference.ubn(x, params, EPS)
    check(y, expected, x, params)
    check_summary(summary, x, mean, var, is_scored=True)


@names
@shapes
def test_evaluate(shape, names):
    if len(shape) == 2 and 'neighbour_weight' in names:
        pytest.skip('the layer gives vectors with a neighbourhood a dimension of their own')
    x, params = make(shape, names)
    mean, var = statistics(shape[1])
    y = evaluate(x, mean, var, Parameters(**params), EPS, GAIN)
    check(y, reference.ubn(x, params, EPS, mean, var)[0], x, params)


@pytest.mark.parametrize('kernel', [5, 7])
def test_neighbourhood_larger_than_the_map(kernel):
    x, params = make((2, 3, 4, 3), NAMES['all'], kernel)
    y, _ = train(x, Parameters(**params), EPS, GAIN, False, None)
    check(y, reference.ubn(x, params, EPS)[0], x, params)


def check_summary(summary, x, mean, var, is_scored):
    assert not summary.requires_grad
    num, num_features = x.shape[:2]
    num_pairs = num * (num - 1) if is_scored else 0
    pair_sum = reference.condensation_score(x.detach()) * num_pairs if num_pairs else 0
    counts = torch.tensor([x.numel() / num_features, pair_sum, num_pairs]).double()
    torch.testing.assert_close(summary, torch.cat([mean.detach(), var.detach(), counts]), **CLOSE)


@shapes
@pytest.mark.parametrize('is_scored', [True, False])
@pytest.mark.parametrize('has_centering', [True, False])
def test_describe(shape, is_scored, has_centering):
    x, params = make(shape, NAMES['centering'] if has_centering else ())
    mean, var, _ = reference.statistics(x, params)
    summary = describe(x, params.get('center_weight'), GAIN, is_scored)
    check_summary(summary, x, mean, var, is_scored)


@names
@pytest.mark.parametrize('shape', [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (2, 3, 0)], ids=str)
def test_empty_input_stays_in_the_graph(shape, names):
    x, params = make(shape, names)
    mean, var = statistics(shape[1])
    y, summary = train(x, Parameters(**params), EPS, GAIN, True, None)
    assert not summary.any()
    for output in (y, evaluate(x, mean, var, Parameters(**params), EPS, GAIN)):
        assert output.shape == x.shape
        for gradient in torch.autograd.grad(output.sum(), [x, *params.values()]):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, params = make((3, 4, 5, 6), NAMES['all'])
    x = x.detach().to(dtype).requires_grad_()
    params = {n: p.detach().float().requires_grad_() for n, p in params.items()}
    y, summary = train(x, Parameters(**params), EPS, GAIN, True, None)
    wide = x.detach().float().requires_grad_()
    expected, expected_summary = train(wide, Parameters(**params), EPS, GAIN, True, None)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(summary, expected_summary)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *params.values()], dy)
    wanted = torch.autograd.grad(expected, [wide, *params.values()], dy.float())
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b.to(a.dtype))


# The gain


def test_gain_multiplies_the_value_and_divides_the_gradient():
    _, params = make((2, 3, 4, 4), NAMES['all'])
    effective = apply_gain(Parameters(**params), GAIN, torch.float64)._asdict()
    for name, p in params.items():
        gain = reference.gain_of(name)
        torch.testing.assert_close(effective[name], gain * p, **CLOSE)
        (gradient,) = torch.autograd.grad(effective[name].sum(), p)
        torch.testing.assert_close(gradient, torch.full_like(p, 1 / gain), **CLOSE)


def test_gain_leaves_what_is_absent_and_takes_the_type():
    weight = torch.randn(3).half()
    effective = apply_gain(Parameters(center_weight=weight), GAIN, torch.float32)
    torch.testing.assert_close(effective.center_weight, GAIN * weight.float())
    assert effective.count(None) == 5


@pytest.mark.parametrize(
    'dtype, expected',
    [
        *[(d, torch.float32) for d in (torch.float16, torch.bfloat16, torch.float32)],
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_accumulate_dtype(dtype, expected):
    assert accumulate_dtype(dtype) == expected


# The score

# On both sides of the number of samples from which the pairs are no longer taken one by one.
NUMS = [2, 3, 4, 5, 6, 17]
SCORE = {torch.float64: 1e-12, torch.float32: 1e-6}


def alike(num, shape, common=1.0):
    """Return samples that share a part; they differ in norm by large factors."""
    x = common * torch.randn(shape, dtype=torch.float64) + torch.randn(num, *shape).double()
    return x * torch.logspace(-2, 2, num, dtype=torch.float64).view(-1, *[1] * len(shape))


@pytest.mark.parametrize('num', NUMS)
@pytest.mark.parametrize('dtype', list(SCORE), ids=str)
@pytest.mark.parametrize('common', [0.0, 1.0, 3.0])
def test_score_is_the_mean_cosine_similarity(num, dtype, common, device):
    for shape in ((5,), (5, 7), (3, 4, 5), (2, 3, 4, 2)):
        x = alike(num, shape, common).to(dtype)
        score = condensation_score(x.to(device))
        assert score.shape == () and score.dtype == dtype
        expected = reference.condensation_score(x.double())
        torch.testing.assert_close(score.cpu().double(), expected, rtol=0, atol=SCORE[dtype])


@pytest.mark.parametrize('num, zeros', itertools.product(NUMS, [1, 2, None]))
def test_a_sample_of_zeros_is_like_no_other(num, zeros):
    x = alike(num, (3, 4))
    x[:zeros] = 0
    expected = reference.condensation_score(x)
    torch.testing.assert_close(condensation_score(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('num', [3, 6])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_score_is_not_finite_where_the_input_is_not(num, value):
    x = torch.randn(num, 3, 4, 5)
    x[1, 2, 3, 4] = value
    assert not torch.isfinite(condensation_score(x))


@pytest.mark.parametrize('num', [2, 8])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_lower_the_precision(num, dtype, device):
    x = alike(num, (4, 8, 8)).float().to(device)
    _, params = make(x.shape, NAMES['all'])
    params = Parameters(**{name: p.float().to(device) for name, p in params.items()})
    plain = train(x, params, EPS, GAIN, True, None)
    with torch.autocast(device.type, dtype):
        cast = train(x, params, EPS, GAIN, True, None)
    for a, b in zip(cast, plain, strict=True):
        assert torch.equal(a, b)

"""Tests of the condensation score against cosine similarity, pair by pair."""

import pytest
import reference
import torch

from ubn_det.ops import condensation, condensation_score

# float32 is wide enough for the score of half-precision features, whose values are exact in it.
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.float16: dict(rtol=1e-5, atol=1e-6),
    torch.bfloat16: dict(rtol=1e-5, atol=1e-6),
}

# On both sides of the number of samples from which the pairs are no longer taken one by one.
NUMS = [2, 3, 4, 5, 6, 17]


def square_norm(x):
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(kept).flatten(1).square().sum(1)


def score_of(x):
    return condensation_score(x, square_norm(x))


def alike(num, shape, common=1.0):
    """Return samples that share a part; they differ in norm by large factors."""
    x = common * torch.randn(shape, dtype=torch.float64) + torch.randn(num, *shape).double()
    return x * torch.logspace(-2, 2, num, dtype=torch.float64).view(-1, *[1] * len(shape))


@pytest.mark.parametrize('num', NUMS)
@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=str)
@pytest.mark.parametrize('common', [0.0, 1.0, 3.0])
def test_equals_mean_cosine_similarity(num, dtype, common, device):
    x = alike(num, (3, 4, 5), common).to(dtype)
    score = score_of(x.to(device))
    assert score.shape == ()
    assert score.dtype == torch.promote_types(dtype, torch.float32)
    expected = reference.condensation_score(x.double())
    torch.testing.assert_close(score.cpu().double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize('shape', [(5,), (5, 7), (5, 3, 4), (2, 3, 4, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize('num', [3, 6])
def test_every_number_of_dimensions(num, shape):
    x = alike(num, shape)
    expected = reference.condensation_score(x)
    torch.testing.assert_close(score_of(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('num', NUMS)
def test_identical_samples_score_one(num):
    x = torch.randn(3, 4, 5).expand(num, -1, -1, -1).contiguous()
    torch.testing.assert_close(score_of(x), torch.tensor(1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize('num', NUMS)
def test_orthogonal_samples_score_zero(num):
    x = torch.eye(num).view(num, 1, num) * torch.arange(1.0, num + 1)
    torch.testing.assert_close(score_of(x), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize('num', NUMS)
def test_opposite_samples_score_negative(num):
    signs = torch.tensor([(-1.0) ** i for i in range(num)])
    x = signs.view(-1, 1, 1) * torch.randn(1, 3, 4)
    # (sum of signs)^2 less the num pairs of a sample with itself.
    expected = (signs.sum() ** 2 - num) / (num * (num - 1))
    torch.testing.assert_close(score_of(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('num', NUMS)
@pytest.mark.parametrize('zeros', [1, 2])
def test_a_sample_of_zeros_is_like_no_other(num, zeros):
    x = alike(num, (3, 4))
    x[:zeros] = 0
    expected = reference.condensation_score(x)
    torch.testing.assert_close(score_of(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('num', NUMS)
def test_only_zeros_score_zero(num):
    x = torch.zeros(num, 3, 4)
    torch.testing.assert_close(score_of(x), torch.tensor(0.0), rtol=0, atol=0)


@pytest.mark.parametrize('num', [3, 6])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_not_finite_where_the_input_is_not(num, value):
    x = torch.randn(num, 3, 4, 5)
    x[1, 2, 3, 4] = value
    assert not torch.isfinite(score_of(x))


@pytest.mark.parametrize('num', [2, 4, 6])
@pytest.mark.parametrize('part', [1, 7, 24, 1000])
def test_half_precision_in_parts(num, part, monkeypatch):
    # Parts that divide the sample evenly and not, of one value, and larger than all.
    monkeypatch.setattr(condensation, '_PART', part)
    x = alike(num, (3, 4, 5)).half()
    expected = reference.condensation_score(x.double())
    torch.testing.assert_close(score_of(x).double(), expected, **TOLERANCE[torch.float16])


@pytest.mark.parametrize('num', [2, 8])
def test_half_precision_products_do_not_overflow(num):
    x = (torch.randn(num, 16, 16, 16) + 1) * 8000
    x = x.clamp(-6e4, 6e4).half()
    expected = reference.condensation_score(x.double())
    torch.testing.assert_close(score_of(x).double(), expected, **TOLERANCE[torch.float16])


@pytest.mark.parametrize('num', [2, 8])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_lower_the_precision(num, dtype, device):
    x = alike(num, (8, 8, 8)).float()
    plain = score_of(x.to(device))
    with torch.autocast(device.type, dtype):
        cast = score_of(x.to(device))
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)

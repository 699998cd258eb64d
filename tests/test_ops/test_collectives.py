"""Tests of what ranks tell each other: how summaries combine, and the gradient of it."""

import pytest
import reference
import torch

from ubn_det.ops import collectives
from ubn_det.ops.collectives import combine, share_statistics
from ubn_det.ops.reference import describe

CLOSE = dict(rtol=1e-12, atol=1e-12)
SHAPES = [(2, 4, 3, 5), (5, 4, 1, 1), (0, 4, 3, 3), (1, 4, 7, 2), (2, 4, 0, 3)]


def make_parts(dtype=torch.float64, offset=0):
    return [offset + i + (1 + i) * torch.randn(s, dtype=dtype) for i, s in enumerate(SHAPES)]


@pytest.mark.parametrize('chosen', [range(5), [0], [2, 1], [1, 2], [2, 4], [4, 0]], ids=str)
def test_parts_of_any_size_combine_to_the_whole(chosen):
    parts = [make_parts()[i] for i in chosen]
    summary = combine(torch.stack([describe(part, None, 10.0, True) for part in parts]))
    present = [part for part in parts if part.numel()]
    if not present:
        assert not summary.any()
        return
    mean, var, count = reference.statistics(present)
    pairs = [(len(p) * (len(p) - 1), p) for p in present if len(p) > 1]
    pair_sum = sum(n * reference.condensation_score(p) for n, p in pairs)
    counts = torch.tensor([count, pair_sum, sum(n for n, _ in pairs)]).double()
    torch.testing.assert_close(summary, torch.cat([mean, var, counts]), **CLOSE)


def test_a_large_mean_does_not_cancel():
    parts = make_parts(torch.float32, offset=1e4)
    summary = combine(torch.stack([describe(part, None, 10.0, False) for part in parts]))
    _, var, _ = reference.statistics([p.double() for p in parts if p.numel()])
    # Each mean is off by up to 2^-24 of 1e4; E[x^2] - mean^2 would be off by about 10.
    torch.testing.assert_close(summary[4:8].double(), var, rtol=1e-3, atol=0)


def test_what_is_not_finite_is_seen_by_all():
    parts = make_parts()
    parts[3][0, 2, 1, 1] = float('nan')
    summary = combine(torch.stack([describe(part, None, 10.0, True) for part in parts]))
    assert summary[:4].isnan().tolist() == [False, False, True, False]


def test_gradient_of_shared_statistics(monkeypatch):
    """Every rank's own statistics get their part of what all ranks send back."""
    parts = [part for part in make_parts() if part.numel()]
    local = [reference.statistics(part) for part in parts]
    leaves = [t.clone().requires_grad_() for mean, var, _ in local for t in (mean, var)]
    counts = torch.tensor([float(count) for *_, count in local]).double()

    # Chan's formula, differentiated by autograd.
    share = (counts / counts.sum())[:, None]
    means, variances = torch.stack(leaves[::2]), torch.stack(leaves[1::2])
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    sent = [torch.randn(2, 4).double() for _ in parts]
    loss = sum((mean * d_mean + var * d_var).sum() for d_mean, d_var in sent)
    expected = torch.autograd.grad(loss, leaves)

    summary = torch.cat([mean, var, counts.sum().view(1), torch.zeros(2)]).detach()
    monkeypatch.setattr(collectives, 'resolve', lambda name: name)
    monkeypatch.setattr(
        collectives.dist, 'all_reduce', lambda t, group: t.copy_(torch.stack(sent).sum(0))
    )
    for i, (d_mean, d_var) in enumerate(sent):
        shared = share_statistics(leaves[2 * i], leaves[2 * i + 1], counts[i], summary, 'group')
        torch.testing.assert_close(shared, (mean.detach(), var.detach()), **CLOSE)
        found = torch.autograd.grad(shared, leaves[2 * i : 2 * i + 2], (d_mean, d_var))
        torch.testing.assert_close(found, expected[2 * i : 2 * i + 2], **CLOSE)

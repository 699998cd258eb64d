"""Tests of benchmarks/inject_faults.py and of the norm that it composes."""

import csv
import math

import inject_faults
import pytest
import torch
from distributed import run
from norm_peers import ComposedSyncBN
from tiny_config import ROOT, run_tool
from torch import nn


def train_on_rank(rank, xs, dys, weight, bias):
    layer = ComposedSyncBN(xs[0].shape[1], momentum=0.3)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    x = xs[rank].requires_grad_()
    y = layer(x)
    y.backward(dys[rank])
    layer.eval()
    return dict(
        y=y.detach(),
        dx=x.grad,
        gradients=(layer.weight.grad, layer.bias.grad),
        stats=(layer.running_mean, layer.running_var),
        evaluated=layer(x).detach(),
    )


def test_composed_norm_is_bn_of_the_whole_batch():
    xs = [torch.randn(n, 3, 5, 4) * 2 + 1 for n in (2, 3)]
    dys = [torch.randn_like(x) for x in xs]
    weight, bias = torch.randn(3), torch.randn(3)
    bn = nn.BatchNorm2d(3, momentum=0.3).double()
    bn.weight.data.copy_(weight)
    bn.bias.data.copy_(bias)
    x = torch.cat(xs).double().requires_grad_()
    y = bn(x)
    y.backward(torch.cat(dys).double())
    bn.eval()

    ranks = run(2, train_on_rank, xs, dys, weight, bias)
    close = dict(rtol=1e-4, atol=1e-5, check_dtype=False)
    for name, expected in (('y', y.detach()), ('dx', x.grad), ('evaluated', bn(x).detach())):
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]), expected, **close)
    for index, expected in enumerate((bn.weight.grad, bn.bias.grad)):
        found = sum(r['gradients'][index] for r in ranks)
        torch.testing.assert_close(found, expected, **close)
    for rank in ranks:
        torch.testing.assert_close(rank['stats'], (bn.running_mean, bn.running_var), **close)


def test_faults_are_put_in_and_reported(tmp_path):
    table = tmp_path / 'faults.csv'
    faults = ('none', 'NaN at a layer')
    run_tool(
        ROOT / 'benchmarks/inject_faults.py',
        table,
        '--iters',
        6,
        '--norms',
        'BN',
        'SyncUBN',
        '--faults',
        *faults,
    )
    with table.open() as file:
        rows = {(r['norm'], r['fault'], r['amp']): r for r in csv.DictReader(file)}
    assert rows.keys() == {
        (norm, *kind)
        for norm in ('BN', 'SyncUBN')
        for kind in (('none', 'False'), ('none', 'True'), ('NaN at a layer', 'False'))
    }
    for (norm, fault, _), row in rows.items():
        is_faulty = fault != 'none'
        assert int(row['num_skipped']) == 3 * is_faulty
        assert row['finite_stats'] == str(not is_faulty or norm == 'SyncUBN')
        assert row['equal_stats'] == str(norm == 'SyncUBN')
        assert row['finite_weights'] == 'True'
    page = table.with_suffix('.md').read_text()
    assert '| BN | NaN at a layer | 3 | **not finite** | differ | finite |' in page
    assert '| SyncUBN | 1 | 0 | 0 | 0 | 0 |' in page
    # The rows have all that is on the page.
    table.with_suffix('.md').unlink()
    run_tool(ROOT / 'benchmarks/inject_faults.py', table, '--report')
    assert table.with_suffix('.md').read_text() == page


def outcomes(survivors):
    """Return outcomes of a run without and one with a fault, which some norms survive."""
    return [
        inject_faults.Outcome(
            norm=norm,
            fault=fault,
            amp=False,
            num_skipped=0,
            finite_stats=is_well,
            equal_stats=True,
            finite_weights=is_well,
            loss=1.0,
            eval_loss=1.0 if is_well else math.nan,
            iters=60,
            torch='2.0',
        )
        for norm in ('BN', 'SyncBN', 'UBN', 'SyncUBN')
        for fault in ('none', 'NaN in a sample')
        for is_well in [fault == 'none' or norm in survivors]
    ]


def test_page_has_no_opinion_of_its_own():
    """The same words whatever was measured; what came of the norms is in the tables."""
    pages = [
        inject_faults.make_page(outcomes(survivors)).splitlines()
        for survivors in (('UBN', 'SyncUBN'), ('BN', 'SyncBN'))
    ]
    texts = [[line for line in page if not line.startswith('|')] for page in pages]
    assert texts[0] == texts[1]
    assert not any('UBN' in line for line in texts[0])
    for norm in ('BN', 'SyncBN', 'UBN', 'SyncUBN'):
        lost = [f'| {norm} | 1 | {n} | {n} | 0 | {n} |' in page for page, n in zip(pages, (1, 1))]
        assert lost == [norm.endswith('BN') and 'U' not in norm, 'U' in norm]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--report'], 'no such file'),
        (['--faults', 'NaN at a layer'], "--faults needs 'none' as well"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    done = run_tool(
        ROOT / 'benchmarks/inject_faults.py', tmp_path / 'faults.csv', *options, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr

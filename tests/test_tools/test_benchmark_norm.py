"""The benchmark on small sizes, and its report on rows with a known answer."""

import csv
import sys

import pytest
import reference
import torch
from tiny_config import ROOT, load_tool, run_tool

BENCHMARK = ROOT / 'tools/benchmark_norm.py'
REPORT = ROOT / 'tools/report_performance.py'


def read(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp('bench') / 'performance.csv'
    arguments = ('--suites', 'layer', 'memory', 'ranks', '--rounds', 1, '--scale', 0.05)
    run_tool(BENCHMARK, path, *arguments)
    return path


def test_fused_models_are_timed_beside_unfused_ones(tmp_path):
    path = tmp_path / 'performance.csv'
    scales = ('--model-rounds', 1, '--model-scale', 0.05)
    run_tool(BENCHMARK, path, '--suites', 'fused', *scales)
    methods = {row['method']: row['baseline'] for row in read(path)}
    assert set(methods.values()) == {'BN, fused'}
    assert {'BN', 'UBN', 'UBN, fused', 'UBN-3, fused', 'UBN, rectifiers on'} <= methods.keys()


def test_rows(measured):
    rows = read(measured)
    layer = [row for row in rows if row['suite'] == 'layer']
    assert {row['mode'] for row in layer} == {'forward', 'forward+backward', 'evaluation'}
    assert {'BN', 'GN', 'RBN', 'BNET-3', 'UBN', 'UBN, stage 1 on'} <= {r['method'] for r in layer}
    for row in rows:
        assert all(
            row[key] for key in ('machine', 'torch', 'commit', 'command', 'date', 'threads')
        )
        assert float(row['low']) <= float(row['median']) <= float(row['high'])
        assert float(row['ratio']) == 1 or row['method'] != row['baseline']
    counts = {
        (row['mode'], row['unit']): float(row['median'])
        for row in rows
        if row['suite'] == 'ranks' and row['case'] == 'ranks=2' and row['unit'] != 'ms'
    }
    # 256 channels in float32.
    assert counts == {
        ('forward', 'calls'): 1,
        ('backward', 'calls'): 1,
        ('forward', 'bytes'): 4 * (2 * 256 + 3),
        ('backward', 'bytes'): 4 * 2 * 256,
    }


def test_report(measured):
    done = run_tool(REPORT, measured, check=False)
    assert done.returncode in (0, 1)
    assert ('MISSED' in done.stdout) == (done.returncode == 1)
    assert '| bytes kept for backward' in done.stdout
    page = measured.with_suffix('.md').read_text()
    assert '### forward+backward, x BN' in page
    assert 'GPU' in page
    assert measured.with_suffix('.png').stat().st_size > 0


def make_rows(medians, suite='layer', mode='forward+backward'):
    return [
        dict(
            suite=suite,
            mode=mode,
            dtype='float32',
            memory_format='contiguous',
            unit='ms',
            method=method,
            case=case,
            median=str(value),
        )
        for (method, case), value in medians.items()
    ]


@pytest.mark.parametrize('ubn, met', [(0.95, True), (0.96, False)])
def test_bars_are_held_against_ratios(ubn, met, monkeypatch):
    report = load_tool('report_performance', monkeypatch)
    # Ratios of u^2 and 1: their geometric mean is u.
    medians = {
        ('BN', 'a'): 2.0,
        ('UBN', 'a'): 2.0 * ubn**2,
        ('BN', 'b'): 5.0,
        ('UBN', 'b'): 5.0,
    }
    rows = make_rows(medians)
    figures = {bar.what: bar.figure(rows) for bar in report.BARS if bar.device == 'cpu'}
    assert figures['forward + backward, geometric mean'] == pytest.approx(ubn)
    assert figures['forward + backward, worst shape'] == pytest.approx(1)
    assert figures['evaluation, geometric mean'] is None
    lines, is_missed = report.judge({('cpu', 'default'): rows})
    assert is_missed != met
    assert sum('MISSED' in line for line in lines) == (not met)
    assert all('not measured' in line for line in lines if 'GPU' in line)


def test_exponent(monkeypatch):
    report = load_tool('report_performance', monkeypatch)
    # Small sizes cost a constant; the fit is over the larger half.
    points = [(n, 3.0 * n**1.5 if n > 8 else 100.0) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert report.exponent(points) == pytest.approx(1.5)


def test_shapes_are_those_of_the_detector(monkeypatch):
    shapes = load_tool('benchmark_norm', monkeypatch).norm_shapes(1.0)
    assert shapes[2, 64, 400, 672] == 1
    assert shapes[2, 2048, 25, 42] == 4
    assert shapes[1024, 256, 7, 7] == 4
    # 53 in the backbone, 8 in the neck, 4 + 4 in the heads.
    assert sum(shapes.values()) == 69


def test_peers_are_what_their_papers_say(monkeypatch):
    load_tool('benchmark_norm', monkeypatch)
    peers = sys.modules['norm_peers']
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    rbn, bnet = peers.RBN(4).double(), peers.BNET(4, 3).double()
    for parameter in (*rbn.parameters(), *bnet.parameters()):
        torch.nn.init.normal_(parameter)
    values = {name: p.flatten() for name, p in rbn.named_parameters()}
    torch.testing.assert_close(rbn(x), reference.rbn(x, **values, eps=1e-5))
    torch.testing.assert_close(bnet(x), reference.bnet(x, bnet[1].weight, bnet[1].bias, eps=1e-5))


@pytest.mark.parametrize(
    'arguments, message',
    [(('--rounds', 0), '--rounds'), (('--scale', 0), '--scale'), (('--suites', 'x'), '--suites')],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run_tool(BENCHMARK, tmp_path / 'a.csv', *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / 'a.csv').exists()


def test_report_names_a_missing_file(tmp_path):
    done = run_tool(REPORT, tmp_path / 'a.csv', check=False)
    assert done.returncode == 2
    assert 'a.csv: no such file' in done.stderr

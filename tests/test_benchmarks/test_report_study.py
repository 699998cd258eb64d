"""benchmarks/report_study.py on synthetic runs whose answers are known."""

import csv
import math

import numpy as np
import pytest
from tiny_config import load_tool

STEPS = (25, 50, 75, 100)


@pytest.fixture
def tool(monkeypatch):
    return load_tool('benchmarks/report_study.py', monkeypatch)


def write_study(path, runs, evaluations=None):
    """Write runs {(setting, seed): (box mAP at STEPS, seconds per iteration)}; mask is half."""
    rows = []
    for (setting, seed), (curve, seconds) in runs.items():
        for step, value in zip(STEPS, curve):
            rows.append((setting, seed, step, 'coco/bbox_mAP', value))
            rows.append((setting, seed, step, 'coco/segm_mAP', value / 2))
            rows.append((setting, seed, step, 'loss', 1.0))
        rows.append((setting, seed, 0, 'seconds_per_iter', seconds))
        for name, value in (evaluations or {}).items():
            rows.append((setting, seed, -1, f'{name}/coco/bbox_mAP', curve[-1] + value))
            rows.append((setting, seed, -1, f'{name}/coco/segm_mAP', curve[-1] / 2 + value))
    with path.open('w', newline='') as file:
        csv.writer(file).writerows([('setting', 'seed', 'step', 'tag', 'value'), *rows])
    return path


@pytest.fixture
def runs():
    """BN from 0 to 0.4 and, with the noise of the seeds, UBN that is 0.04 above it throughout."""
    noise = (0.0, 0.02, -0.02, 0.01)
    curve = np.array([0.1, 0.2, 0.3, 0.4])
    bn = {('BN', seed): (curve + noise[seed], 1.0) for seed in range(4)}
    ubn = {('UBN', seed): (curve + noise[seed] + 0.04, 1.5) for seed in range(4)}
    return bn | ubn


def test_gains_are_those_of_the_pairs_not_of_the_noise(tool, tmp_path, runs):
    # A fifth run of UBN has no partner, and is far off.
    runs['UBN', 7] = (np.array([0.9] * 4), 9.0)
    rows = {
        row.setting: row
        for row in tool.summarize(tool.Study(write_study(tmp_path / 'a.csv', runs), 'BN'))
    }
    row = rows['UBN']
    # The mean of box and mask, where mask is half of box: 3/4 of 4 points.
    for gain in (row.early_gain, row.final_gain):
        assert gain == pytest.approx((3.0, 3.0, 3.0, 4, 4))
    # From 0 the curve rises to it in the first quarter: 1/8 of the area is missing.
    assert row.area_gain.mean == pytest.approx(3.0 * 7 / 8)
    assert row.time_ratio == pytest.approx(1.5)
    assert row.early.mean() == pytest.approx(75 * np.mean([0.14, 0.16, 0.12, 0.15, 0.9]))
    assert row.final[0].mean() == pytest.approx(100 * np.mean([0.44, 0.46, 0.42, 0.45, 0.9]))
    assert row.final[1].mean() == pytest.approx(row.final[0].mean() / 2)
    # 0.04 less than the last 0.1 of 25 iterations.
    assert row.reached == pytest.approx(90)
    assert rows['BN'].reached == pytest.approx(100)
    assert rows['BN'].final_gain == (0, 0, 0, 4, 0)


def test_a_setting_that_never_reaches_the_baseline(tool, tmp_path, runs):
    for seed in range(4):
        runs['GN', seed] = (runs['BN', seed][0] - 0.05, 1.0)
    study = tool.Study(write_study(tmp_path / 'a.csv', runs), 'BN')
    row = next(row for row in tool.summarize(study) if row.setting == 'GN')
    assert math.isinf(row.reached)
    assert row.final_gain.num_better == 0
    assert '| never |' in tool.make_table([row], study.metrics)


def test_a_single_pair_has_no_interval(tool, tmp_path, runs):
    single = {run: value for run, value in runs.items() if run[0] == 'BN' or run[1] == 0}
    study = tool.Study(write_study(tmp_path / 'a.csv', single), 'BN')
    bn, ubn = tool.make_table(tool.summarize(study), study.metrics).splitlines()[2:]
    assert '| +3.0 |' in ubn
    assert '[' not in ubn
    assert '| +0.0 [+0.0, +0.0] |' in bn


# Quantiles at 0.975 as tables of the distribution have them.
@pytest.mark.parametrize(('pairs', 'quantile'), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_the_interval_is_that_of_student(tool, pairs, quantile):
    differences = np.random.default_rng(1).normal(2, 3, pairs)
    gain = tool.compare(differences)
    deviation = math.sqrt(sum((d - differences.mean()) ** 2 for d in differences) / (pairs - 1))
    half = quantile * deviation / math.sqrt(pairs)
    assert gain.mean == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(gain.mean - half, rel=1e-3)
    assert gain.high == pytest.approx(gain.mean + half, rel=1e-3)


@pytest.mark.parametrize('pairs', [2, 3, 5])
def test_the_interval_of_few_pairs_holds_the_truth_as_often_as_it_says(tool, pairs):
    generator = np.random.default_rng(2)
    held = []
    for _ in range(2000):
        gain = tool.compare(generator.normal(1, 1, pairs))
        held.append(gain.low <= 1 <= gain.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ('target', 'expected'), [(0, 0), (1, 5), (2, 10), (3, 15), (4, 20), (5, math.inf)]
)
def test_iterations_to_reach(tool, target, expected):
    steps, values = np.array([10, 20, 30]), np.array([2.0, 4.0, 3.0])
    assert tool.iterations_to_reach(steps, values, target) == expected


def test_area_under(tool):
    # Triangle, then a level, over 30 iterations.
    assert tool.area_under(np.array([10, 30]), np.array([2.0, 2.0])) == pytest.approx(50 / 30)


def test_evaluations_say_how_far_the_same_weights_move(tool, tmp_path, runs):
    path = write_study(tmp_path / 'a.csv', runs, {'batch of 2': -0.013, 'padded': 0.002})
    table = tool.make_evaluation_table(tool.Study(path, 'BN'))
    assert table.splitlines()[0] == '| setting | batch of 2 | padded |'
    assert '| UBN | -1.3 [-1.3, -1.3] | +0.2 [+0.2, +0.2] |' in table


def test_everything_is_written(tool, tmp_path, runs):
    path = write_study(tmp_path / 'a.csv', runs)
    rows = [
        ('UBN', step, f'{tag}/{layer}', 0.5)
        for step in (50, 100)
        for tag in ('condensation', 'condensed_share')
        for layer in ('bn1', 'layer1.bn1', 'mean')
    ]
    with (tmp_path / 'a_condensation.csv').open('w', newline='') as file:
        csv.writer(file).writerows([('setting', 'step', 'tag', 'value'), *rows])
    assert tool.main([str(path)]) == 0
    with (tmp_path / 'a_summary.csv').open() as file:
        summary = {row['setting']: row for row in csv.DictReader(file)}
    assert float(summary['UBN']['final_gain']) == pytest.approx(3.0)
    assert float(summary['UBN']['iterations_to_baseline']) == pytest.approx(90)
    assert '| UBN | 4 |' in (tmp_path / 'a.md').read_text()
    for name in ('a_curves.png', 'a_condensation.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('has_thresholds', [False, True])
def test_gates_are_drawn_beside_scores(tool, tmp_path, monkeypatch, has_thresholds):
    tags = ['condensation', *['condensation_threshold'] * has_thresholds, 'condensed_share']
    path = tmp_path / 'a_condensation.csv'
    rows = [('UBN', step, f'{tag}/bn1', 0.5) for step in (50, 100) for tag in tags]
    with path.open('w', newline='') as file:
        csv.writer(file).writerows([('setting', 'step', 'tag', 'value'), *rows])
    drawn = []
    monkeypatch.setattr(tool, 'draw_heatmap', lambda ax, values, *_, **__: drawn.append(values))
    assert tool.draw_condensation(path, tmp_path / 'a.png', None)
    assert drawn == [{50: {'bn1': 0.5}, 100: {'bn1': 0.5}}] * len(tags)


def test_an_unknown_baseline_is_named(tool, tmp_path, runs, capsys):
    path = write_study(tmp_path / 'a.csv', runs)
    with pytest.raises(SystemExit):
        tool.main([str(path), '--baseline', 'GN'])
    assert "no run of the baseline 'GN'" in capsys.readouterr().err

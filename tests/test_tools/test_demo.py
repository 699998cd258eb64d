"""The demo on a small data set, and its pictures."""

import json
import sys

import numpy as np
import pytest
from tiny_config import ROOT, load_tool, run_tool

from ubn_det.datasets import generate_coco

DEMO = ROOT / 'tools/demo.py'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    data = folder / 'data'
    generate_coco(data, num_train=8, num_val=2, side_range=(64, 96))
    command = (DEMO, '--data', data, '--work-dir', folder / 'run', '--max-iters', 2)
    return folder, command, run_tool(*command)


def test_demo_leaves_everything_in_one_folder(finished):
    folder, _, done = finished
    run = folder / 'run'
    for name in ('iter_2.pth', 'scalars.json', 'training.png', 'predictions.png', 'metrics.json'):
        assert (run / name).stat().st_size > 0, name
    assert 'bbox_mAP' in done.stdout
    assert 'segm_mAP_50' in done.stdout
    assert 'eta' in done.stdout + done.stderr


def test_demo_run_again_trains_no_more(finished):
    folder, command, _ = finished
    before = (folder / 'run/iter_2.pth').stat().st_mtime_ns
    again = run_tool(*command)
    assert 'bbox_mAP' in again.stdout
    assert (folder / 'run/iter_2.pth').stat().st_mtime_ns == before


def test_demo_refuses_a_folder_of_another_run(finished):
    folder, command, _ = finished
    other = run_tool(*command[:-1], 3, check=False)
    assert other.returncode == 2
    assert 'other settings' in other.stderr


def test_demo_names_what_a_data_folder_lacks(tmp_path):
    done = run_tool(DEMO, '--data', tmp_path, '--work-dir', tmp_path / 'run', check=False)
    assert done.returncode == 2
    assert 'annotations/instances_train.json' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'box, mask, code', [(0.30, 0.25, 0), (0.9, 0.9, 0), (0.299, 0.9, 1), (0.9, 0.249, 1)]
)
def test_demo_fails_below_its_bars(box, mask, code, monkeypatch, capsys):
    demo = load_tool('demo', monkeypatch)
    assert demo.check_bars(dict(bbox_mAP=box, segm_mAP=mask)) == code
    assert ('failed' in capsys.readouterr().err) == bool(code)


def test_plot_shows_the_scalars_of_a_resumed_run(tmp_path, monkeypatch):
    plot = load_tool('plot_training', monkeypatch)
    runs = {
        '20260101_000000': [
            {
                **{'loss': 2.0, 'step': 1, 'condensation/a': 0.1, 'condensation/mean': 0.1},
                **{f'condensation_threshold/{name}': 0.3 for name in ('a', 'mean', 'max')},
            },
            {'loss': 9.0, 'step': 2},
        ],
        '20260102_000000': [{'loss': 1.0, 'step': 2}, {'coco/bbox_mAP': 0.5, 'step': 2}],
    }
    for name, rows in runs.items():
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))
    steps = plot.read_scalars(tmp_path)
    assert steps[2] == {'loss': 1.0, 'coco/bbox_mAP': 0.5}
    assert steps[1]['condensation/a'] == 0.1
    plot.plot_training(tmp_path, tmp_path / 'out.png')
    picture = sys.modules['matplotlib'].image.imread(tmp_path / 'out.png')
    assert np.ptp(picture) > 0


def test_plot_of_a_run_without_a_threshold_has_the_shares(tmp_path, monkeypatch):
    plot = load_tool('plot_training', monkeypatch)
    folder = tmp_path / '20260101_000000/vis_data'
    folder.mkdir(parents=True)
    row = {'loss': 2.0, 'step': 5, 'condensed_share/a': 0.25, 'condensed_share/mean': 0.25}
    (folder / 'scalars.json').write_text(json.dumps(row))
    drawn = []
    monkeypatch.setattr(plot, 'draw_heatmap', lambda axes, *args, **kwargs: drawn.append(args))
    plot.plot_training(tmp_path, tmp_path / 'out.png')
    nothing = ({}, ['a'])
    assert [args[:2] for args in drawn] == [nothing, nothing, ({5: {'a': 0.25}}, ['a'])]
    monkeypatch.undo()
    plot.plot_training(tmp_path, tmp_path / 'out.png')


def test_plot_without_a_log_names_the_folder(tmp_path, monkeypatch):
    plot = load_tool('plot_training', monkeypatch)
    with pytest.raises(FileNotFoundError, match='scalars.json'):
        plot.plot_training(tmp_path, tmp_path / 'out.png')

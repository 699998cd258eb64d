"""The demo on a small data set."""

import pytest
from generated import generate_coco
from tiny_config import ROOT, load_tool, run_tool

DEMO = ROOT / 'demo/demo.py'


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
    demo = load_tool('demo/demo.py', monkeypatch)
    assert demo.check_bars(dict(bbox_mAP=box, segm_mAP=mask)) == code
    assert ('failed' in capsys.readouterr().err) == bool(code)

"""The picture of a training run."""

import json

import matplotlib
import numpy as np
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from ubn_det import visualization


def test_plot_shows_the_scalars_of_a_resumed_run(tmp_path):
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
    steps = visualization.read_scalars(tmp_path)
    assert steps[2] == {'loss': 1.0, 'coco/bbox_mAP': 0.5}
    assert steps[1]['condensation/a'] == 0.1
    visualization.plot_training(tmp_path, tmp_path / 'out.png')
    picture = plt.imread(tmp_path / 'out.png')
    assert np.ptp(picture) > 0


def test_plot_of_a_run_without_a_threshold_has_the_shares(tmp_path, monkeypatch):
    folder = tmp_path / '20260101_000000/vis_data'
    folder.mkdir(parents=True)
    row = {'loss': 2.0, 'step': 5, 'condensed_share/a': 0.25, 'condensed_share/mean': 0.25}
    (folder / 'scalars.json').write_text(json.dumps(row))
    drawn = []
    monkeypatch.setattr(
        visualization, 'draw_heatmap', lambda axes, *args, **kwargs: drawn.append(args)
    )
    visualization.plot_training(tmp_path, tmp_path / 'out.png')
    nothing = ({}, ['a'])
    assert [args[:2] for args in drawn] == [nothing, nothing, ({5: {'a': 0.25}}, ['a'])]
    monkeypatch.undo()
    visualization.plot_training(tmp_path, tmp_path / 'out.png')


def test_plot_without_a_log_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='scalars.json'):
        visualization.plot_training(tmp_path, tmp_path / 'out.png')

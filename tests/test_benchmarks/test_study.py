"""benchmarks/study.py on a grid of tiny runs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from tiny_config import ROOT, load_tool, run_tool, write_config

from ubn_det import UBN

GRIDS = sorted((ROOT / 'benchmarks/study/grids').glob('*.py'))

STUDY = """
config = '{config}'
baseline = 'BN'
seeds = [0, 1]
settings = {{
    'BN': {{}},
    'UBN, gate': {{
        'model.norm_cfg': dict(type='UBN', condensation_threshold=0.5, warmup=5),
    }},
}}
evaluations = {{'half': {{'test_dataloader.dataset.start': 1000}}}}
_note = 'names with an underscore are free'
"""
OPTIONS = """
_base_ = '{root}/benchmarks/study/resnet-small_digits.py'
train_cfg = dict(max_iters=40, val_interval=20)
default_hooks = dict(checkpoint=dict(interval=20))
model = dict(channels=(4, 8))
"""


@pytest.fixture
def tool(monkeypatch):
    return load_tool('benchmarks/study.py', monkeypatch)


@pytest.fixture
def study(tmp_path):
    """Write a study of four runs of 40 iterations on handwritten digits."""
    return write_study(tmp_path)


def write_study(folder, extra=''):
    config = folder / 'digits.py'
    config.write_text(OPTIONS.format(root=ROOT) + extra)
    path = folder / 'study.py'
    path.write_text(STUDY.format(config=config))
    return path


def read_rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_grid_is_trained_once_and_collected(study, tmp_path):
    out = tmp_path / 'out' / 'study.csv'
    arguments = (
        ROOT / 'benchmarks/study.py',
        study,
        '--work-dir',
        tmp_path / 'runs',
        '--out',
        out,
    )
    first = run_tool(*arguments, '--jobs', '2')
    assert '4 runs, 0 done before' in first.stdout
    rows = read_rows(out)
    runs = {(row['setting'], row['seed']) for row in rows}
    assert runs == {(s, k) for s in ('BN', 'UBN, gate') for k in '01'}
    accuracy = {
        (row['setting'], row['seed'], row['step']): row['value']
        for row in rows
        if row['tag'] == 'digits/accuracy'
    }
    assert {step for _, _, step in accuracy} == {'20', '40'}
    assert len(set(accuracy.values())) > 2
    # The further evaluation is of the last weights, on other digits.
    result = json.loads((tmp_path / 'runs/bn/seed0/result.json').read_text())
    half = result['evaluations']['half']['digits/accuracy']
    [row] = [r for r in rows if r['tag'] == 'half/digits/accuracy' and r['step'] == '-1'][:1]
    assert float(row['value']) == pytest.approx(half, rel=1e-4)
    assert not list((tmp_path / 'runs').glob('**/*.pth'))
    # What a training logs stays in its folder; what made a run is in its rows.
    assert not [row for row in rows if row['tag'] in ('loss', 'lr')]
    assert {row['commit'] for row in rows} == {result['origin']['commit']}
    assert all(row['machine'] and row['date'].startswith('20') for row in rows)
    scores = read_rows(out.with_name('study_condensation.csv'))
    assert {row['setting'] for row in scores} == {'UBN, gate'}
    assert {'condensation/stem.bn', 'condensed_share/mean'} <= {row['tag'] for row in scores}

    second = run_tool(*arguments)
    assert '4 runs, 4 done before' in second.stdout
    assert read_rows(out) == rows


@pytest.mark.parametrize('path', GRIDS, ids=lambda path: path.stem)
def test_settings_of_a_grid_differ_and_build(tool, path):
    register_all_modules()
    study = tool.load_study(path)
    marks = {tool.fingerprint(study, setting) for setting in study.settings}
    assert len(marks) == len(study.settings)
    for setting, options in study.settings.items():
        cfg = tool.build_config(study, setting, 0, None)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        # A misspelt key would leave the base config's BN.
        has_ubn = any(isinstance(module, UBN) for module in model.modules())
        assert has_ubn == ("'UBN'" in str(options)), setting
        if 'batch' in path.stem:
            assert cfg.train_dataloader.batch_size == int(path.stem.split('batch')[1])


def test_interrupted_study_goes_on(tmp_path):
    """Killed in the middle of a run, with what it has started, it resumes that run."""
    study = write_study(
        tmp_path,
        "custom_imports = dict(imports=['small_classification', 'ubn_det', 'fault_hooks'])\n"
        "default_hooks['pause'] = dict(type='PauseHook')\n",
    )
    runs = tmp_path / 'runs'
    command = [
        sys.executable,
        ROOT / 'benchmarks/study.py',
        study,
        '--work-dir',
        runs,
        '--jobs',
        '1',
    ]
    command += ['--seeds', '0', '--settings', 'BN']
    environment = os.environ | dict(
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
        PYTHONPATH=os.pathsep.join(
            [str(ROOT / 'tests/helpers'), os.environ.get('PYTHONPATH', '')]
        ),
        # It was saved after 20 iterations, and these are to be evaluated yet.
        PAUSE_BEFORE='evaluation 20',
    )
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    mark = runs / 'bn/seed0/last_checkpoint'
    deadline = time.monotonic() + 400
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert mark.exists()
    assert not (runs / 'bn/seed0/result.json').exists()

    run_tool(*command[1:])
    log = (runs / 'bn/seed0/output.txt').read_text()
    assert 'resumed epoch' in log
    result = json.loads((runs / 'bn/seed0/result.json').read_text())
    assert [s for s, v in result['scalars'].items() if 'digits/accuracy' in v] == [*('20', '40')]


def test_failed_run_is_named_and_the_others_are_done(study, tmp_path):
    text = study.read_text().replace('threshold=0.5', 'threshold=5.0')
    study.write_text(text)
    done = run_tool(
        ROOT / 'benchmarks/study.py',
        study,
        '--work-dir',
        tmp_path / 'runs',
        '--seeds',
        '0',
        check=False,
    )
    assert done.returncode == 1
    folder = tmp_path / 'runs/ubn-gate/seed0'
    assert f'UBN, gate, seed 0: FAILED, see {folder}/output.txt' in done.stdout
    assert 'condensation_threshold must lie in [-1, 1]' in (folder / 'output.txt').read_text()
    assert 'BN, seed 0: done' in done.stdout


def test_shares_of_closed_gates_are_those_of_all_batches_after_the_warm_up(tool):
    tags = 'condensed_share/a', 'condensed_share/b', 'condensed_share/mean', 'condensed_share/max'
    rows = {25: (0, 0, 0, 0), 50: (0, 0, 0, 0), 75: (0.4, 0, 0.2, 0.4), 85: (1, 0.5, 0.75, 1)}
    scalars = {step: dict(zip(tags, values), loss=1.0) for step, values in rows.items()}
    # Metrics of an evaluation in between are of no batches.
    scalars[80] = {'digits/accuracy': 0.5}
    # 10 of 25 batches and 10 of 10, and 5 of these, where 35 could be closed.
    expected = {tags[0]: 20 / 35, tags[1]: 5 / 35, tags[2]: 12.5 / 35}
    assert tool.condensed_shares(scalars) == pytest.approx(expected)
    assert tool.condensed_shares({10: {'loss': 1.0}}) == {}


def test_folder_of_other_settings_is_refused(tool, study, tmp_path):
    cfg = tool.load_study(study)
    run = tool.make_grid(cfg, tmp_path / 'runs')[1]
    run.folder.mkdir(parents=True)
    (run.folder / 'fingerprint').write_text(run.fingerprint)
    assert tool.read_result(run) is None
    cfg.settings[run.setting]['model.norm_cfg'].warmup = 6
    changed = tool.make_grid(cfg, tmp_path / 'runs')
    assert tool.read_result(changed[0]) is None
    with pytest.raises(tool.StudyError, match='with other settings'):
        tool.read_result(changed[1])


@pytest.mark.parametrize('file', ['ubn_det/layers/ubn.py', 'small_classification.py'])
def test_run_of_other_code_is_refused(tool, study, tmp_path, monkeypatch, file):
    cfg = tool.load_study(study)
    run = tool.make_grid(cfg, tmp_path / 'runs')[1]
    run.folder.mkdir(parents=True)
    (run.folder / 'fingerprint').write_text(run.fingerprint)
    assert tool.read_result(tool.make_grid(cfg, tmp_path / 'runs')[1]) is None
    read_bytes = Path.read_bytes

    def changed(path):
        return read_bytes(path) + b'#' * str(path).endswith(file)

    monkeypatch.setattr(Path, 'read_bytes', changed)
    with pytest.raises(tool.StudyError, match='of other code'):
        tool.read_result(tool.make_grid(cfg, tmp_path / 'runs')[1])


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ("baseline = 'BN'", "baseline = 'GN'", "baseline 'GN' is none of the settings"),
        ('seeds = [0, 1]', 'seeds = [1, 1]', 'seeds must differ'),
        ('seeds = [0, 1]', 'seeds = 3', 'seeds must be a list'),
        ('evaluations', 'evaluation', 'unknown evaluation'),
        ("'UBN, gate'", "'b.n'", None),
        ("'UBN, gate'", "'bn'", 'must differ in letters or digits'),
    ],
)
def test_bad_study_is_named(tool, study, old, new, message):
    study.write_text(study.read_text().replace(old, new))
    if message is None:
        tool.load_study(study)
        return
    with pytest.raises(tool.StudyError, match=message):
        tool.load_study(study)


def test_settings_of_one_seed_have_the_same_weights_and_data(tool, tmp_path):
    """Norms that draw different numbers of random numbers in the heads, too."""
    register_all_modules()
    config = write_config(tmp_path, norm='BN', extra='randomness = dict(seed=0)')
    text = config.read_text().replace('condensation_threshold', 'affine_kernel')
    text = text.replace('affine_kernel=0.3, warmup=1, patience=2', '')
    config.write_text(text)
    study = tmp_path / 'study.py'
    norms = ('backbone', 'neck', 'roi_head.mask_head')
    options = {f'model.{p}.norm_cfg.type': 'UBN' for p in norms}
    study.write_text(
        f"config = '{config}'\nbaseline = 'BN'\nseeds = [0, 3]\n"
        f'settings = {{"BN": {{}}, "UBN": {options}}}\n'
    )
    cfg = tool.load_study(study)
    seen = {}
    for seed in cfg.seeds:
        for setting in cfg.settings:
            run = tool.build_config(cfg, setting, seed, None)
            run.work_dir = str(tmp_path / 'runs' / setting / str(seed))
            run.experiment_name = f'{setting}_{seed}'
            run.train_dataloader.dataset.pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
            runner = Runner.from_cfg(run)
            weights, images = {}, []
            loss = runner.model.loss

            def spy(inputs, samples, runner=runner, loss=loss, weights=weights, images=images):
                if not images:
                    weights.update((k, v.clone()) for k, v in runner.model.state_dict().items())
                images.append([(s.img_id, s.flip) for s in samples])
                return loss(inputs, samples)

            runner.model.loss = spy
            runner.train()
            seen[seed, setting] = weights, images
    for seed in cfg.seeds:
        (weights, images), (others, other_images) = seen[seed, 'BN'], seen[seed, 'UBN']
        assert images == other_images
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=0, atol=0)
    assert seen[0, 'BN'][1] != seen[3, 'BN'][1]
    name = 'backbone.conv1.weight'
    assert not torch.equal(seen[0, 'BN'][0][name], seen[3, 'BN'][0][name])

"""Training and testing by the real tools, in processes of their own."""

import json
import pickle
import signal

import pytest
import torch
from tiny_config import ROOT, run_tool, write_config

TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """An uninterrupted run of eight iterations."""
    folder = tmp_path_factory.mktemp('train')
    extra = (
        "custom_imports = dict(imports=['ubn_det', 'fault_hooks'])\n"
        "custom_hooks = [dict(type='KillHook')]\n"
    )
    config = write_config(folder, max_iters=8, extra=extra)
    done = run_tool(TRAIN, config, '--work-dir', folder / 'whole')
    return folder, config, done


def test_killed_run_resumes_to_the_same_weights(trained):
    folder, config, _ = trained
    work_dir = folder / 'killed'
    killed = run_tool(TRAIN, config, '--work-dir', work_dir, check=False, KILL_AT='6')
    assert killed.returncode == -signal.SIGKILL
    assert (work_dir / 'last_checkpoint').read_text().endswith('iter_4.pth')
    run_tool(TRAIN, config, '--work-dir', work_dir, '--resume')

    whole, resumed = load(folder / 'whole/iter_8.pth'), load(work_dir / 'iter_8.pth')
    assert whole['state_dict'].keys() == resumed['state_dict'].keys()
    for name, value in whole['state_dict'].items():
        torch.testing.assert_close(resumed['state_dict'][name], value, rtol=0, atol=0, msg=name)
    # The run was one in which resuming could have gone wrong.
    condensed = [v for k, v in whole['state_dict'].items() if k.endswith('num_batches_condensed')]
    assert sum(condensed) > 0
    halfway = load(folder / 'whole/iter_4.pth')['state_dict']
    assert any(not torch.equal(halfway[k], v) for k, v in whole['state_dict'].items())


def test_scalars_hold_loss_map_and_condensation(trained):
    folder, _, _ = trained
    (log,) = (folder / 'whole').glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    tags = {tag for row in rows for tag in row}
    assert {'loss', 'coco/bbox_mAP', 'coco/segm_mAP', 'condensation/mean'} <= tags
    assert 'condensation/backbone.layer4.1.bn2' in tags
    assert 'condensed_share/neck.fpn_convs.0.bn' in tags
    steps = [row['step'] for row in rows if 'condensation/mean' in row]
    assert steps == list(range(1, 9))


def test_start_says_how_many_layers_train(trained):
    _, _, done = trained
    text = done.stdout + done.stderr
    assert 'UBN: 29 layers (0 SyncUBN), 29 train their statistics, 0 do not' in text


def test_testing_evaluates_and_dumps(trained):
    folder, config, _ = trained
    checkpoint = folder / 'whole/iter_8.pth'
    prefix = folder / 'results'
    out = folder / 'predictions.pkl'
    done = run_tool(
        TEST,
        config,
        checkpoint,
        '--work-dir',
        folder / 'test',
        '--out',
        out,
        '--cfg-options',
        f'test_evaluator.outfile_prefix={prefix}',
    )
    assert 'coco/segm_mAP' in done.stdout + done.stderr
    assert len(pickle.loads(out.read_bytes())) == 3
    for metric in ('bbox', 'segm'):
        assert json.loads((folder / f'results.{metric}.json').read_text()) is not None


def test_test_time_augmentation_runs(trained):
    folder, config, _ = trained
    done = run_tool(
        TEST,
        config,
        folder / 'whole/iter_8.pth',
        '--tta',
        '--work-dir',
        folder / 'tta',
        '--cfg-options',
        # mmdet's test-time augmentation merges boxes only.
        'model.roi_head.mask_head=None',
        'model.roi_head.mask_roi_extractor=None',
        'test_evaluator.metric=bbox',
    )
    assert 'coco/bbox_mAP' in done.stdout + done.stderr


def test_data_root_replaces_the_folder_of_the_config(trained, tmp_path):
    folder, config, _ = trained
    moved = tmp_path / 'elsewhere'
    moved.symlink_to(folder / 'data')
    text = config.read_text().replace(str(folder / 'data'), str(tmp_path / 'missing'))
    config = tmp_path / 'moved.py'
    config.write_text(text.replace('max_iters=8, val_interval=8', 'max_iters=1, val_interval=1'))
    lost = run_tool(TRAIN, config, '--work-dir', tmp_path / 'lost', check=False)
    assert lost.returncode != 0
    assert 'missing/annotations/instances_train.json' in lost.stderr
    run_tool(TRAIN, config, '--work-dir', tmp_path / 'found', '--data-root', moved)
    wrong = run_tool(
        TRAIN, config, '--work-dir', tmp_path / 'x', '--data-root', tmp_path / 'no', check=False
    )
    assert '--data-root: no folder' in wrong.stderr

"""Several CPU processes by the real scripts."""

import pytest
import torch
from tiny_config import ROOT, free_port, run_tool, write_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dist')
    extra = "custom_imports = dict(imports=['ubn_det', 'fault_hooks'])"
    config = write_config(folder, max_iters=2, norm='SyncUBN', extra=extra)
    done = run_tool(
        ROOT / 'tools/dist_train.sh',
        config,
        2,
        '--work-dir',
        folder / 'run',
        PORT=free_port(),
        SAY_THREADS='1',
    )
    return folder, config, done


def assert_no_thread_of_gloo(done):
    """Those that run while a process exits abort it now and then."""
    left = [line for line in done.stdout.splitlines() if 'threads at the end' in line]
    assert len(left) == 2
    assert not any('gloo' in line for line in left), left


def test_two_processes_train_and_evaluate(trained):
    folder, _, done = trained
    text = done.stdout + done.stderr
    assert 'UBN: 29 layers (29 SyncUBN), 29 train their statistics' in text
    assert 'GPU number: 2' in text
    assert 'coco/segm_mAP' in text
    checkpoint = torch.load(folder / 'run/iter_2.pth', weights_only=False)
    state = checkpoint['state_dict']
    assert state['backbone.bn1.num_batches_tracked'] == 2
    assert all(torch.isfinite(v).all() for v in state.values())
    assert_no_thread_of_gloo(done)


def test_two_processes_test(trained):
    folder, config, _ = trained
    done = run_tool(
        ROOT / 'tools/dist_test.sh',
        config,
        folder / 'run/iter_2.pth',
        2,
        '--work-dir',
        folder / 'test',
        PORT=free_port(),
        SAY_THREADS='1',
    )
    assert 'coco/segm_mAP' in done.stdout + done.stderr
    assert_no_thread_of_gloo(done)


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_script_without_arguments_says_how_to_use_it(script):
    done = run_tool(ROOT / 'tools' / script, check=False)
    assert done.returncode == 2
    assert 'usage:' in done.stderr


def test_slurm_script_starts_one_launcher_per_node(tmp_path):
    # No cluster here: stand-ins of srun and scontrol show what would be started.
    for name, body in (
        (
            'srun',
            'printf "%s\\n" "srun $*" >&2\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"',
        ),
        ('scontrol', 'echo node7\necho node8'),
        ('launcher', 'printf "%s\\n" "$NNODES $NODE_RANK $MASTER_ADDR $*" >&2'),
    ):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\n{body}\n')
        path.chmod(0o755)
    done = run_tool(
        ROOT / 'tools/slurm_train.sh',
        'part',
        'job',
        'config.py',
        'work',
        '--resume',
        GPUS='16',
        PATH=f'{tmp_path}:/usr/bin:/bin',
        PYTHON=str(tmp_path / 'launcher'),
        SLURM_NNODES='2',
        SLURM_NODEID='1',
        SLURM_JOB_NODELIST='node[7-8]',
    )
    # The program that srun is given spans lines.
    *asked, started = done.stderr.splitlines()
    assert '-p part --job-name=job --gres=gpu:8 --nodes=2 --ntasks-per-node=1' in asked[0]
    assert '--cpus-per-task=40' in asked[0]
    assert started.startswith('2 1 node7 -m torch.distributed.run --nnodes=2 --node_rank=1')
    assert '--master_addr=node7' in started
    assert '--nproc_per_node=8' in started
    assert started.endswith('train.py config.py --launcher pytorch --work-dir work --resume')

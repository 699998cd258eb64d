"""What happens to a job happens to the real tools: signals, hangs, a full disk, broken files."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fault_hooks import names_in
from tiny_config import ROOT, free_port, run_tool, write_config

TRAIN, TEST, DIST = (ROOT / 'tools' / name for name in ('train.py', 'test.py', 'dist_train.sh'))
MAX_ITERS = 6
# In seconds; that of the process group in the tests that need one to hang.
TIMEOUT = 10
# For what happens without fail, however busy the machine is: longer is to hang.
PATIENCE = 300
EXTRA = """
custom_imports = dict(imports=['ubn_det', 'fault_hooks'])
custom_hooks = [dict(type='KillHook'), dict(type='FullDiskHook'), dict(type='PauseHook')]
"""


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def assert_same_run(found, expected):
    """Compare two checkpoints: weights, buffers and the state of the optimizer, to the bit."""
    found, expected = load(found), load(expected)
    assert found['meta']['iter'] == expected['meta']['iter'] == MAX_ITERS
    assert found['state_dict'].keys() == expected['state_dict'].keys()
    for name, value in expected['state_dict'].items():
        torch.testing.assert_close(found['state_dict'][name], value, rtol=0, atol=0, msg=name)
    found, expected = found['optimizer']['state'], expected['optimizer']['state']
    assert found.keys() == expected.keys()
    for index, state in expected.items():
        for key, value in state.items():
            assert torch.equal(found[index][key], value), (index, key)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp('job')
    config = write_config(folder, max_iters=MAX_ITERS, norm='SyncUBN', extra=EXTRA)
    run_tool(DIST, config, 2, '--work-dir', folder / 'whole', PORT=free_port())
    state = load(folder / f'whole/iter_{MAX_ITERS}.pth')['state_dict']
    # Else a resumed run could not go wrong.
    assert sum(v for k, v in state.items() if k.endswith('num_batches_condensed')) > 0
    return folder, config


def resume_and_compare(folder, config, work_dir):
    run_tool(DIST, config, 2, '--work-dir', work_dir, '--resume', PORT=free_port())
    assert_same_run(work_dir / f'iter_{MAX_ITERS}.pth', folder / f'whole/iter_{MAX_ITERS}.pth')


def test_killed_rank_ends_the_job_and_the_job_resumes(whole, tmp_path):
    folder, config = whole
    killed = run_tool(
        DIST,
        config,
        2,
        '--work-dir',
        tmp_path,
        check=False,
        PORT=free_port(),
        KILL_AT='4',
        KILL_RANK='1',
    )
    assert killed.returncode != 0
    assert 'SIGKILL' in killed.stderr
    assert names_in(tmp_path) == ['iter_2.pth']
    resume_and_compare(folder, config, tmp_path)


def test_elastic_restart_goes_on_to_the_same_result(whole, tmp_path):
    folder, config = whole
    done = run_tool(
        DIST,
        config,
        2,
        '--work-dir',
        tmp_path,
        '--resume',
        PORT=free_port(),
        KILL_AT='4',
        KILL_RANK='1',
        MAX_RESTARTS='1',
    )
    assert 'resumed epoch: 0, iter: 2' in done.stdout + done.stderr
    assert_same_run(tmp_path / f'iter_{MAX_ITERS}.pth', folder / f'whole/iter_{MAX_ITERS}.pth')


def test_elastic_restart_without_resuming_is_refused(whole, tmp_path):
    _, config = whole
    command = (DIST, config, 1, '--work-dir', tmp_path)
    done = run_tool(*command, check=False, PORT=free_port(), MAX_RESTARTS='1')
    assert done.returncode != 0
    assert '--max-restarts of torchrun (MAX_RESTARTS of dist_train.sh) needs --resume' in (
        done.stderr
    )
    assert not names_in(tmp_path)


def start_ranks(config, work_dir, **environment):
    """Start two processes that no launcher watches over, as some clusters do."""
    port = free_port()
    processes = []
    for rank in ('0', '1'):
        variables = os.environ | dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE='2',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
            CUDA_VISIBLE_DEVICES='',
            OMP_NUM_THREADS='1',
            PYTHONPATH=os.pathsep.join(
                [str(ROOT / 'tests/helpers'), os.environ.get('PYTHONPATH', '')]
            ),
        )
        options = ['--cfg-options', f'env_cfg.dist_cfg.timeout={TIMEOUT}']
        command = [sys.executable, TRAIN, config, '--launcher', 'pytorch', '--work-dir', work_dir]
        processes.append(
            subprocess.Popen(
                [str(part) for part in [*command, *options]],
                env=variables | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
    return processes


def wait_for(happened, what):
    """Return what ``happened()`` returns as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ('kill_signal', 'message'),
    [
        ('SIGKILL', r'Connection (closed|reset) by peer'),
        # It gave up after the timeout that was set: gloo says for how long it waited.
        ('SIGSTOP', f'Timed out waiting {TIMEOUT}000ms'),
    ],
)
def test_other_ranks_end_with_an_error_by_the_timeout(whole, tmp_path, kill_signal, message):
    """One rank dies, or stops without dying; nobody else tells the other one."""
    _, config = whole
    survivor, victim = start_ranks(
        config, tmp_path, KILL_AT='4', KILL_RANK='1', KILL_SIGNAL=kill_signal
    )
    try:
        wait_for(lambda: os.waitpid(victim.pid, os.WNOHANG | os.WUNTRACED)[1], 'the victim lives')
        _, error = survivor.communicate(timeout=PATIENCE)
    finally:
        for process in (survivor, victim):
            process.kill()
    assert survivor.returncode not in (0, None)
    assert re.search(f'RuntimeError.*{message}', error), error[-2000:]
    assert names_in(tmp_path) == ['iter_2.pth']


def test_terminated_job_ends_and_resumes(whole, tmp_path):
    folder, config = whole
    process = subprocess.Popen(
        [str(part) for part in (DIST, config, 2, '--work-dir', tmp_path)],
        env=os.environ
        | dict(
            PYTHON=sys.executable,
            PORT=free_port(),
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            PYTHONPATH=os.pathsep.join(
                [str(ROOT / 'tests/helpers'), os.environ.get('PYTHONPATH', '')]
            ),
            # Else the job might be done before it is ended.
            PAUSE_BEFORE='iteration 4',
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_for((tmp_path / 'last_checkpoint').exists, 'nothing was saved')
        # As a scheduler does it: to the launcher alone.
        process.terminate()
        assert process.wait(timeout=PATIENCE) != 0
        # Its workers end as well.
        wait_for(lambda: not is_there(process.pid), 'a worker lives')
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    resume_and_compare(folder, config, tmp_path)


@pytest.fixture(scope='module')
def single(tmp_path_factory):
    """An uninterrupted run of one process that keeps its last checkpoint only."""
    folder = tmp_path_factory.mktemp('single')
    config = write_config(folder, max_iters=MAX_ITERS, extra=EXTRA)
    config.write_text(config.read_text().replace('max_keep_ckpts=-1', 'max_keep_ckpts=1'))
    run_tool(TRAIN, config, '--work-dir', folder / 'whole')
    assert names_in(folder / 'whole') == [f'iter_{MAX_ITERS}.pth']
    return folder, config


def test_full_disk_leaves_the_checkpoint_before(single, tmp_path):
    folder, config = single
    command = (TRAIN, config, '--work-dir', tmp_path)
    full = run_tool(*command, check=False, DISK_FULL_AT='4')
    assert full.returncode != 0
    assert 'iter_4.pth was not written, what was there before is intact' in full.stderr
    assert names_in(tmp_path) == ['iter_2.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_2.pth')
    # There is room again.
    run_tool(*command, '--resume')
    assert_same_run(tmp_path / f'iter_{MAX_ITERS}.pth', folder / f'whole/iter_{MAX_ITERS}.pth')
    assert names_in(tmp_path) == [f'iter_{MAX_ITERS}.pth']


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def edit(path, change):
    checkpoint = load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def cut_channel(checkpoint):
    state = checkpoint['state_dict']
    state['backbone.bn1.weight'] = state['backbone.bn1.weight'][:-1]


def drop_key(checkpoint):
    del checkpoint['state_dict']['neck.fpn_convs.0.bn.center_weight']


def drop_conv(checkpoint):
    del checkpoint['state_dict']['backbone.conv1.weight']


def add_key(checkpoint):
    checkpoint['state_dict']['backbone.bn9.weight'] = torch.ones(3)


def drop_optimizer(checkpoint):
    del checkpoint['optimizer']


def flip_bits(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(255 - byte for byte in content[middle : middle + 4])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('break_it', 'message'),
    [
        (truncate, r'iter_6.pth is truncated'),
        (flip_bits, r'iter_6.pth is damaged, .* fails its checksum'),
        (lambda p: edit(p, cut_channel), r'backbone.bn1.weight is \(7,\) in the checkpoint, \(8,'),
        (lambda p: edit(p, drop_key), 'neck.fpn_convs.0.bn.center_weight is missing'),
        (lambda p: edit(p, add_key), 'backbone.bn9.weight is in the checkpoint only'),
        (lambda p: edit(p, drop_optimizer), 'the checkpoint has no optimizer'),
    ],
)
def test_broken_checkpoint_is_not_resumed(single, tmp_path, break_it, message):
    folder, config = single
    path = tmp_path / 'iter_6.pth'
    shutil.copy(folder / 'whole/iter_6.pth', path)
    break_it(path)
    before = path.read_bytes()
    done = run_tool(TRAIN, config, '--work-dir', tmp_path / 'run', '--resume', path, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-2000:]
    assert path.read_bytes() == before
    assert not (tmp_path / 'run').exists() or not names_in(tmp_path / 'run')


@pytest.mark.parametrize(
    ('break_it', 'message'),
    [
        (truncate, 'broken.pth is truncated'),
        (lambda p: edit(p, cut_channel), 'cannot test.*backbone.bn1.weight is (7,)'),
        (lambda p: edit(p, drop_conv), 'backbone.conv1.weight is missing'),
    ],
)
def test_broken_checkpoint_is_not_tested(single, tmp_path, break_it, message):
    folder, config = single
    path = tmp_path / 'broken.pth'
    shutil.copy(folder / 'whole/iter_6.pth', path)
    break_it(path)
    done = run_tool(TEST, config, path, '--work-dir', tmp_path / 'run', check=False)
    assert done.returncode != 0
    assert message.split('.*')[-1] in done.stderr
    assert 'bbox_mAP' not in done.stdout + done.stderr


@pytest.mark.slow
def test_job_that_is_killed_again_and_again_loses_nothing(whole, tmp_path):
    """Kill one of two ranks, or end both, at a random moment, until the run is complete."""
    folder, config = whole
    seed = int(os.environ.get('UBN_TEST_SEED', time.time()))
    print(f'UBN_TEST_SEED={seed}')
    chance = random.Random(seed)
    faults = 0
    for run in range(20):
        work_dir = tmp_path / str(run)
        while True:
            environment = dict(PORT=free_port())
            if chance.random() < 0.8:
                environment |= dict(
                    KILL_AT=str(chance.randint(1, MAX_ITERS)),
                    KILL_RANK=chance.choice('01'),
                    KILL_SIGNAL=chance.choice(['SIGKILL', 'SIGTERM', 'SIGABRT']),
                )
            done = run_tool(
                DIST, config, 2, '--work-dir', work_dir, '--resume', check=False, **environment
            )
            if done.returncode == 0:
                break
            faults += 1
        assert_same_run(work_dir / f'iter_{MAX_ITERS}.pth', folder / f'whole/iter_{MAX_ITERS}.pth')
    print(f'{faults} faults in {run + 1} runs, nothing lost')
    assert faults > 10

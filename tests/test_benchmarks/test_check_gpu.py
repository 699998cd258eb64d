"""The driver of the GPU checks, on checks that pass, fail and hang."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from tiny_config import ROOT

SCRIPT = ROOT / 'benchmarks/check_gpu.py'
TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, 'one is not two'
def test_none(): pytest.skip('nothing here')
"""


@pytest.fixture
def driver():
    spec = importlib.util.spec_from_file_location('check_gpu', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(driver, name, code, seconds=60, **options):
    return driver.Check(name, (sys.executable, '-c', code), seconds, **options)


def test_no_check_stops_those_after_it(driver, tmp_path):
    # What hangs has a child that holds the output open.
    hang = "import os, time; print('stuck', flush=True); os.fork(); time.sleep(600)"
    every = [
        python(driver, 'good', 'print(1)', is_alone=True),
        python(driver, 'hangs', hang, seconds=2),
        python(driver, 'bad', "raise SystemExit('out of luck')"),
        driver.Check('absent', (tmp_path / 'nothing',), 60, is_alone=True),
        python(driver, 'also good', 'import os; assert os.environ["SET"] == "1"'),
    ]
    start = time.monotonic()
    found = driver.run_checks(every, tmp_path, SET='1')
    assert time.monotonic() - start < 60
    verdicts = {result.name: (result.verdict, result.detail) for result in found}
    assert verdicts == {
        'good': ('pass', ''),
        'hangs': ('HANG', 'ended after 2 s'),
        'bad': ('FAIL', 'exit status 1'),
        'absent': ('FAIL', 'did not start'),
        'also good': ('pass', ''),
    }
    errors = {result.name: result.errors for result in found}
    assert errors['hangs'] == ['stuck'] and errors['bad'] == ['out of luck']
    assert 'nothing' in errors['absent'][0]

    driver.write_summary(tmp_path, found, ['GPU 0: a fine one'], 0.5)
    summary = (tmp_path / 'summary.md').read_text()
    assert '2 of 5 checks passed' in summary and 'GPU 0: a fine one' in summary
    assert '| hangs | HANG | 2 | ended after 2 s |' in summary
    assert '## bad: FAIL, exit status 1\n\n```\nout of luck\n```' in summary


def test_checks_wait_for_one_that_runs_alone(driver, tmp_path):
    log = tmp_path / 'order'
    code = f"import time; open({str(log)!r}, 'a').write('{{}}'); time.sleep(2)"
    every = [
        python(driver, 'a', code.format('a')),
        python(driver, 'b', code.format('a')),
        python(driver, 'c', code.format('c'), is_alone=True),
    ]
    start = time.monotonic()
    driver.run_checks(every, tmp_path)
    # Two side by side, then one.
    assert 4 <= time.monotonic() - start < 6 + 2
    assert log.read_text() == 'aac'


def test_tests_are_counted_and_their_failures_named(driver, tmp_path):
    (tmp_path / 'test_some.py').write_text(TESTS)
    for name, kind in [('failing', ''), ('passing', 'good'), ('skipped', 'none')]:
        junit = f'--junitxml={tmp_path / name}.xml'
        command = (sys.executable, *driver.PYTEST, tmp_path, junit, '-k', kind)
        check = driver.Check(name, command, 60, needs_tests=True)
        (found,) = driver.run_checks([check], tmp_path)
        if name == 'failing':
            assert (found.verdict, found.detail) == ('FAIL', '1 passed, 1 skipped, 1 failed')
            assert found.errors == ['test_bad: AssertionError: one is not two']
        elif name == 'passing':
            assert (found.verdict, found.detail) == ('pass', '1 passed')
        else:
            assert (found.verdict, found.detail) == ('FAIL', 'no test ran')


def test_every_check_names_what_is_there(driver, tmp_path):
    """With a limit for the whole: what runs side by side counts once."""
    every = driver.checks(sys.executable, tmp_path)
    assert len({driver.file_name(check.name) for check in every}) == len(every)
    beside = [check.seconds for check in every if not check.is_alone]
    assert len(beside) <= driver.MOST_AT_ONCE
    alone = [check.seconds for check in every if check.is_alone]
    assert max(beside) + sum(alone) <= 8 * 60
    for check in every:
        if check.needs_tests and driver.KERNELS not in check.command:
            done = subprocess.run(
                [str(part) for part in check.command] + ['--collect-only'],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_test_is_in_one_part(driver):
    def collect(*arguments):
        done = subprocess.run(
            [sys.executable, *driver.PYTEST, '--collect-only', driver.KERNELS, *arguments],
            cwd=ROOT,
            env=os.environ | {'TRITON_INTERPRET': '1'},
            capture_output=True,
            text=True,
        )
        return [line for line in done.stdout.splitlines() if '::' in line]

    pytest.importorskip('triton')
    parts = [test for kind in driver.PARTS.values() for test in collect('-k', kind)]
    assert sorted(parts) == sorted(collect())


@pytest.mark.parametrize('listed, status', [('', 2), ('GPU 0: a fine one', 1)])
def test_run_ends_at_once_without_a_gpu(listed, status, tmp_path):
    """By a stand-in for nvidia-smi; with a GPU all is tried, here with a Python that fails."""
    (tmp_path / 'nvidia-smi').write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / 'nvidia-smi').chmod(0o755)
    folder = tmp_path / 'report'
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, SCRIPT, '--work-dir', folder, '--python', '/bin/false'],
        env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert time.monotonic() - start < 30
    if not listed:
        assert done.stderr.count('\n') == 1
        assert done.stderr.startswith('no GPU was found')
        assert not folder.exists()
    else:
        summary = (folder / 'summary.md').read_text()
        assert '| GPU' in summary and '| benchmark | FAIL |' in summary

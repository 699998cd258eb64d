"""Random cases are the same in every run of the tests, and others in every soak."""

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent / 'helpers'

CASES = """
import fuzzing
import pytest
from hypothesis import given, strategies as st

@pytest.mark.parametrize('number', [20, pytest.param(200, marks=pytest.mark.slow)])
def test_some(number, request):
    drawn = []

    @fuzzing.cases(request, number)
    @given(st.integers(0, 2**60))
    def check(value):
        drawn.append(value)

    check()
    print('drawn', number, drawn)
"""


def draw(folder, *options):
    """Run the tests of a file in a process of its own; return what is drawn and what it says."""
    path = folder / 'test_some.py'
    path.write_text(CASES)
    command = [sys.executable, '-m', 'pytest', '-s', '-p', 'no:cacheprovider', '-c', os.devnull]
    command += ['-o', 'markers=slow', f'--rootdir={folder}', path, *options]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | dict(PYTHONPATH=str(HELPERS)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    drawn = [line.partition('drawn ')[2] for line in lines if 'drawn' in line]
    seeds = {
        line.partition('--hypothesis-seed=')[2].split()[0] for line in lines if 'seed=' in line
    }
    return drawn, seeds


def test_same_cases_in_every_run(tmp_path):
    (first,), seeds = draw(tmp_path, '-m', 'not slow')
    assert draw(tmp_path, '-m', 'not slow') == ([first], seeds)
    assert len(seeds) == 1


def test_other_cases_in_every_soak_that_its_seed_makes_again(tmp_path):
    (first,), (seed,) = draw(tmp_path, '-m', 'slow')
    (second,), (other,) = draw(tmp_path, '-m', 'slow')
    assert first != second and seed != other
    assert draw(tmp_path, '-m', 'slow', f'--hypothesis-seed={seed}') == ([first], {seed})

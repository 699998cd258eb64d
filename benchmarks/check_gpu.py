"""Check all that needs a GPU, unattended, and leave a report.

Sets the environment up with CUDA, then runs the tests that need an accelerator and the benchmark.
No check stops those after it, and each has a time limit. In the report folder are summary.md, the
output of every check, JUnit files of the tests, and the rows of the benchmark. Exits with 1 where
a check failed, with 2 at once where there is no GPU. Standard library only: it runs before
anything is installed.
"""

import argparse
import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV_PYTHON = ROOT / '.venv/bin/python'
NO_GPU = (
    'no GPU was found: `nvidia-smi -L` lists none. `make gpu` needs a machine with an NVIDIA GPU.'
)
# Compiling mmcv's CUDA operators takes most of it.
SET_UP_SECONDS = 3600
# All that may: the limits of the rest, one after the other, add up to less than 8 minutes so.
MOST_AT_ONCE = 12

PYTEST = ('-m', 'pytest', '-q', '-ra', '-W', 'ignore', '-p', 'no:cacheprovider')
KERNELS = 'tests/test_ops/test_triton_kernels.py'
# Side by side, since they compile for most of their time.
LARGE = '(full_size or 32_bits or in_a_graph)'
PARTS = {
    'kernels, training, contiguous': f'test_training and contiguous and not {LARGE}',
    'kernels, training, channels_last': f'test_training and channels_last and not {LARGE}',
    'kernels, large maps and graphs': LARGE,
    'kernels, all other tests': f'not test_training and not {LARGE}',
}
LAYERS = (
    *('tests/test_layers/test_ubn.py', 'tests/test_layers/test_gate.py'),
    *('tests/test_ops/test_reference.py', 'tests/test_determinism.py'),
)
DEVICE = 'tests/test_gpu.py'
TYPES = ('--dtypes', 'float32', 'bfloat16')
COMPILING = ('--suites', 'layer', '--rounds', '1', *TYPES)
BENCHMARK = (
    *('--suites', 'layer', 'bandwidth', 'memory', 'model', 'study'),
    *('--rounds', '5', '--model-rounds', '5', *TYPES, '--'),
)

DESCRIBE = """
import platform, sys, torch
print('| Python |', platform.python_version(), '|')
print('| torch |', torch.__version__, '|')
print('| CUDA |', torch.version.cuda, '|')
try:
    import triton
    print('| Triton |', triton.__version__, '|')
except ImportError as error:
    print('| Triton |', error, '|')
try:
    import mmcv.ops
    print('| mmcv |', mmcv.__version__, 'with CUDA', mmcv.ops.get_compiling_cuda_version(), '|')
except ImportError as error:
    print('| mmcv |', error, '|')
if not torch.cuda.is_available():
    sys.exit('This torch sees no GPU: it has no CUDA, or the driver is too old for it.')
print('| cuDNN |', torch.backends.cudnn.version(), '|')
print('| NCCL |', '.'.join(map(str, torch.cuda.nccl.version())), '|')
for index in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(index)
    print(f'| GPU {index} | {found.name}, {found.total_memory / 2**30:.0f} GiB, '
          f'compute capability {found.major}.{found.minor} |')
"""


class Check(NamedTuple):
    """One command.

    Args:
        name (str): In words.
        command (tuple): The command.
        seconds (float): After which it is ended.
        is_alone (bool): Whether nothing may run beside it.
        needs_tests (bool): Whether it fails where none of its tests ran.
    """

    name: str
    command: tuple[str | Path, ...]
    seconds: float
    is_alone: bool = False
    needs_tests: bool = False


class Result(NamedTuple):
    """What became of a check.

    Args:
        name (str): Its name.
        verdict (str): ``pass``, ``FAIL`` or ``HANG``.
        seconds (float): How long it ran.
        detail (str): Numbers of tests, or of the exit status.
        errors (list[str]): The first lines of what went wrong.
    """

    name: str
    verdict: str
    seconds: float
    detail: str
    errors: list[str]


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/gpu')
    parser.add_argument(
        '--python', type=Path, help='of an environment that is complete; nothing is set up then'
    )
    return parser.parse_args()


def main() -> int:
    """Run everything, and return the exit status."""
    args = parse_args()
    gpus = list_gpus()
    if not gpus:
        print(NO_GPU, file=sys.stderr)
        return 2
    # What an earlier run left is not of this one.
    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (
        file
        for kind in ('log', 'xml', 'md', 'csv', 'png', 'tmp')
        for file in folder.glob(f'*.{kind}')
    ):
        old.unlink()
    results = [] if args.python else set_up(folder)
    start = time.monotonic()
    python = args.python.absolute() if args.python else VENV_PYTHON
    results += run_checks(checks(python, folder), folder)
    minutes = (time.monotonic() - start) / 60
    write_summary(folder, results, gpus, minutes)
    failed = [result.name for result in results if result.verdict != 'pass']
    print(
        f'{folder / "summary.md"}: {len(results) - len(failed)} of {len(results)} checks passed.'
    )
    return 1 if failed else 0


def list_gpus() -> list[str]:
    """Return the machine's GPUs as the driver names them."""
    try:
        done = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith('GPU ')]


def set_up(folder: Path) -> list[Result]:
    """Make the environment, without mmcv's CUDA operators where these cannot be compiled."""
    command = (sys.executable, ROOT / 'tools/setup_env.py')
    results = run_checks(
        [Check('set-up with CUDA operators', command, SET_UP_SECONDS)], folder, FORCE_CUDA='1'
    )
    if results[0].verdict != 'pass':
        results += run_checks(
            [Check('set-up without CUDA operators', command, SET_UP_SECONDS)],
            folder,
            FORCE_CUDA='0',
        )
    return results


def checks(python: Path, folder: Path) -> list[Check]:
    """Return all checks: those side by side and the longest of the others, less than 8 minutes."""
    csv = folder / 'performance.csv'

    def tests(name: str, *arguments: str, seconds: float = 200, is_alone: bool = False) -> Check:
        junit = f'--junitxml={folder / file_name(name)}.xml'
        command = (python, *PYTEST, junit, *arguments)
        return Check(name, command, seconds, is_alone, needs_tests=True)

    benchmark = (python, ROOT / 'benchmarks/benchmark_norm.py', '--device', 'cuda')

    return [
        Check('versions', (python, '-c', DESCRIBE), 45, is_alone=True),
        *(tests(name, KERNELS, '-k', kind) for name, kind in PARTS.items()),
        tests('layers on the device', '-m', 'gpu', *LAYERS),
        tests('layer: types, layouts, AMP', DEVICE, '-k', 'layer'),
        tests('CUDA graph, no waiting, launches', DEVICE, '-k', 'graph or waits or launches'),
        tests('NCCL', DEVICE, '-k', 'nccl'),
        # Leaves the kernels that the benchmark takes in Triton's cache.
        *(
            Check(
                f'benchmark, compiling, {layout}',
                (
                    *benchmark,
                    *COMPILING,
                    '--memory-formats',
                    layout,
                    '--',
                    folder / f'{layout}.tmp',
                ),
                200,
            )
            for layout in ('contiguous', 'channels_last')
        ),
        tests('Mask R-CNN iteration', DEVICE, '-k', 'mask_rcnn', seconds=60, is_alone=True),
        Check('benchmark', (*benchmark, *BENCHMARK, csv), 150, is_alone=True),
        Check('bars', (python, ROOT / 'benchmarks/report_performance.py', csv), 25, is_alone=True),
    ]


# ---------------------------------------------------------------------------------------- running


def run_checks(every: Iterable[Check], folder: Path, **environment: str) -> list[Result]:
    """Run checks, those side by side that may, and return what became of each in their order."""
    every = list(every)
    results: dict[str, Result] = {}

    def run(check: Check) -> None:
        results[check.name] = run_check(check, folder, environment)
        result = results[check.name]
        print(f'{result.verdict:4} {result.seconds:5.0f} s  {result.name}', flush=True)

    while every:
        if every[0].is_alone:
            run(every.pop(0))
            continue
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            while every and not every[0].is_alone:
                pool.submit(run, every.pop(0))
    return list(results.values())


def run_check(check: Check, folder: Path, environment: dict[str, str]) -> Result:
    """Run a check with its output in a file, and end it and its children after its time."""
    log = folder / f'{file_name(check.name)}.log'
    start = time.monotonic()
    is_late = False
    with log.open('wb') as output:
        try:
            process = subprocess.Popen(
                [str(part) for part in check.command],
                cwd=ROOT,
                env=os.environ | environment | {'OMP_WAIT_POLICY': 'PASSIVE'},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own, so that its children are ended with it.
                start_new_session=True,
            )
        except OSError as error:
            return Result(check.name, 'FAIL', 0, 'did not start', [str(error)])
        try:
            status = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    counts, errors = read_tests(log.with_suffix('.xml'))
    detail = ', '.join(f'{number} {what}' for what, number in counts.items() if number)
    if is_late:
        detail = f'ended after {check.seconds:g} s'
        return Result(check.name, 'HANG', seconds, detail, errors + last_lines(log))
    if status == 0 and check.needs_tests and not counts.get('passed'):
        return Result(check.name, 'FAIL', seconds, 'no test ran', last_lines(log))
    if status:
        detail = detail or f'exit status {status}'
        return Result(check.name, 'FAIL', seconds, detail, errors or last_lines(log))
    return Result(check.name, 'pass', seconds, detail, [])


def read_tests(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return the numbers of tests in a JUnit file, and the first line of every failure."""
    try:
        suite = next(ET.parse(path).getroot().iter('testsuite'))
    except (OSError, ET.ParseError, StopIteration):
        return {}, []
    total, skipped = int(suite.get('tests')), int(suite.get('skipped'))
    failed = int(suite.get('failures')) + int(suite.get('errors'))
    errors = []
    for case in suite.iter('testcase'):
        for problem in (*case.findall('failure'), *case.findall('error')):
            message = (problem.get('message') or problem.text or '').strip().partition('\n')[0]
            errors.append(f'{case.get("name")}: {message}')
    return dict(passed=total - skipped - failed, skipped=skipped, failed=failed), errors


def last_lines(log: Path, number: int = 5) -> list[str]:
    """Return the end of a check's output."""
    return log.read_text(errors='replace').strip().splitlines()[-number:]


def file_name(name: str) -> str:
    """Return a check's name as a file may have it."""
    return re.sub(r'\W+', '-', name)


# ---------------------------------------------------------------------------------------- report


def write_summary(folder: Path, results: list[Result], gpus: list[str], minutes: float) -> None:
    """Write the page that is read first."""
    failed = sum(result.verdict != 'pass' for result in results)
    commit = output_of('git', 'describe', '--always', '--dirty', '--exclude=*').strip()
    driver = re.search(r'Driver Version:\s*([\d.]+)', output_of('nvidia-smi'))
    lines = [
        '# GPU checks',
        '',
        f'{len(results) - failed} of {len(results)} checks passed.',
        f'They took {minutes:.1f} minutes after the set-up.',
        '',
        '| | |',
        '|---|---|',
        f'| date | {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC |',
        f'| commit | {commit or "unknown"} |',
        f'| system | {platform.platform()}, {os.cpu_count()} cores |',
        *(f'| by the driver | {gpu} |' for gpu in gpus),
        f'| driver | {driver[1] if driver else "unknown"} |',
        *table_of(folder / 'versions.log', lambda line: line.startswith('| ')),
        '',
        '| check | | seconds | |',
        '|---|---|---|---|',
        *(f'| {r.name} | {r.verdict} | {r.seconds:.0f} | {r.detail} |' for r in results),
        '',
        '## Bars',
        '',
        *table_of(folder / 'bars.log', lambda line: line.startswith(('| bar', '|---', '| GPU:'))),
        '',
        'All figures are in `performance.md`.',
    ]
    for result in results:
        if result.verdict != 'pass':
            lines += ['', f'## {result.name}: {result.verdict}, {result.detail}', '', '```']
            lines += [*result.errors[:20], '```', '', f'`{file_name(result.name)}.log`']
    (folder / 'summary.md').write_text('\n'.join(lines) + '\n')


def table_of(log: Path, is_row: Callable[[str], bool]) -> list[str]:
    """Return the lines of a check's output that belong to a table."""
    return [line for line in log.read_text().splitlines() if is_row(line)] if log.exists() else []


def output_of(*command: str) -> str:
    """Return what a command prints, nothing where it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ''


if __name__ == '__main__':
    sys.exit(main())

"""Make the virtual environment `.venv` that `make demo` and `make test` run in.

It installs the packages of requirements.txt, compiles mmcv's operators once and keeps the wheel
for the next set-up, proves that the operators run, and installs this project as editable. A second
run returns at once where nothing has changed. Standard library only: it runs before anything is
there.

Environment variables:
    UBN_WHEEL_CACHE: Where compiled wheels are kept, by default ~/.cache/ubn_det/wheels.
    FORCE_CUDA: 1 asks for a CUDA build of torch and compiles mmcv's CUDA operators as well, which
        needs the CUDA toolkit.
    CXX, MAX_JOBS: The C++ compiler, and how many of them run at once.
"""

import sys

# Above everything that an older Python cannot import, so that it is told what is wrong.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        'set-up: Python 3.10 or newer is needed, but {} is {}.{}. Name another one with '
        '`make setup PYTHON=/path/to/python3`.'.format(sys.executable, *sys.version_info[:2])
    )

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
VENV_PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'setup.json'
LOGS = VENV / 'logs'
# Packages that only some tests import, not on the environment's path.
EXTRA = VENV / 'extra'
# What the environment is made from; a change in one of them brings it up to date.
INPUTS = (
    *(ROOT / 'requirements.txt', ROOT / 'setup.py', Path(__file__).resolve()),
    *sorted((ROOT / 'ubn_det/ops/cpu').glob('*.*')),
)

PYTHON_VERSION = '{}.{}'.format(*sys.version_info[:2])
HEARTBEAT_SECONDS = 30
# Measured: 8.5 minutes with two cores busy.
MMCV_CORE_MINUTES = 17
# One compiler process on mmcv's largest sources takes up to 2 GB.
BYTES_PER_JOB = 2e9
# The environment takes 1.6 GB with a CPU build of torch, and the compilation some more.
NEEDED_BYTES = 3e9


class SetupError(Exception):
    """A reason, in a sentence for the user, why the environment cannot be made."""


class StepError(Exception):
    """A command of the set-up failed; its output is in a file."""

    def __init__(self, log: Path) -> None:
        super().__init__(str(log))
        self.log = log


def say(text: str) -> None:
    """Print one line at once, also where the output is a pipe."""
    print(f'set-up: {text}', flush=True)


# ------------------------------------------------------------------------------------------
# The parts that only compute
# ------------------------------------------------------------------------------------------


def parse_requirements(text: str) -> dict[str, list[str]]:
    """Split requirements.txt into the lines of its `# [section]`s."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in map(str.strip, text.splitlines()):
        header = re.match(r'# \[(\w+)\]', line)
        if header:
            lines = sections.setdefault(header[1], [])
        elif line and not line.startswith('#'):
            lines.append(line)
    return sections


def wheel_key(
    *, mmcv: str, torch: str, abi: str, machine: str, libc: tuple[str, str], cuda_ops: bool
) -> str:
    """Name the folder of a compiled wheel after all that decides whether it can be loaded.

    Args:
        mmcv: mmcv's requirement or version.
        torch: torch's version with its local part, such as `2.13.0+cpu`.
        abi: Python's extension ABI, such as `cpython-311-x86_64-linux-gnu`.
        machine: Operating system and processor, such as `linux-x86_64`.
        libc: Name and version of the C library.
        cuda_ops: Whether the CUDA operators are in it.
    """
    parts = (mmcv, f'torch-{torch}', abi, machine, ''.join(libc), 'cuda' if cuda_ops else 'cpu')
    return '_'.join(re.sub(r'[^\w.+-]+', '-', part) for part in parts if part)


def wheel_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder that keeps compiled wheels between set-ups."""
    if environ.get('UBN_WHEEL_CACHE'):
        return Path(environ['UBN_WHEEL_CACHE']).expanduser().absolute()
    cache = environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'ubn_det' / 'wheels'


def find_compiler(
    environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which
) -> str | None:
    """Return the command of the C++ compiler, `$CXX` before all others, or None."""
    if environ.get('CXX'):
        return environ['CXX'] if which(shlex.split(environ['CXX'])[0]) else None
    return next((name for name in ('c++', 'g++', 'clang++') if which(name)), None)


def require_compiler(environ: Mapping[str, str]) -> str:
    """Return the command of the C++ compiler, or say that it is missing."""
    compiler = find_compiler(environ)
    if compiler:
        return compiler
    if environ.get('CXX'):
        raise SetupError(f'CXX is set to `{environ["CXX"]}`, which is not an installed command.')
    raise SetupError(
        "no C++ compiler was found (c++, g++ or clang++), and mmcv's operators have to be "
        'compiled. Install one (on Debian and Ubuntu: apt-get install g++) or name it in CXX.'
    )


def find_nvcc(
    environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which
) -> str | None:
    """Return CUDA's compiler where torch looks for it, or None."""
    home = environ.get('CUDA_HOME') or environ.get('CUDA_PATH')
    if home:
        return which(str(Path(home) / 'bin/nvcc'))
    return which('nvcc') or which('/usr/local/cuda/bin/nvcc')


def compile_jobs(environ: Mapping[str, str], cores: int, memory: float) -> int:
    """Return how many compilers run at once: `$MAX_JOBS`, or what cores and memory allow."""
    if environ.get('MAX_JOBS'):
        return int(environ['MAX_JOBS'])
    return max(1, min(cores, int(memory // BYTES_PER_JOB)))


def compile_progress(output: str) -> str:
    """Return ninja's last `[done/all]` in a compilation's output, or nothing."""
    counts = re.findall(r'^\s*(\[\d+/\d+\])', output, flags=re.MULTILINE)
    return counts[-1] if counts else ''


def explain_pip_failure(output: str) -> str:
    """Say in a sentence why pip failed."""
    if 'No space left on device' in output:
        return 'the disk is full.'
    missing = re.search(r'No matching distribution found for (\S+)', output)
    # pip reports an index without the package and an index that it cannot reach alike: only its
    # warnings tell them apart.
    unreachable = re.search(
        r'connection broken by|Failed to establish a new connection|Connection (?:failed|refused)|'
        r'(?:Connect|Read|Connection)\s?Time(?:d\s)?out|Name or service not known|'
        r'name resolution|ProxyError|SSLError|Max retries exceeded',
        output,
        flags=re.IGNORECASE,
    )
    if unreachable:
        return (
            'the package index cannot be reached. Check the network; a mirror or proxy is named '
            'in PIP_INDEX_URL or HTTPS_PROXY.'
        )
    if missing:
        return (
            f'the package index has no {missing[1]} for Python {PYTHON_VERSION} on '
            f'{platform.system()} {platform.machine()}.'
        )
    errors = re.findall(r'^\s*(?:error|ERROR): (.+)', output, flags=re.MULTILINE)
    return errors[-1] if errors else 'pip failed.'


def explain_build_failure(output: str) -> str:
    """Say in a sentence why mmcv could not be compiled."""
    if re.search(r'Killed signal|out of memory|virtual memory exhausted', output):
        return 'the compiler ran out of memory. Try again with MAX_JOBS=1.'
    errors = re.findall(r'^.*\berror: .+', output, flags=re.MULTILINE)
    return f'`{errors[0].strip()}`.' if errors else explain_pip_failure(output)


def plan(stamp: Mapping[str, object] | None, wanted: Mapping[str, object], runs: bool) -> str:
    """Decide what a set-up has to do.

    Args:
        stamp: What the last complete set-up recorded, None where none was completed.
        wanted: What this one would record.
        runs: Whether the environment's Python starts.

    Returns:
        `ready`, `update`, or `create` where the environment is absent, half made, broken, moved
        or made with another Python.
    """
    if not runs or stamp is None:
        return 'create'
    # Scripts and the editable install hold absolute paths.
    if any(stamp.get(name) != wanted[name] for name in ('root', 'python')):
        return 'create'
    return 'ready' if dict(stamp) == dict(wanted) else 'update'


# ------------------------------------------------------------------------------------------
# Running commands
# ------------------------------------------------------------------------------------------


def tail(path: Path, size: int = 65536) -> str:
    """Return the end of a file."""
    with path.open('rb') as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors='replace')


def run_logged(
    command: list[str | Path],
    log: Path,
    env: Mapping[str, str] | None = None,
    progress: Callable[[str], str] = lambda output: '',
) -> str:
    """Run a command with its output in a file, and give a sign of life while it runs.

    Args:
        command: The command.
        log: The file, overwritten.
        env: The environment variables, by default those of this process.
        progress: Makes from the end of the output what to say beside the elapsed time.

    Returns:
        The end of the output.
    """
    start = time.monotonic()
    with log.open('wb') as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that the compilers below pip can be ended with it.
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(HEARTBEAT_SECONDS)
                    break
                minutes, seconds = divmod(round(time.monotonic() - start), 60)
                say(f'  {minutes:2d} min {seconds:02d} s {progress(tail(log))}'.rstrip())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if process.returncode:
        raise StepError(log)
    return tail(log)


def pip(step: str, *arguments: str | Path, **kwargs) -> None:
    """Run pip in the environment; the log is named after the step."""
    command = [VENV_PYTHON, '-m', 'pip', '--no-input', '--disable-pip-version-check', *arguments]
    run_logged(command, LOGS / f'{step}.log', **kwargs)


def pip_install(step: str, lines: list[str], *options: str) -> None:
    """Install exactly these requirements, without what they depend on."""
    listed = LOGS / f'{step}.txt'
    listed.write_text('\n'.join(lines) + '\n')
    try:
        pip(step, 'install', '-q', '--no-deps', *options, '-r', listed)
    except StepError as error:
        raise SetupError(f'{explain_pip_failure(tail(error.log))} Log: {error.log}') from None


def check(what: str, *arguments: str) -> str:
    """Run one of the checks of this script in the environment and return its last line."""
    # -I keeps the folder of this script, and PYTHONPATH, out of the import path.
    command = [VENV_PYTHON, '-I', Path(__file__).resolve(), '--check', what, *arguments]
    return run_logged(command, LOGS / f'check-{what}.log').strip().rpartition('\n')[2]


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder for this process alone; the system frees it however the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(busy)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------
# Checks, run by the environment's own Python
# ------------------------------------------------------------------------------------------


def check_base() -> None:
    """Import what mmcv is compiled against and needs, and print torch's version."""
    import cv2  # noqa: F401
    import mmengine  # noqa: F401
    import torch

    print(torch.__version__)


def check_ops(cuda_ops: bool) -> None:
    """Run two of mmcv's compiled operators and compare what they return with known values."""
    import torch
    from mmcv.ops import RoIAlign, get_compiling_cuda_version, nms

    # The second box overlaps the first by 81 / 119 of their union, the third is apart.
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]], dtype=torch.float32)
    _, keep = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), iou_threshold=0.5)
    if keep.tolist() != [0, 2]:
        raise SystemExit(f'nms kept the boxes {keep.tolist()}, not [0, 2]')

    # Bilinear sampling is exact on a plane, so each bin holds the plane's value at its centre.
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    align = RoIAlign(output_size=2, sampling_ratio=2, aligned=True)
    values = align((10 * rows + columns)[None, None], torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]]))
    torch.testing.assert_close(values[0, 0], torch.tensor([[16.5, 18.5], [36.5, 38.5]]))

    if cuda_ops and get_compiling_cuda_version() == 'not available':
        raise SystemExit('the CUDA operators were asked for and are not in mmcv')
    if cuda_ops and torch.cuda.is_available():
        # A wheel that was compiled for another kind of GPU ends here.
        _, keep = nms(boxes.cuda(), torch.tensor([0.9, 0.8, 0.7]).cuda(), iou_threshold=0.5)
        if keep.tolist() != [0, 2]:
            raise SystemExit(f'on the GPU, nms kept the boxes {keep.tolist()}, not [0, 2]')


def check_stack() -> None:
    """Import what the project is built on and the project itself."""
    import mmdet.apis
    import torch.utils.tensorboard  # noqa: F401

    if not importlib.util.find_spec('ubn_det'):
        raise SystemExit('ubn_det is not installed')
    print(mmdet.__version__)


# ------------------------------------------------------------------------------------------
# The steps
# ------------------------------------------------------------------------------------------


def require_machine(cache: Path, cuda_ops: bool) -> None:
    """Say what the machine lacks before anything is downloaded."""
    if not (importlib.util.find_spec('venv') and importlib.util.find_spec('ensurepip')):
        raise SetupError(
            f'Python {PYTHON_VERSION} cannot make virtual environments: its modules venv and '
            'ensurepip are missing. Install them (on Debian and Ubuntu: apt-get install '
            f'python{PYTHON_VERSION}-venv).'
        )
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES:
        raise SetupError(
            f'{NEEDED_BYTES / 1e9:.0f} GB of free disk space are needed, {ROOT} has '
            f'{free / 1e9:.1f} GB.'
        )
    # Which wheel fits is known only once torch is there; a cache with any leaves this for later.
    if not any(cache.glob('*/onedl_mmcv-*.whl')):
        require_build_tools(cuda_ops)


def require_build_tools(cuda_ops: bool) -> str:
    """Return the C++ compiler's command, or say what compiling mmcv lacks."""
    compiler = require_compiler(os.environ)
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        raise SetupError(
            f"Python {PYTHON_VERSION}'s header Python.h is missing, and mmcv's operators have to "
            f'be compiled. Install it (on Debian and Ubuntu: apt-get install '
            f'python{PYTHON_VERSION}-dev).'
        )
    if cuda_ops and not find_nvcc(os.environ):
        raise SetupError(
            "FORCE_CUDA=1 asks for mmcv's CUDA operators, and CUDA's compiler nvcc was not found. "
            'Install the CUDA toolkit, or name its folder in CUDA_HOME.'
        )
    return compiler


def create_environment() -> None:
    """Make an empty environment in place of whatever is there."""
    say(f'making the virtual environment {VENV} with Python {PYTHON_VERSION}')
    shutil.rmtree(VENV, ignore_errors=True)
    # Called from within the very environment that is replaced, sys.executable is already gone.
    python = getattr(sys, '_base_executable', sys.executable)
    made = subprocess.run(
        [python, '-m', 'venv', str(VENV)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        raise SetupError(f'`{python} -m venv {VENV}` failed: {made.stdout.strip()}')


def install_packages(sections: Mapping[str, list[str]], cuda_ops: bool) -> str:
    """Install all that comes ready to use, and return torch's version with its local part."""
    pip_install('pip', sections['pip'])
    say('installing torch and about 60 smaller packages (1 to 5 minutes)')
    pip_install('wheels', sections['wheels'], '--only-binary=:all:')
    torch_info = next(VENV.glob('lib/python*/site-packages/torch/version.py')).read_text()
    if re.search(r"^cuda.*= '", torch_info, flags=re.MULTILINE):
        say("installing this CUDA build of torch's libraries (2 GB, some minutes)")
        pip_install('cuda', sections['cuda'], '--only-binary=:all:')
    elif cuda_ops:
        raise SetupError(
            'FORCE_CUDA=1 asks for CUDA, and the torch that was installed is a build without it. '
            'Name an index with CUDA builds in PIP_INDEX_URL, and remove .venv.'
        )
    try:
        return check('base')
    except StepError as error:
        raise SetupError(
            f'torch, OpenCV or mmengine was installed but cannot be imported. Log: {error.log}'
        ) from None


def build_mmcv(requirement: str, folder: Path, cuda_ops: bool) -> Path:
    """Compile mmcv and put the finished wheel into the cache's folder in one step."""
    compiler = require_build_tools(cuda_ops)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    jobs = compile_jobs(os.environ, cores or 1, memory)
    log = LOGS / 'mmcv-build.log'
    say(
        f"compiling mmcv's operators with {compiler}, {jobs} at once: about "
        f'{math.ceil(MMCV_CORE_MINUTES / min(jobs, cores or 1))} minutes'
        f'{", with the CUDA operators several times that" if cuda_ops else ""}. '
        f'This happens once; the wheel is kept in {folder}'
    )
    say(f'  log: {log}')
    env = {
        **os.environ,
        'MMCV_WITH_OPS': '1',
        'FORCE_CUDA': str(int(cuda_ops)),
        'MAX_JOBS': str(jobs),
        # The environment's own ninja comes first.
        'PATH': os.pathsep.join((str(VENV_PYTHON.parent), os.environ.get('PATH', ''))),
    }
    if not cuda_ops:
        # mmcv compiles CUDA sources wherever torch sees a GPU, whatever FORCE_CUDA says.
        env['CUDA_VISIBLE_DEVICES'] = ''
    if compiler != 'c++':
        env['CXX'] = compiler
    # The lock is held, so what another build left here was interrupted.
    for rest in folder.glob('.building-*'):
        shutil.rmtree(rest, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=folder) as target:
        try:
            # -v lets the compiler's output through. No cache and no binary: pip would take any
            # wheel of this version, whatever torch it was compiled against.
            pip(
                'mmcv-build',
                *('wheel', '-v', '--no-deps', '--no-build-isolation', '--no-cache-dir'),
                *('--no-binary', 'onedl-mmcv', '-w', target, requirement),
                env=env,
                progress=compile_progress,
            )
        except StepError as error:
            raise SetupError(
                f'mmcv could not be compiled: {explain_build_failure(tail(error.log))} '
                f'Log: {error.log}'
            ) from None
        built = next(Path(target).glob('onedl_mmcv-*.whl'))
        return built.replace(folder / built.name)


def mmcv_works(wheel: Path, cuda_ops: bool) -> bool:
    """Install a wheel of mmcv and say whether its compiled operators run."""
    try:
        pip('mmcv', 'install', '-q', '--no-deps', '--no-index', '--force-reinstall', wheel)
        check('ops', *(['--cuda-ops'] if cuda_ops else []))
    except StepError:
        return False
    return True


def install_mmcv(requirement: str, torch: str, cache: Path, cuda_ops: bool) -> None:
    """Install mmcv from the cache, or compile it where the cache has none that works."""
    key = wheel_key(
        mmcv=requirement.replace('==', '-'),
        torch=torch,
        abi=sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag,
        machine=f'{platform.system()}-{platform.machine()}'.lower(),
        libc=platform.libc_ver(),
        cuda_ops=cuda_ops,
    )
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, 'another set-up is at this wheel of mmcv; waiting for it'):
        for wheel in folder.glob('onedl_mmcv-*.whl'):
            say(f'installing the mmcv compiled earlier, {wheel}')
            if mmcv_works(wheel, cuda_ops):
                return
            say('its operators do not run here: removing it and compiling anew')
            wheel.unlink()
        wheel = build_mmcv(requirement, folder, cuda_ops)
        if not mmcv_works(wheel, cuda_ops):
            wheel.unlink()
            raise SetupError(
                'mmcv was compiled, but its operators do not run or return wrong values. '
                f'Logs: {LOGS / "mmcv-build.log"} and {LOGS / "check-ops.log"}'
            )


def install_project(mmdet: list[str]) -> None:
    """Install mmdetection and this project, and check that all of it can be imported."""
    say('installing mmdetection, and ubn_det, whose kernels are compiled (1 to 5 minutes)')
    pip_install('mmdet', mmdet, '--no-build-isolation')
    pip_install('project', [f'-e {ROOT}'], '--no-build-isolation')
    try:
        check('stack')
    except StepError as error:
        raise SetupError(
            f'everything was installed, but mmdet cannot be imported. Log: {error.log}'
        ) from None


def install_extra(wheels: list[str], sources: list[str]) -> None:
    """Put the packages that only some tests import into a folder of their own."""
    # Into a folder that has them pip installs nothing, whatever their version.
    shutil.rmtree(EXTRA, ignore_errors=True)
    pip_install('extra', wheels, '--only-binary=:all:', '--target', str(EXTRA))
    pip_install('sources', sources, '--no-build-isolation', '--target', str(EXTRA))


def read_stamp() -> dict[str, object] | None:
    """Return what the last complete set-up recorded, or None."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None


def python_runs() -> bool:
    """Say whether the environment's Python starts."""
    try:
        return not subprocess.run([VENV_PYTHON, '-c', ''], stdin=subprocess.DEVNULL).returncode
    except OSError:
        return False


def set_up() -> None:
    """Bring the environment to what requirements.txt says."""
    cache = wheel_cache(os.environ)
    stamp = read_stamp()
    digest = hashlib.sha256(b'\0'.join(path.read_bytes() for path in INPUTS)).hexdigest()
    # Operators once compiled with CUDA stay so until FORCE_CUDA is given again.
    asked = os.environ.get('FORCE_CUDA') or (stamp or {}).get('force_cuda', '0')
    wanted = {
        'root': str(ROOT),
        'python': PYTHON_VERSION,
        'inputs': digest,
        'force_cuda': asked,
    }
    todo = plan(stamp, wanted, python_runs())
    if todo == 'ready':
        return
    say(
        'bringing .venv up to date'
        if todo == 'update'
        else 'about 10 minutes on two cores the first time, 2 to 3 where mmcv was compiled before'
    )
    start = time.monotonic()
    cuda_ops = asked == '1'
    require_machine(cache, cuda_ops)
    if todo == 'create':
        create_environment()
    # From here on an interruption leaves an environment without a stamp, which is made anew.
    STAMP.unlink(missing_ok=True)
    LOGS.mkdir(exist_ok=True)
    sections = parse_requirements(INPUTS[0].read_text())
    torch = install_packages(sections, cuda_ops)
    install_mmcv(sections['mmcv'][0], torch, cache, cuda_ops)
    install_extra(sections['extra'], sections['sources'])
    install_project(sections['mmdet'])
    fresh = STAMP.with_suffix('.new')
    fresh.write_text(json.dumps(wanted))
    os.replace(fresh, STAMP)
    say(f'done in {(time.monotonic() - start) / 60:.1f} minutes')


def main() -> int:
    """Run the set-up, or one of its checks within the environment."""
    parser = argparse.ArgumentParser(description='Make the virtual environment .venv.')
    parser.add_argument('--check', choices=('base', 'ops', 'stack'), help=argparse.SUPPRESS)
    parser.add_argument('--cuda-ops', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check == 'base':
        check_base()
    elif args.check == 'ops':
        check_ops(args.cuda_ops)
    elif args.check == 'stack':
        check_stack()
    else:
        # As an interruption from the keyboard, so that running commands are ended too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with locked(ROOT, 'another set-up of this clone is running; waiting for it'):
                set_up()
        except (SetupError, OSError) as error:
            say(f'failed: {error}')
            return 1
        except KeyboardInterrupt:
            say('interrupted; run it again to start over')
            return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""The set-up's parts that only compute, its decisions about wheels, and the package's metadata."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_setup_env():
    """Import tools/setup_env.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = load_setup_env()

SECTIONS = setup_env.parse_requirements((ROOT / 'requirements.txt').read_text())
KEY = {
    'mmcv': 'onedl-mmcv-2.3.6',
    'torch': '2.13.0+cpu',
    'abi': 'cpython-311-x86_64-linux-gnu',
    'machine': 'linux-x86_64',
    'libc': ('glibc', '2.36'),
    'cuda_ops': False,
}


# requirements.txt


def test_sections_are_the_steps_of_the_set_up():
    assert list(SECTIONS) == ['pip', 'wheels', 'cuda', 'mmcv', 'mmdet', 'extra', 'sources']
    assert [len(SECTIONS[name]) for name in ('pip', 'mmcv', 'mmdet')] == [1, 1, 1]


@pytest.mark.parametrize('line', sum(SECTIONS.values(), []))
def test_every_requirement_is_pinned_exactly(line):
    assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version (<|>=) "3\.\d+")?', line)


def test_each_package_has_one_version_on_every_python():
    markers = {}
    for line in sum(SECTIONS.values(), []):
        name, _, marker = line.partition('==')
        markers.setdefault(name, []).append(marker.partition('; ')[2])
    for name, found in markers.items():
        assert sorted(found) in (
            [''],
            ['python_version < "3.11"'],
            ['python_version < "3.11"', 'python_version >= "3.11"'],
        ), name


def test_torchvision_is_not_on_the_path_and_opencv_is_there_once():
    names = {line.partition('==')[0] for line in sum(SECTIONS.values(), [])}
    importable = [
        line
        for name, lines in SECTIONS.items()
        if name not in ('extra', 'sources')
        for line in lines
    ]
    assert not any(line.startswith('torchvision') for line in importable)
    assert {name for name in names if name.startswith('opencv')} == {'opencv-python-headless'}


def test_extra_packages_replace_those_of_an_earlier_set_up(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(setup_env, 'EXTRA', tmp_path / 'extra')
    monkeypatch.setattr(setup_env, 'pip_install', lambda *args: calls.append(args))
    (tmp_path / 'extra' / 'timm').mkdir(parents=True)
    setup_env.install_extra(['timm==1.0.31'], ['onedl-mmpretrain==1.3.6'])
    assert not (tmp_path / 'extra').exists()
    assert [lines for _, lines, *_ in calls] == [['timm==1.0.31'], ['onedl-mmpretrain==1.3.6']]
    for _, _, *options in calls:
        assert options[-2:] == ['--target', str(tmp_path / 'extra')]


# The wheel cache


def test_wheel_key_is_one_plain_folder_name():
    key = setup_env.wheel_key(**KEY)
    assert key == (
        'onedl-mmcv-2.3.6_torch-2.13.0+cpu_cpython-311-x86_64-linux-gnu_linux-x86_64_glibc2.36_cpu'
    )
    assert '/' not in setup_env.wheel_key(**{**KEY, 'machine': 'odd/../machine name'})


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('mmcv', 'onedl-mmcv-2.3.7'),
        ('torch', '2.13.0+cu130'),
        ('abi', 'cpython-312-x86_64-linux-gnu'),
        ('machine', 'linux-aarch64'),
        ('libc', ('glibc', '2.31')),
        ('cuda_ops', True),
    ],
)
def test_wheel_key_tells_apart_what_cannot_share_a_wheel(name, value):
    assert setup_env.wheel_key(**{**KEY, name: value}) != setup_env.wheel_key(**KEY)


def test_wheel_cache_folder(tmp_path):
    named = {'UBN_WHEEL_CACHE': str(tmp_path / 'a'), 'XDG_CACHE_HOME': str(tmp_path / 'b')}
    assert setup_env.wheel_cache(named) == tmp_path / 'a'
    del named['UBN_WHEEL_CACHE']
    assert setup_env.wheel_cache(named) == tmp_path / 'b' / 'ubn_det' / 'wheels'
    assert setup_env.wheel_cache({}) == Path.home() / '.cache' / 'ubn_det' / 'wheels'


@pytest.fixture
def installing(monkeypatch, tmp_path):
    """A cache, the wheels that work, and what was compiled, with pip and the compiler replaced."""

    class Installing:
        working = {'good'}
        built = []
        fresh = 'good'

        def run(self):
            setup_env.install_mmcv('onedl-mmcv==2.3.6', '2.13.0+cpu', tmp_path, cuda_ops=False)

        def wheels(self):
            return [path.read_text() for path in tmp_path.glob('*/onedl_mmcv-*.whl')]

    case = Installing()
    case.built = []

    def build(requirement, folder, cuda_ops):
        case.built.append(requirement)
        wheel = folder / 'onedl_mmcv-2.3.6-py3-none-any.whl'
        wheel.write_text(case.fresh)
        return wheel

    monkeypatch.setattr(setup_env, 'build_mmcv', build)
    monkeypatch.setattr(
        setup_env, 'mmcv_works', lambda wheel, cuda_ops: wheel.read_text() in case.working
    )
    return case


def test_mmcv_is_compiled_once_and_then_taken_from_the_cache(installing):
    installing.run()
    installing.run()
    assert installing.built == ['onedl-mmcv==2.3.6']
    assert installing.wheels() == ['good']


def test_stale_wheel_is_replaced(installing):
    installing.fresh = 'stale'
    installing.working = {'stale'}
    installing.run()
    installing.fresh = 'good'
    installing.working = {'good'}
    installing.run()
    assert len(installing.built) == 2
    assert installing.wheels() == ['good']


def test_fresh_wheel_that_does_not_run_fails_and_is_not_kept(installing):
    installing.fresh = 'bad'
    with pytest.raises(setup_env.SetupError, match='its operators do not run'):
        installing.run()
    assert installing.wheels() == []


@pytest.mark.parametrize('failing', ['install', 'check'])
def test_wheel_that_cannot_be_installed_or_run_does_not_work(monkeypatch, tmp_path, failing):
    def fail(*args, **kwargs):
        raise setup_env.StepError(tmp_path / 'log')

    monkeypatch.setattr(setup_env, 'pip', fail if failing == 'install' else lambda *args: None)
    monkeypatch.setattr(setup_env, 'check', fail)
    assert not setup_env.mmcv_works(tmp_path / 'x.whl', cuda_ops=False)


def test_operators_of_the_installed_mmcv_pass_the_check():
    pytest.importorskip('mmcv._ext', reason='mmcv without compiled operators')
    setup_env.check_ops(cuda_ops=False)


@pytest.mark.parametrize('wrong', ['nms', 'RoIAlign'])
def test_operator_with_wrong_values_does_not_pass_the_check(monkeypatch, wrong):
    torch = pytest.importorskip('torch')
    ops = pytest.importorskip('mmcv.ops')
    pytest.importorskip('mmcv._ext', reason='mmcv without compiled operators')
    if wrong == 'nms':
        monkeypatch.setattr(ops, 'nms', lambda boxes, *args, **kwargs: (boxes, torch.arange(3)))
    else:
        monkeypatch.setattr(ops, 'RoIAlign', lambda **kwargs: lambda *x: torch.zeros(1, 1, 2, 2))
    with pytest.raises((SystemExit, AssertionError)):
        setup_env.check_ops(cuda_ops=False)


def test_lock_is_exclusive_and_freed(tmp_path, capsys):
    command = (
        f'import fcntl, os; fcntl.flock(os.open({str(tmp_path)!r}, os.O_RDONLY), '
        'fcntl.LOCK_EX | fcntl.LOCK_NB)'
    )

    def another_process_gets_it():
        run = subprocess.run([sys.executable, '-c', command], stderr=subprocess.DEVNULL)
        return run.returncode == 0

    with setup_env.locked(tmp_path, 'busy'):
        assert not another_process_gets_it()
    assert another_process_gets_it()
    assert capsys.readouterr().out == ''


# What is missing is named


def test_compiler_of_the_environment_comes_first():
    def which(name):
        return name if name in ('g++', 'ccache') else None

    assert setup_env.find_compiler({}, which) == 'g++'
    assert setup_env.find_compiler({'CXX': 'ccache g++'}, which) == 'ccache g++'
    assert setup_env.find_compiler({'CXX': 'clang++'}, which) is None
    assert setup_env.find_compiler({}, lambda name: None) is None


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler was found'):
        setup_env.require_compiler({})
    with pytest.raises(setup_env.SetupError, match='CXX is set to `icpx`'):
        setup_env.require_compiler({'CXX': 'icpx'})


@pytest.mark.parametrize('module', ['venv', 'ensurepip'])
def test_missing_venv_is_named(monkeypatch, tmp_path, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        setup_env.importlib.util, 'find_spec', lambda name: name != module and find_spec(name)
    )
    with pytest.raises(setup_env.SetupError, match='venv and ensurepip are missing'):
        setup_env.require_machine(tmp_path, False)


def test_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'NEEDED_BYTES', 1e18)
    with pytest.raises(setup_env.SetupError, match='of free disk space are needed'):
        setup_env.require_machine(tmp_path, False)


def test_compiler_is_needed_at_once_only_without_a_compiled_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'NEEDED_BYTES', 0)
    monkeypatch.setattr(setup_env, 'find_compiler', lambda environ: None)
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(setup_env.SetupError, match='no C'):
        setup_env.require_machine(tmp_path, False)
    (tmp_path / 'key').mkdir()
    (tmp_path / 'key' / 'onedl_mmcv-2.3.6-py3-none-any.whl').touch()
    setup_env.require_machine(tmp_path, False)


def test_compiler_of_cuda_is_needed_for_cuda_operators_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'NEEDED_BYTES', 0)
    monkeypatch.setattr(setup_env, 'find_compiler', lambda environ: 'c++')
    monkeypatch.setattr(setup_env, 'find_nvcc', lambda environ: None)
    setup_env.require_machine(tmp_path, False)
    with pytest.raises(setup_env.SetupError, match='nvcc was not found'):
        setup_env.require_machine(tmp_path, True)


def test_compiler_of_cuda_is_looked_for_where_torch_looks():
    def which(name):
        return name if name in ('nvcc', '/opt/cuda/bin/nvcc') else None

    assert setup_env.find_nvcc({}, which) == 'nvcc'
    assert setup_env.find_nvcc({'CUDA_HOME': '/opt/cuda'}, which) == '/opt/cuda/bin/nvcc'
    assert setup_env.find_nvcc({'CUDA_PATH': '/none'}, which) is None


def test_torch_without_cuda_is_refused_where_cuda_is_asked_for(monkeypatch, tmp_path):
    packages = tmp_path / 'lib/python3/site-packages/torch'
    packages.mkdir(parents=True)
    (packages / 'version.py').write_text('cuda: Optional[str] = None\n')
    installed = []
    monkeypatch.setattr(setup_env, 'VENV', tmp_path)
    monkeypatch.setattr(setup_env, 'pip_install', lambda step, *args: installed.append(step))
    monkeypatch.setattr(setup_env, 'check', lambda what: '2.13.0')
    sections = dict(pip=[], wheels=[], cuda=[])
    setup_env.install_packages(sections, False)
    with pytest.raises(setup_env.SetupError, match='a build without it'):
        setup_env.install_packages(sections, True)
    (packages / 'version.py').write_text("cuda: Optional[str] = '13.0'\n")
    setup_env.install_packages(sections, True)
    assert installed[-1] == 'cuda'


@pytest.mark.parametrize(
    ('output', 'sentence'),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)': /six/\n"
            'ERROR: No matching distribution found for six==1.17.0',
            'the package index cannot be reached',
        ),
        (
            'ERROR: No matching distribution found for six==99',
            'the package index has no six==99 for Python',
        ),
        ("OSError: [Errno 28] No space left on device: '/x'", 'the disk is full'),
        ('ERROR: Something new.', 'Something new.'),
        ('', 'pip failed'),
    ],
)
def test_failure_of_pip_is_a_sentence(output, sentence):
    assert setup_env.explain_pip_failure(output).startswith(sentence)


@pytest.mark.parametrize(
    ('output', 'sentence'),
    [
        ('a.cpp:1:10: fatal error: x.h: No such file\nERROR: Failed', '`a.cpp:1:10: fatal error'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'the compiler ran out'),
        ('ERROR: No matching distribution found for six==99', 'the package index has no six==99'),
    ],
)
def test_failure_of_the_compilation_is_a_sentence(output, sentence):
    assert setup_env.explain_build_failure(output).startswith(sentence)


@pytest.mark.parametrize('version', ['3.6', '3.9'])
def test_script_parses_on_the_pythons_that_it_refuses(version):
    import ast

    source = (ROOT / 'tools' / 'setup_env.py').read_text()
    ast.parse(source, feature_version=tuple(map(int, version.split('.'))))


# Running commands


def test_compile_progress_is_the_last_count():
    output = '  [1/80] c++ -MMD\n  [2/80] c++ -MMD\nx [9/80]\n'
    assert setup_env.compile_progress(output) == '[2/80]'
    assert setup_env.compile_progress('Preparing metadata') == ''


@pytest.mark.parametrize(
    ('environ', 'cores', 'memory', 'jobs'),
    [({}, 2, 24e9, 2), ({}, 16, 8e9, 4), ({}, 4, 1e9, 1), ({'MAX_JOBS': '7'}, 2, 24e9, 7)],
)
def test_compile_jobs_fit_cores_and_memory(environ, cores, memory, jobs):
    assert setup_env.compile_jobs(environ, cores, memory) == jobs


def test_long_command_gives_a_sign_of_life_and_keeps_its_output(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup_env, 'HEARTBEAT_SECONDS', 0.01)
    seen = tmp_path / 'seen'
    code = f"""
import os, time
print('[1/2] c++', flush=True)
while not os.path.exists({str(seen)!r}):
    time.sleep(0.01)
"""

    def progress(output):
        # The command ends when its progress was seen.
        if found := setup_env.compile_progress(output):
            seen.touch()
        return found

    log = tmp_path / 'log'
    setup_env.run_logged([sys.executable, '-c', code], log, progress=progress)
    assert '[1/2]' in capsys.readouterr().out
    assert log.read_text() == '[1/2] c++\n'


def test_failed_command_names_its_log(tmp_path):
    with pytest.raises(setup_env.StepError) as error:
        setup_env.run_logged([sys.executable, '-c', 'raise SystemExit(3)'], tmp_path / 'log')
    assert error.value.log == tmp_path / 'log'


def test_interruption_ends_the_command_and_what_it_started(monkeypatch, tmp_path):
    def interrupt(log):
        if log.read_text():
            raise KeyboardInterrupt
        return ''

    monkeypatch.setattr(setup_env, 'HEARTBEAT_SECONDS', 0.1)
    monkeypatch.setattr(setup_env, 'tail', interrupt)
    log = tmp_path / 'log'
    with pytest.raises(KeyboardInterrupt):
        setup_env.run_logged(['sh', '-c', 'sleep 60 & echo $!; wait'], log)
    child = int(log.read_text())
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # A zombie has ended as well; only init may collect it. On busy cores it takes its time.
        deadline = time.monotonic() + 30
        state = None
        while state != 'Z' and time.monotonic() < deadline:
            state = Path(f'/proc/{child}/stat').read_text().rpartition(') ')[2][0]
            time.sleep(0.01)
        assert state == 'Z'


# What a set-up decides to do


WANTED = {'root': '/a', 'python': '3.11', 'inputs': 'x', 'force_cuda': '0'}


@pytest.mark.parametrize(
    ('stamp', 'runs', 'todo'),
    [
        (WANTED, True, 'ready'),
        ({**WANTED, 'inputs': 'y'}, True, 'update'),
        ({**WANTED, 'force_cuda': '1'}, True, 'update'),
        ({**WANTED, 'root': '/b'}, True, 'create'),
        ({**WANTED, 'python': '3.12'}, True, 'create'),
        (None, True, 'create'),
        (WANTED, False, 'create'),
    ],
)
def test_plan(stamp, runs, todo):
    assert setup_env.plan(stamp, WANTED, runs) == todo


@pytest.mark.parametrize('text', [None, '', '{"root": '])
def test_absent_or_half_written_stamp_is_none(monkeypatch, tmp_path, text):
    stamp = tmp_path / 'setup.json'
    if text is not None:
        stamp.write_text(text)
    monkeypatch.setattr(setup_env, 'STAMP', stamp)
    assert setup_env.read_stamp() is None


# The package's metadata


@pytest.fixture(scope='module')
def distribution():
    pytest.importorskip('setuptools')
    from distutils.core import run_setup

    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return run_setup('setup.py', stop_after='init')
    finally:
        os.chdir(before)


def test_package_forces_neither_family(distribution):
    required = {re.split(r'[<>=!~ ;]', line)[0] for line in distribution.install_requires}
    assert required == {'numpy', 'torch'}


def test_torch_that_is_declared_is_the_one_that_is_checked(distribution):
    from ubn_det._torch_floor import MINIMUM_TORCH

    assert f'torch>={MINIMUM_TORCH}' in distribution.install_requires
    (pin,) = (line for line in SECTIONS['wheels'] if line.startswith('torch=='))
    requirement = pytest.importorskip('packaging.requirements').Requirement(
        f'torch>={MINIMUM_TORCH}'
    )
    assert requirement.specifier.contains(pin.partition('==')[2])


@pytest.mark.parametrize(
    ('version', 'is_refused'),
    [
        *(('1.13.1', True), ('2.7.1+cu126', True), ('2.8.0', False), ('2.10.1+cpu', False)),
        *(('2.8.0a0+gitc0ffee', False), ('2.13.0.dev20261124', False), ('3.0.0', False)),
    ],
)
def test_torch_that_is_too_old_is_refused_in_a_sentence(version, is_refused):
    from ubn_det._torch_floor import check

    if not is_refused:
        check(version)
        return
    with pytest.raises(ImportError, match=re.escape(f'this is torch {version}: install a newer')):
        check(version)


@pytest.mark.parametrize('name', ['ubn_det', 'ubn_det.layers', 'ubn_det.engine'])
def test_nothing_fails_before_an_old_torch_is_named(tmp_path, name):
    """A torch of which nothing is there but its version."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch/__init__.py').write_text("__version__ = '2.7.1'")
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.path[:0] = [{str(tmp_path)!r}]; import {name}'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr.splitlines()[-1].startswith(
        'ImportError: ubn_det needs torch 2.8 or newer, and this is torch 2.7.1: install'
    )


def test_extras_name_one_family_each(distribution):
    extras = distribution.extras_require
    others = ['classification', 'segmentation', 'tests']
    assert sorted(extras) == sorted(['onedl', 'openmmlab', *others])
    assert all(line.startswith('onedl-') for line in extras['onedl'])
    assert not any(line.startswith('onedl-') for line in extras['openmmlab'])


def test_pinned_stack_satisfies_the_onedl_extra(distribution):
    requirements = pytest.importorskip('packaging.requirements')
    pins = dict(
        line.partition('; ')[0].split('==')
        for name in ('wheels', 'mmcv', 'mmdet')
        for line in SECTIONS[name]
    )
    for line in distribution.extras_require['onedl']:
        requirement = requirements.Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line


def test_version_is_that_of_the_package(distribution):
    import ubn_det

    assert distribution.get_version() == ubn_det.__version__


def test_all_packages_are_found(distribution):
    folders = {path.parent for path in (ROOT / 'ubn_det').rglob('__init__.py')}
    names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(distribution.packages) == names

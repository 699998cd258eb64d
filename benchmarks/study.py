"""Train a grid of norm settings and seeds over one config, and write their metrics to CSV files.

A study is a config file with

    config       the config to train, relative to the study's file
    settings     the options over it, by the name of the setting: {name: {key: value}}
    baseline     the setting that the others are compared with
    seeds        a list; runs of one seed start from the same weights and see the same data
    evaluations  options over the config for further tests of the final weights, by name; optional
    checkpoint   whether the final checkpoint of each run is kept; False by default

and names of its own that begin with an underscore.

Runs resume where they were interrupted, and finished ones are not run again; a folder of other
settings or of other code is refused. One process per GPU, or per core with one thread each.
benchmarks/report_study.py makes tables and plots of the CSV files.
"""

import argparse
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Container
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import origin
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner

import ubn_det
from ubn_det.datasets import InputError, check_data
from ubn_det.engine import build_runner, prepare, set_data_root

RESULT = 'result.json'
CONDENSATION_TAGS = ('condensation/', 'condensation_threshold/', 'condensed_share/')
CONDENSED = 'condensed_share/'
# Batches before any gate closes, in all settings with a threshold.
_WARMUP = 50
# At the end of a run, iterations whose gates can be told apart.
_TAIL = 120
# What a run's process needs anyway; imported once, by the process that starts the others.
_PRELOADED = ['mmcv.ops', 'mmdet.apis', 'pycocotools.cocoeval', 'ubn_det']


class EvaluateFirstHook(Hook):
    """Evaluate what a run resumes from, where it was interrupted before it had done so.

    mmengine saves a checkpoint before the evaluation of its iteration, and goes on after both.

    Args:
        evaluated (Container[int]): Iterations that were evaluated before.
    """

    def __init__(self, evaluated: Container[int]) -> None:
        self.evaluated = evaluated

    def before_train(self, runner: Runner) -> None:
        """Evaluate if it is due."""
        due = runner.iter > 0 and runner.iter % runner.train_loop.val_interval == 0
        if due and runner.iter not in self.evaluated:
            runner.val_loop.run()


class StudyError(ValueError):
    """A study file that cannot be run, in a sentence for the user."""


class Run(NamedTuple):
    """One cell of the grid.

    Args:
        setting (str): Name of the norm setting.
        seed (int): Of weights, data order and augmentation.
        folder (Path): Where its logs, checkpoint and result are.
        fingerprint (str): Of its settings and its code.
    """

    setting: str
    seed: int
    folder: Path
    fingerprint: str


def load_study(path: Path) -> Config:
    """Read a study's file.

    Raises:
        StudyError: Something is missing, misspelt or of the wrong type; names it.
    """
    study = Config.fromfile(path)
    study.setdefault('evaluations', {})
    study.setdefault('checkpoint', False)
    kinds = dict(
        config=str, settings=dict, baseline=str, seeds=list, evaluations=dict, checkpoint=bool
    )
    for key, kind in kinds.items():
        if not isinstance(study.get(key), kind):
            raise StudyError(f'{path}: {key} must be a {kind.__name__}, got {study.get(key)!r}')
    unknown = {key for key in study if not key.startswith('_')} - set(kinds)
    if unknown:
        raise StudyError(f'{path}: unknown {", ".join(sorted(unknown))}')
    if study.baseline not in study.settings:
        raise StudyError(f'{path}: baseline {study.baseline!r} is none of the settings')
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise StudyError(f'{path}: seeds must differ and be at least one, got {study.seeds}')
    slugs = [slug(name) for name in study.settings]
    if len(set(slugs)) < len(slugs) or '' in slugs:
        raise StudyError(f'{path}: names of settings must differ in letters or digits')
    study.config = str((path.parent / study.config).resolve())
    return study


def slug(name: str) -> str:
    """Make a name of a folder out of a setting's."""
    return re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')


def make_grid(study: Config, work_dir: Path) -> list[Run]:
    """Return all runs, seed by seed, so that an unfinished study has whole pairs."""
    marks = {setting: fingerprint(study, setting) for setting in study.settings}
    return [
        Run(setting, seed, work_dir / slug(setting) / f'seed{seed}', marks[setting])
        for seed, setting in itertools.product(study.seeds, study.settings)
    ]


def build_config(study: Config, setting: str, seed: int, data_root: str | None) -> Config:
    """Put a setting and a seed into the study's config."""
    cfg = Config.fromfile(study.config)
    cfg.merge_from_dict(study.settings[setting].to_dict())
    cfg.randomness = dict(seed=seed)
    cfg.launcher = 'none'
    if data_root is not None:
        set_data_root(cfg, data_root)
    prepare(cfg)
    return cfg


def fingerprint(study: Config, setting: str) -> str:
    """Tell a run's settings and code from others, wherever its data are."""
    cfg = build_config(study, setting, 0, None)
    text = json.dumps([cfg.to_dict(), study.evaluations.to_dict()], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    # The package, and what a config imports from beside this file.
    package = Path(ubn_det.__file__).parent
    files = [p for p in package.rglob('*') if p.suffix in ('.py', '.cpp', '.h', '.inc')]
    names = cfg.get('custom_imports', {}).get('imports', ())
    files += [p for p in (Path(__file__).with_name(f'{name}.py') for name in names) if p.exists()]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read_result(run: Run) -> dict[str, Any] | None:
    """Read what a finished run left, None where it is not finished.

    Raises:
        StudyError: The folder holds a run with other settings, or of other code.
    """
    mark = run.folder / 'fingerprint'
    if mark.exists() and mark.read_text() != run.fingerprint:
        raise StudyError(
            f'{run.folder} holds a run of {run.setting!r} with other settings or of other code: '
            'remove the folder, or choose another one with --work-dir'
        )
    path = run.folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


class Logs(NamedTuple):
    """What the visualizer wrote in a run, resumed or not; the later part wins.

    Args:
        scalars (dict[int, dict[str, float]]): Losses, metrics and scores, by iteration.
        seconds (list[float]): Times of a training iteration.
        evaluated (set[int]): Iterations that were evaluated.
    """

    scalars: dict[int, dict[str, float]]
    seconds: list[float]
    evaluated: set[int]


def read_logs(folder: Path) -> Logs:
    """Read the logs of a run; they are empty where it has none yet."""
    logs = Logs({}, [], set())
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            scalars = json.loads(line)
            step = int(scalars.pop('step'))
            if 'time' in scalars and 'lr' in scalars:
                logs.seconds.append(scalars['time'])
            elif 'time' in scalars:
                # That of an image.
                logs.evaluated.add(step)
            logs.scalars.setdefault(step, {}).update(
                (tag, v) for tag, v in scalars.items() if tag not in ('time', 'data_time', 'iter')
            )
    return logs


def train(study: Config, run: Run, data_root: str | None, device: int | None) -> None:
    """Do one run to its end, in a process of its own; its output goes to a file beside it."""
    # mmengine logs to the standard streams, C++ to their descriptors.
    with open(run.folder / 'output.txt', 'a', encoding='utf-8') as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if device is None:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    register_all_modules()
    cfg = build_config(study, run.setting, run.seed, data_root)
    cfg.work_dir = str(run.folder)
    cfg.resume = True
    runner = build_runner(cfg, 'resume')
    runner.register_hook(EvaluateFirstHook(read_logs(run.folder).evaluated))
    runner.train()
    checkpoint = (run.folder / 'last_checkpoint').read_text()

    evaluations = {}
    for name, options in study.evaluations.items():
        cfg = build_config(study, run.setting, run.seed, data_root)
        cfg.merge_from_dict(options.to_dict())
        cfg.work_dir = str(run.folder / 'evaluations' / slug(name))
        cfg.load_from = checkpoint
        cfg.experiment_name = f'{slug(run.setting)}_{run.seed}_{slug(name)}'
        evaluations[name] = build_runner(cfg, 'test').test()

    logs = read_logs(run.folder)
    result = dict(
        scalars=logs.scalars,
        seconds_per_iter=statistics.median(logs.seconds),
        evaluations=evaluations,
        origin=origin.describe('cpu' if device is None else 'cuda'),
    )
    part = run.folder / f'{RESULT}.part'
    part.write_text(json.dumps(result))
    part.replace(run.folder / RESULT)
    if not study.checkpoint:
        os.remove(checkpoint)
    shutil.rmtree(run.folder / 'evaluations', ignore_errors=True)


def run_all(
    study: Config, runs: list[Run], data_root: str | None, devices: list[int | None]
) -> list[Run]:
    """Do the runs, one at a time on every device.

    Returns:
        list[Run]: Those that failed.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_PRELOADED)
    waiting, failed, num_done, start = list(runs), [], 0, time.monotonic()
    free = list(devices)
    running: dict[int, tuple[BaseProcess, Run, int | None]] = {}
    try:
        while waiting or running:
            while waiting and free:
                run, device = waiting.pop(0), free.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                (run.folder / 'fingerprint').write_text(run.fingerprint)
                process = context.Process(target=train, args=(study, run, data_root, device))
                process.start()
                running[process.sentinel] = process, run, device
            for sentinel in wait(list(running)):
                process, run, device = running.pop(sentinel)
                process.join()
                free.append(device)
                num_done += 1
                is_good = process.exitcode == 0 and (run.folder / RESULT).exists()
                if not is_good:
                    failed.append(run)
                outcome = 'done' if is_good else f'FAILED, see {run.folder}/output.txt'
                minutes = (time.monotonic() - start) / 60
                left = minutes / num_done * (len(runs) - num_done)
                print(
                    f'study: {num_done}/{len(runs)} {run.setting}, seed {run.seed}: {outcome} '
                    f'({minutes:.1f} min, about {left:.0f} min left)',
                    flush=True,
                )
    finally:
        for process, _, _ in running.values():
            process.terminate()
    return failed


def collect(study: Config, runs: list[Run], out: Path) -> int:
    """Write what the finished runs left: ``out``, and beside it the scores and gates of layers.

    ``out`` has a row for every run, step and metric, with the run's commit, machine and date. Step
    0 has ``seconds_per_iter``, the median of a run, and ``condensed_share/LAYER``, the share of
    batches after the warm-up whose gate was closed; the last steps have that of their own batches,
    over all layers; step -1 has the further evaluations, as ``NAME/METRIC``. The file
    ``..._condensation.csv`` has the mean over the seeds for every setting, step and layer.

    Returns:
        int: Number of finished runs.
    """
    rows: list[tuple[Any, ...]] = []
    layers: dict[tuple[str, str, int], list[float]] = {}
    num_finished = 0
    order = [study.baseline, *study.settings]
    for run in sorted(runs, key=lambda run: order.index(run.setting)):
        result = read_result(run)
        if result is None:
            continue
        num_finished += 1
        scalars = {int(step): values for step, values in result['scalars'].items()}
        own: list[tuple[int, str, float]] = []
        for step, values in scalars.items():
            for tag, value in values.items():
                if tag.startswith(CONDENSATION_TAGS):
                    layers.setdefault((run.setting, tag, step), []).append(value)
                    if tag == f'{CONDENSED}mean' and step > max(scalars) - _TAIL:
                        own.append((step, tag, value))
                elif '/' in tag and not isinstance(value, str):
                    own.append((step, tag, value))
        own.append((0, 'seconds_per_iter', result['seconds_per_iter']))
        own += [(0, tag, share) for tag, share in condensed_shares(scalars).items()]
        for name, metrics in result['evaluations'].items():
            own += [(-1, f'{name}/{tag}', value) for tag, value in metrics.items()]
        made = tuple(result['origin'].values())
        rows += [
            (run.setting, run.seed, step, tag, f'{value:.5g}', *made) for step, tag, value in own
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    header = ('setting', 'seed', 'step', 'tag', 'value', 'date', 'commit', 'machine')
    _write(out, header, rows)
    _write(
        out.with_name(f'{out.stem}_condensation.csv'),
        ('setting', 'step', 'tag', 'value'),
        [(s, step, tag, f'{statistics.fmean(v):.3f}') for (s, tag, step), v in layers.items()],
    )
    return num_finished


def condensed_shares(scalars: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return the share of batches after the warm-up whose gate was closed.

    Args:
        scalars (dict[int, dict[str, float]]): Of a run, by iteration; those of an iteration tell
            of the batches since the one before.

    Returns:
        dict[str, float]: By ``condensed_share/LAYER``, and ``condensed_share/mean`` over all
        layers; nothing where gates were not logged.
    """
    closed: dict[str, float] = {}
    last = 0
    for step in sorted(scalars):
        shares = {tag: v for tag, v in scalars[step].items() if tag.startswith(CONDENSED)}
        for tag, share in shares.items():
            closed[tag] = closed.get(tag, 0.0) + share * (step - last)
        last = step if shares else last
    closed.pop(f'{CONDENSED}max', None)
    return {tag: number / max(last - _WARMUP, 1) for tag, number in closed.items()}


def _write(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def find_devices(jobs: int | None) -> list[int | None]:
    """Return the GPUs, or a None for every core; ``jobs`` of them."""
    if torch.cuda.is_available():
        devices: list[int | None] = list(range(torch.cuda.device_count()))
        return [devices[i % len(devices)] for i in range(jobs or len(devices))]
    return [None] * (jobs or len(os.sched_getaffinity(0)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('study', type=Path, help='file of the study')
    parser.add_argument('--work-dir', type=Path, help='folder of the runs')
    parser.add_argument('--out', type=Path, help='CSV file; WORK_DIR/STUDY.csv by default')
    parser.add_argument('--data-root', help="folder to use in place of the config's data_root")
    parser.add_argument('--seeds', type=int, nargs='+', help="some of the study's seeds")
    parser.add_argument('--settings', nargs='+', help="some of the study's settings")
    parser.add_argument('--jobs', type=int, help='runs at a time; one per GPU or core by default')
    args = parser.parse_args(argv)
    work_dir = args.work_dir or Path('work_dirs') / args.study.stem
    try:
        study = load_study(args.study)
        for name, known in (('seeds', study.seeds), ('settings', study.settings)):
            unknown = set(getattr(args, name) or ()) - set(known)
            if unknown:
                raise StudyError(f'--{name}: the study has no {", ".join(map(str, unknown))}')
        if args.jobs is not None and args.jobs < 1:
            raise StudyError(f'--jobs must be at least 1, got {args.jobs}')
        grid = make_grid(study, work_dir)
        runs = [
            run
            for run in grid
            if run.seed in (args.seeds or study.seeds)
            and run.setting in (args.settings or study.settings)
        ]
        missing = [run for run in runs if read_result(run) is None]
        cfg = build_config(study, study.baseline, 0, args.data_root)
        check_data(cfg, ('train', 'val'))
        # What is decoded once is decoded here, and what is missing is missed before any run.
        DATASETS.build(cfg.val_dataloader.dataset)
    except (InputError, StudyError, FileNotFoundError) as error:
        print(f'study: error: {error}', file=sys.stderr)
        return 2
    devices = find_devices(args.jobs)
    print(
        f'study: {len(runs)} runs, {len(runs) - len(missing)} done before; '
        f'{len(devices)} at a time in {work_dir}',
        flush=True,
    )
    failed = run_all(study, missing, args.data_root, devices)
    out = args.out or work_dir / f'{args.study.stem}.csv'
    print(f'study: wrote {out} of {collect(study, grid, out)} runs')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())

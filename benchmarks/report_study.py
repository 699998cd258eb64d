"""Make tables and plots of what benchmarks/study.py wrote.

The score of a run is the mean of its metrics (box and mask mAP), in points. Every setting is
compared with the baseline pair by pair: the same seed, initial weights and data. Writes STUDY.md
with the table, STUDY_summary.csv, STUDY_curves.png and STUDY_condensation.png beside the CSV file.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from ubn_det.visualization import HEATMAPS, METRICS, draw_heatmap

LEVEL = 0.95
# The part of the schedule that tells of early convergence.
EARLY = 0.25


class Curves(NamedTuple):
    """The runs of one setting that are finished.

    Args:
        seeds (list[int]): Of the runs.
        steps (np.ndarray): Iterations of the evaluations, (S,).
        values (np.ndarray): Metric in points, (number of runs, S).
    """

    seeds: list[int]
    steps: np.ndarray
    values: np.ndarray


class Comparison(NamedTuple):
    """Paired differences to the baseline at one point.

    Args:
        mean (float): Mean over the pairs.
        low (float): Lower end of its confidence interval, NaN where there is one pair.
        high (float): Upper end.
        num_pairs (int): Number of pairs.
        num_better (int): Pairs with a positive difference.
    """

    mean: float
    low: float
    high: float
    num_pairs: int
    num_better: int


def compare(differences: np.ndarray) -> Comparison:
    r"""Return the mean of paired differences with its interval of Student's t.

    .. math:: mean \pm t_{n - 1} \cdot s / \sqrt n,

    s the deviation of the n differences. It holds the true mean as often as ``LEVEL`` says where
    the differences are normal, however few they are; percentiles of a bootstrap are too narrow
    then.

    Args:
        differences (np.ndarray): One for each pair, at least one.
    """
    mean, count = float(differences.mean()), len(differences)
    half = math.nan
    if count > 1:
        quantile = stats.t.ppf((1 + LEVEL) / 2, count - 1)
        half = float(quantile * differences.std(ddof=1) / math.sqrt(count))
    return Comparison(mean, mean - half, mean + half, count, int((differences > 0).sum()))


def iterations_to_reach(steps: np.ndarray, values: np.ndarray, target: float) -> float:
    """Return the first iteration at which a curve that starts at 0 reaches a value.

    Linear between evaluations; infinite where it never does.
    """
    steps, values = np.concatenate([[0], steps]), np.concatenate([[0.0], values])
    reached = np.flatnonzero(values >= target)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0:
        return 0.0
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def area_under(steps: np.ndarray, values: np.ndarray) -> float:
    """Return the mean height of a curve that starts at 0, by trapezoids."""
    steps, values = np.concatenate([[0], steps]), np.concatenate([[0.0], values])
    return float(np.trapezoid(values, steps) / steps[-1])


class Study:
    """All curves of a CSV file of benchmarks/study.py.

    Args:
        path (Path): The file.
        baseline (str, optional): Setting to compare with; None for the first in the file.
        metrics (tuple[str, ...]): Their mean is the score of a run.

    Raises:
        ValueError: The file holds no finished run of the baseline, or a metric is not in it.
    """

    def __init__(
        self, path: Path, baseline: str | None = None, metrics: tuple[str, ...] = METRICS
    ) -> None:
        scalars: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
        with path.open(newline='', encoding='utf-8') as file:
            for row in csv.DictReader(file):
                runs = scalars.setdefault(row['setting'], {})
                steps = runs.setdefault(int(row['seed']), {})
                steps.setdefault(int(row['step']), {})[row['tag']] = float(row['value'])
        if not scalars:
            raise ValueError(f'{path} has no finished run')
        baseline = baseline or next(iter(scalars))
        if baseline not in scalars:
            raise ValueError(f'{path} has no run of the baseline {baseline!r}')
        for metric in metrics:
            runs = (steps for runs in scalars.values() for steps in runs.values())
            if not all(any(metric in values for values in steps.values()) for steps in runs):
                raise ValueError(f'{path} has runs without the metric {metric!r}')
        self.baseline = baseline
        self.metrics = metrics
        self.scalars = scalars
        self.settings = list(scalars)

    def curves(self, setting: str, metrics: tuple[str, ...] | None = None) -> Curves:
        """Return the score, or the mean of some metrics, of a setting's runs."""
        metrics = metrics or self.metrics
        runs = self.scalars[setting]
        steps = sorted(
            step for step, values in next(iter(runs.values())).items() if metrics[0] in values
        )
        values = [[[run[s][m] for m in metrics] for s in steps] for run in runs.values()]
        return Curves(list(runs), np.array(steps), 100 * np.array(values).mean(-1))

    def pairs(self, setting: str, values: dict[str, dict[int, float]]) -> np.ndarray:
        """Return a value's differences to the baseline, for the seeds that both have."""
        own, other = values[setting], values[self.baseline]
        return np.array([own[seed] - other[seed] for seed in own if seed in other])

    def per_run(self, value) -> dict[str, dict[int, float]]:
        """Return ``value(steps, curve)`` of every run, by setting and seed."""
        result = {}
        for setting in self.settings:
            curves = self.curves(setting)
            result[setting] = {
                seed: value(curves.steps, curve)
                for seed, curve in zip(curves.seeds, curves.values)
            }
        return result

    def times(self) -> dict[str, dict[int, float]]:
        """Return the seconds of an iteration of every run, by setting and seed."""
        return {
            setting: {seed: steps[0]['seconds_per_iter'] for seed, steps in runs.items()}
            for setting, runs in self.scalars.items()
        }

    def evaluations(self) -> list[str]:
        """Return the names of the further evaluations of the final weights."""
        steps = next(iter(self.scalars[self.baseline].values()))
        suffix = f'/{self.metrics[0]}'
        return [tag.removesuffix(suffix) for tag in steps.get(-1, ()) if tag.endswith(suffix)]


class Row(NamedTuple):
    """What the summary says of one setting, in points.

    Args:
        setting (str): Its name.
        early (np.ndarray): Score of every run at ``EARLY`` of the schedule.
        final (list[np.ndarray]): Each metric of every run at its end.
        early_gain (Comparison): Of the score at ``EARLY`` of the schedule.
        final_gain (Comparison): Of the score at its end.
        area_gain (Comparison): Of the area under its curve.
        reached (float): Median over the pairs of the iterations that a run takes to the final
            score of the baseline's run of its seed; infinite where half of them never do.
        time_ratio (float): Median over the pairs of the time of an iteration.
    """

    setting: str
    early: np.ndarray
    final: list[np.ndarray]
    early_gain: Comparison
    final_gain: Comparison
    area_gain: Comparison
    reached: float
    time_ratio: float


def summarize(study: Study) -> list[Row]:
    """Return the summary of every setting that has a seed in common with the baseline."""
    early = study.per_run(lambda steps, curve: curve[_early_index(steps)])
    final = study.per_run(lambda steps, curve: curve[-1])
    area = study.per_run(area_under)
    target = final[study.baseline]
    times = study.times()
    rows = []
    for setting in study.settings:
        curves = study.curves(setting)
        paired = [i for i, seed in enumerate(curves.seeds) if seed in target]
        if not paired:
            continue
        reached = [
            iterations_to_reach(curves.steps, curves.values[i], target[curves.seeds[i]])
            for i in paired
        ]
        ratios = [
            times[setting][s] / times[study.baseline][s] for s in times[setting] if s in target
        ]
        rows.append(
            Row(
                setting,
                curves.values[:, _early_index(curves.steps)],
                [study.curves(setting, (metric,)).values[:, -1] for metric in study.metrics],
                compare(study.pairs(setting, early)),
                compare(study.pairs(setting, final)),
                compare(study.pairs(setting, area)),
                float(np.median(reached)),
                float(np.median(ratios)),
            )
        )
    return rows


def _early_index(steps: np.ndarray) -> int:
    return int(np.argmin(abs(steps - EARLY * steps[-1])))


def spread(values: np.ndarray) -> str:
    """Write the mean of some runs and their deviation."""
    deviation = f' ± {values.std(ddof=1):.1f}' if len(values) > 1 else ''
    return f'{values.mean():.1f}{deviation}'


def interval(gain: Comparison) -> str:
    """Write a mean difference and its interval."""
    # One pair says nothing of the spread.
    interval = f' [{gain.low:+.1f}, {gain.high:+.1f}]' if gain.num_pairs > 1 else ''
    return f'{gain.mean:+.1f}{interval}'


def make_table(rows: list[Row], metrics: tuple[str, ...]) -> str:
    """Return the summary as a Markdown table."""
    heads = ['setting', 'pairs', 'at 1/4', 'gain at 1/4', *(m.split('/')[-1] for m in metrics)]
    heads += ['gain at the end', 'better', 'gain in area', 'iterations to the baseline', 'time']
    lines = [f'| {" | ".join(heads)} |', f'|{" --- |" * len(heads)}']
    for row in rows:
        reached = 'never' if math.isinf(row.reached) else f'{row.reached:.0f}'
        cells = [
            row.setting,
            str(row.final_gain.num_pairs),
            spread(row.early),
            interval(row.early_gain),
            *map(spread, row.final),
            interval(row.final_gain),
            f'{row.final_gain.num_better}/{row.final_gain.num_pairs}',
            interval(row.area_gain),
            reached,
            f'{row.time_ratio:.2f}x',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def make_evaluation_table(study: Study) -> str:
    """Return a Markdown table of how far further evaluations move the score."""
    names = study.evaluations()
    lines = [f'| setting | {" | ".join(names)} |', f'|{" --- |" * (len(names) + 1)}']
    for setting, runs in study.scalars.items():
        cells = [setting]
        for name in names:
            moves = [
                100
                * np.mean(
                    [
                        steps[-1][f'{name}/{metric}'] - steps[max(steps)][metric]
                        for metric in study.metrics
                    ]
                )
                for steps in runs.values()
                if f'{name}/{study.metrics[0]}' in steps.get(-1, ())
            ]
            cells.append(interval(compare(np.array(moves))) if moves else '')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw_curves(study: Study, rows: list[Row], out: Path) -> None:
    """Draw the score of every setting with a band of one standard deviation, and the gains."""
    height = max(5.0, 1.5 + 0.42 * len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, height), layout='constrained')
    colours = plt.get_cmap('turbo')(np.linspace(0.05, 0.95, len(rows)))
    for row, colour in zip(rows, colours):
        curves = study.curves(row.setting)
        mean = curves.values.mean(0)
        is_baseline = row.setting == study.baseline
        style = dict(color='black', linewidth=2.5) if is_baseline else dict(color=colour)
        left.plot(curves.steps, mean, label=f'{row.setting} ({len(curves.seeds)})', **style)
        if len(curves.seeds) > 1:
            spread = curves.values.std(0, ddof=1)
            left.fill_between(
                curves.steps, mean - spread, mean + spread, color=style['color'], alpha=0.08
            )
    left.set(title=f'mean of {", ".join(study.metrics)}', xlabel='iteration', ylabel='points')
    left.grid(alpha=0.3)
    left.legend(fontsize=7, framealpha=0.5)
    compared = [row for row in rows if row.setting != study.baseline][::-1]
    for offset, colour, label in (
        (0.12, 'tab:orange', 'at a quarter of the schedule'),
        (-0.12, 'tab:blue', 'at its end'),
    ):
        gains = [r.early_gain if offset > 0 else r.final_gain for r in compared]
        mean = np.array([gain.mean for gain in gains])
        bars = np.array([[g.mean - g.low for g in gains], [g.high - g.mean for g in gains]])
        y = np.arange(len(gains)) + offset
        right.errorbar(mean, y, xerr=bars, fmt='o', color=colour, capsize=3, label=label)
    right.set_yticks(range(len(compared)), [row.setting for row in compared], fontsize=8)
    right.axvline(0, color='black', linewidth=1)
    right.set(title=f'gain over {study.baseline}, {LEVEL:.0%} t interval', xlabel='points')
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(out, dpi=80)
    plt.close(figure)


def draw_condensation(path: Path, out: Path, settings: list[str] | None) -> bool:
    """Draw scores, thresholds and gates, by layer and iteration, for every setting with scores.

    Returns:
        bool: Whether there was anything to draw.
    """
    values: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    with path.open(newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            tag, layer = row['tag'].split('/', 1)
            if layer not in ('mean', 'max') and row['setting'] in (settings or [row['setting']]):
                steps = values.setdefault(row['setting'], {}).setdefault(tag, {})
                steps.setdefault(int(row['step']), {})[layer] = float(row['value'])
    values = {setting: tags for setting, tags in values.items() if 'condensation' in tags}
    if not values:
        return False
    # Studies from before thresholds were logged have none.
    maps = [entry for entry in HEATMAPS if any(entry[0] in tags for tags in values.values())]
    figure, axes = plt.subplots(
        len(values),
        len(maps),
        figsize=(7.5 * len(maps), 5.5 * len(values)),
        layout='constrained',
        squeeze=False,
    )
    for row, (setting, tags) in zip(axes, values.items()):
        layers = list(next(iter(tags['condensation'].values())))
        for ax, (tag, title, colours, low) in zip(row, maps, strict=True):
            draw_heatmap(
                ax,
                tags.get(tag, {}),
                layers,
                f'{setting}: {title}',
                colours,
                low,
                fontsize=5 if ax is row[0] else 0,
            )
    figure.savefig(out, dpi=70)
    plt.close(figure)
    return True


def write_summary(rows: list[Row], metrics: tuple[str, ...], out: Path) -> None:
    """Write the summary's figures as CSV."""
    with out.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(
            ['setting', 'pairs', 'early', 'early_sd']
            + [f'{metric}{end}' for metric in metrics for end in ('', '_sd')]
            + ['pairs_better']
            + [
                f'{g}_gain{end}'
                for g in ('early', 'final', 'area')
                for end in ('', '_low', '_high')
            ]
            + ['iterations_to_baseline', 'time_ratio']
        )
        for row in rows:
            numbers = []
            for values in (row.early, *row.final):
                deviation = values.std(ddof=1) if len(values) > 1 else math.nan
                numbers += [values.mean(), deviation]
            gains = [g[:3] for g in (row.early_gain, row.final_gain, row.area_gain)]
            numbers.append(row.final_gain.num_better)
            numbers += [number for gain in gains for number in gain]
            numbers += [row.reached, row.time_ratio]
            writer.writerow(
                [row.setting, row.final_gain.num_pairs, *(f'{number:.4g}' for number in numbers)]
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('csv', type=Path, nargs='+', help='what benchmarks/study.py wrote')
    parser.add_argument('--baseline', help='setting to compare with; the first in the file')
    parser.add_argument(
        '--metrics', nargs='+', default=METRICS, help='their mean is compared (default: mAP)'
    )
    parser.add_argument('--condensation', nargs='+', help='settings whose scores are drawn')
    args = parser.parse_args(argv)
    for path in args.csv:
        if not path.exists():
            parser.error(f'{path}: no such file')
        try:
            study = Study(path, args.baseline, tuple(args.metrics))
        except ValueError as error:
            parser.error(str(error))
        rows = summarize(study)
        stem = path.with_suffix('')
        tables = [make_table(rows, study.metrics)]
        if study.evaluations():
            tables.append(make_evaluation_table(study))
        text = '\n\n'.join(tables)
        print(f'{path}\n{text}')
        Path(f'{stem}.md').write_text(f'{text}\n', encoding='utf-8')
        write_summary(rows, study.metrics, Path(f'{stem}_summary.csv'))
        draw_curves(study, rows, Path(f'{stem}_curves.png'))
        scores = Path(f'{stem}_condensation.csv')
        if scores.exists():
            draw_condensation(scores, Path(f'{stem}_condensation.png'), args.condensation)
    return 0


if __name__ == '__main__':
    sys.exit(main())

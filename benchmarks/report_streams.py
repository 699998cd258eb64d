"""Make the tables of docs/condensation.md of what benchmarks/study.py wrote, a CSV file a grid.

Streams are those of benchmarks/condensed_stream.py. Scores are accuracy on CIFAR-10 and the mean
of box and mask mAP on Penn-Fudan, in points, at the end of the training. Differences are paired:
the same seed, initial weights and data. Draws the picture of the page as well.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from pages import replace_part
from report_study import Comparison, Study, compare, interval, spread

from ubn_det.visualization import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/condensation.md'
STREAMS = ROOT / 'docs/results/streams'
ACCURACY = ('cifar10/accuracy',)
OFF, AUTO = 'UBN, threshold off', 'UBN, threshold auto'
# What a setting is without its gate.
WITHOUT = {'UBN, threshold 0.6': OFF, AUTO: OFF}
SHARE = 'condensed_share/'
# Condensed batches at the end of a stream.
LAST = 10
# From the first to the last of the network.
DRAWN_LAYERS = ('stem.bn', 'blocks.1.0.bn', 'blocks.2.1.bn')


class Grid:
    """The runs of one file.

    Args:
        name (str): Of the grid.
        metrics (tuple[str, ...]): Their mean is the score of a run.
    """

    def __init__(self, name: str, metrics: tuple[str, ...] = ACCURACY) -> None:
        self.study = Study(STREAMS / f'{name}.csv', metrics=metrics)
        self.scores = self.study.per_run(lambda steps, curve: float(curve[-1]))
        self.settings = self.study.settings

    def score(self, setting: str) -> str:
        """Return the mean score of a setting and its deviation over the seeds."""
        return spread(np.array(list(self.scores[setting].values())))

    def less(self, setting: str, other: str) -> Comparison:
        """Compare the scores of two settings."""
        return difference(self.scores[setting], self.scores[other])

    def closed(self, setting: str) -> dict[str, float]:
        """Return the share of batches after the warm-up whose gate was closed, over the seeds.

        Returns:
            dict[str, float]: By layer, and their ``mean``; empty where there are no gates.
        """
        shares: dict[str, list[float]] = {}
        for steps in self.study.scalars[setting].values():
            for tag, value in steps[0].items():
                if tag.startswith(SHARE):
                    shares.setdefault(tag.removeprefix(SHARE), []).append(value)
        return {layer: float(np.mean(values)) for layer, values in shares.items()}

    def worst_layer(self, setting: str) -> tuple[str, float] | None:
        """Return the layer whose gate was closed most often and its share, None without gates."""
        layers = {name: share for name, share in self.closed(setting).items() if name != 'mean'}
        return max(layers.items(), key=lambda item: item[1], default=None)

    def closed_at_the_end(self, setting: str, num_batches: int) -> float:
        """Return the share of gates over all layers that were closed in the last batches.

        Counts from the last log before them on, as if all that closed in between were of them.
        """
        shares = []
        for steps in self.study.scalars[setting].values():
            logs = sorted(s for s, values in steps.items() if s > 0 and f'{SHARE}mean' in values)
            first = max(i for i, s in enumerate(logs) if s <= logs[-1] - num_batches)
            closed = sum(
                steps[logs[i]][f'{SHARE}mean'] * (logs[i] - logs[i - 1])
                for i in range(first + 1, len(logs))
            )
            shares.append(min(closed / num_batches, 1.0))
        return float(np.mean(shares))


def difference(one: dict[int, float], other: dict[int, float]) -> Comparison:
    """Compare two settings by the seeds that both have."""
    return compare(np.array([one[seed] - other[seed] for seed in one if seed in other]))


def percent(share: float | None) -> str:
    """Write a share."""
    return '' if share is None else f'{100 * share:.1f} %'


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


# ----------------------------------------------------------------------------------------- tables


def ordinary_table(grid: Grid) -> str:
    """Tell what a setting costs where no batch is condensed."""
    rows = []
    for setting in grid.settings:
        other = WITHOUT.get(setting, grid.study.baseline)
        versus = '' if setting == other else interval(grid.less(setting, other))
        worst = grid.worst_layer(setting)
        rows.append(
            [
                setting,
                grid.score(setting),
                versus and f'{versus} to {"BN" if other == grid.study.baseline else "off"}',
                percent(grid.closed(setting).get('mean')),
                f'{percent(worst[1])} ({worst[0]})' if worst else '',
            ]
        )
    return table(['norm', 'score', 'difference', 'gates closed', 'of the worst layer'], rows)


class Losses(NamedTuple):
    """What a stream costs a setting.

    Args:
        own (Comparison): Its score on ordinary batches less that on the stream.
        saved (Comparison): BN's loss less its own.
        share (float): Its mean loss over BN's.
    """

    own: Comparison
    saved: Comparison
    share: float


def losses(ordinary: Grid, stream: Grid, setting: str, suffix: str = '') -> Losses:
    """Compare what BN and a setting lose."""

    def lost(name: str) -> dict[int, float]:
        before, after = ordinary.scores[name], stream.scores[name + suffix]
        return {seed: before[seed] - after[seed] for seed in after if seed in before}

    own, bn = lost(setting), lost('BN')
    mean = float(np.mean(list(own.values())))
    return Losses(
        difference(own, dict.fromkeys(own, 0.0)),
        difference(bn, own),
        mean / float(np.mean(list(bn.values()))),
    )


def last_table(ordinary: Grid, last: Grid) -> str:
    """Tell what the last batches cost where they are condensed."""
    rows = []
    for setting in last.settings:
        if setting not in ordinary.scores:
            continue
        lost = losses(ordinary, last, setting)
        has_gate = bool(last.closed(setting)) and setting != OFF
        rows.append(
            [
                setting,
                last.score(setting),
                interval(lost.own),
                percent(lost.share) if setting != 'BN' else '',
                interval(lost.saved) if setting != 'BN' else '',
                percent(last.closed_at_the_end(setting, LAST)) if has_gate else '',
            ]
        )
    heads = ['norm', 'score', 'loss', "of BN's", "BN's less its own", 'gates closed of these']
    return table(heads, rows)


def fifth_table(fifth: Grid) -> str:
    """Tell what is left where a fifth of all batches is condensed."""
    rows = []
    for setting in fifth.settings:
        rows.append(
            [
                setting,
                fifth.score(setting),
                interval(fifth.less(setting, 'BN')) if setting != 'BN' else '',
                interval(fifth.less(setting, OFF)) if setting in WITHOUT else '',
                percent(fifth.closed(setting).get('mean')),
            ]
        )
    return table(['norm', 'score', 'less BN', 'less off', 'gates closed'], rows)


def small_table(grids: dict[int, Grid]) -> str:
    """Tell what the threshold does at small batches."""
    rows = []
    for size, grid in grids.items():
        suffix = f', last {LAST} condensed'
        lost = {s: losses(grid, grid, s, suffix) for s in ('BN', OFF, AUTO)}
        rows.append(
            [
                str(size),
                interval(grid.less(AUTO, OFF)),
                percent(grid.closed(AUTO)['mean']),
                percent(grid.worst_layer(AUTO)[1]),
                *(interval(lost[s].own) for s in ('BN', OFF, AUTO)),
                interval(lost[AUTO].saved),
                percent(grid.closed_at_the_end(AUTO + suffix, LAST)),
            ]
        )
    heads = ['batch', 'auto less off, ordinary', 'gates closed', 'of the worst layer']
    heads += ['loss of BN', 'of off', 'of auto', "BN's less auto's", 'gates closed of the last 10']
    return table(heads, rows)


def images_table(ordinary: Grid, one: Grid, more: Grid) -> str:
    """Tell of how many images a condensed batch can be to be noticed."""
    names = {'BN': 'BN', 'auto': 'BN, threshold auto', 'distance': 'BN, distance gate'}
    rows = []
    for images in (1, 2, 4):
        grid, suffix = (one, '') if images == 1 else (more, f', {images} images')
        lost = {k: losses(ordinary, grid, name, suffix) for k, name in names.items()}
        rows.append(
            [
                str(images),
                str(len(grid.scores['BN' + suffix])),
                *(interval(lost[k].own) for k in names),
                percent(grid.closed_at_the_end(names['auto'] + suffix, LAST)),
            ]
        )
    heads = ['images', 'seeds', 'loss of BN', 'with threshold auto', 'with the distance gate']
    return table([*heads, 'gates closed by auto'], rows)


def shift_table(shifts: dict[str, Grid]) -> str:
    """Tell whether the statistics follow a lasting shift."""
    rows = [
        [
            name,
            shift.score(OFF),
            shift.score(AUTO),
            interval(shift.less(AUTO, OFF)),
            percent(shift.closed(AUTO)['mean']),
            percent(shift.closed_at_the_end(AUTO, 100)),
        ]
        for name, shift in shifts.items()
    ]
    heads = ['every batch is of', 'off', 'auto', 'auto less off', 'gates closed']
    return table([*heads, 'of the last 100 batches'], rows)


def judge(grids: dict[str, Grid]) -> str:
    """Hold the measurements against the bars that were set before them."""
    rows = []

    def add(what: str, measured: str, bar: str, is_met: bool) -> None:
        rows.append([what, measured, bar, 'met' if is_met else '**missed**'])

    ordinary = {
        'CIFAR-10, 64': grids['cifar10_ordinary'],
        'CIFAR-10, 8': grids['cifar10_batch8'],
        'CIFAR-10, 4': grids['cifar10_batch4'],
        'Penn-Fudan, 4': grids['pennfudan_ordinary'],
    }
    for name, grid in ordinary.items():
        closed, cost = grid.closed(AUTO)['mean'], grid.less(AUTO, OFF)
        what = f'{name}, ordinary'
        add(f'{what}: gates closed', percent(closed), 'at most 1 %', closed <= 0.01)
        is_met = cost.low <= 0 <= cost.high
        half = (cost.high - cost.low) / 2
        add(f'{what}: less off', f'{interval(cost)}, ± {half:.1f}', 'contains 0', is_met)
    for name in ('cifar10', 'pennfudan'):
        lost = losses(grids[f'{name}_ordinary'], grids[f'{name}_condensed_last'], AUTO)
        title = 'CIFAR-10, 64' if name == 'cifar10' else 'Penn-Fudan, 4'
        what = f'{title}, last {LAST} condensed'
        add(f"{what}: of BN's loss", percent(lost.share), 'at most 25 %', lost.share <= 0.25)
        text = interval(lost.saved)
        add(f"{what}: BN's loss less its own", text, 'above 0', lost.saved.low > 0)
    fifth = grids['cifar10_condensed_fifth']
    off, bn = fifth.less(AUTO, OFF), fifth.less(AUTO, 'BN')
    what = 'CIFAR-10, 64, a fifth condensed'
    add(f'{what}: less off', interval(off), 'not below 0', off.high >= 0)
    add(f'{what}: less BN', interval(bn), 'above 0', bn.low > 0)
    for images, shift in shifts_of(grids).items():
        closed, cost = shift.closed_at_the_end(AUTO, 100), shift.less(AUTO, OFF)
        what = f'CIFAR-10, 64, from the middle on {images} a batch'
        text = percent(closed)
        add(f'{what}: gates closed of the last 100', text, 'at most 5 %', closed <= 0.05)
        add(f'{what}: less off', interval(cost), 'contains 0', cost.low <= 0 <= cost.high)
    return table(['', 'measured', 'bar', ''], rows)


def shifts_of(grids: dict[str, Grid]) -> dict[str, Grid]:
    """Return the grids of lasting shifts by what their batches are of."""
    return {'1 image': grids['cifar10_shift_one'], '4 images': grids['cifar10_shift']}


NAMES = {
    **dict.fromkeys(
        (
            *('cifar10_ordinary', 'cifar10_condensed_last', 'cifar10_condensed_fifth'),
            *('cifar10_condensed_images', 'cifar10_batch8', 'cifar10_batch4', 'cifar10_shift'),
            'cifar10_shift_one',
        ),
        ACCURACY,
    ),
    **dict.fromkeys(('pennfudan_ordinary', 'pennfudan_condensed_last'), METRICS),
}


def make_tables() -> dict[str, str]:
    """Return all tables of the page by the names of its parts."""
    grids = {name: Grid(name, metrics) for name, metrics in NAMES.items()}
    cifar10, last = grids['cifar10_ordinary'], grids['cifar10_condensed_last']
    return {
        'bars': judge(grids),
        'CIFAR-10, ordinary': ordinary_table(cifar10),
        'CIFAR-10, last': last_table(cifar10, last),
        'CIFAR-10, fifth': fifth_table(grids['cifar10_condensed_fifth']),
        'Penn-Fudan, ordinary': ordinary_table(grids['pennfudan_ordinary']),
        'Penn-Fudan, last': last_table(
            grids['pennfudan_ordinary'], grids['pennfudan_condensed_last']
        ),
        'small batches': small_table({8: grids['cifar10_batch8'], 4: grids['cifar10_batch4']}),
        'images': images_table(cifar10, last, grids['cifar10_condensed_images']),
        'shift': shift_table(shifts_of(grids)),
    }


# ---------------------------------------------------------------------------------------- picture


def draw(path: Path, out: Path, layers: tuple[str, ...]) -> None:
    """Draw scores, thresholds and the share of closed gates of some layers under AUTO.

    Args:
        path (Path): The ``..._condensation.csv`` of a study.
        out (Path): The picture.
        layers (tuple[str, ...]): Names of the layers, one for each row.
    """
    values: dict[str, dict[int, float]] = {}
    with path.open(newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            if row['setting'] == AUTO:
                values.setdefault(row['tag'], {})[int(row['step'])] = float(row['value'])
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(9, 2.2 * len(layers)), sharex=True, layout='constrained'
    )
    for ax, layer in zip(np.atleast_1d(axes), layers):
        score, threshold, share = (
            values[f'{tag}/{layer}']
            for tag in ('condensation', 'condensation_threshold', 'condensed_share')
        )
        steps = sorted(score)
        ax.plot(steps, [score[s] for s in steps], color='tab:blue', label='score')
        # What the score of the next batch is compared with.
        ax.plot(steps, [threshold[s] for s in steps], '--', color='tab:orange', label='threshold')
        ax.set(title=layer, ylabel='score')
        ax.grid(alpha=0.3)
        gates = ax.twinx()
        gates.fill_between(
            steps, [share[s] for s in steps], step='pre', color='tab:red', alpha=0.15
        )
        gates.set(ylim=(0, 1), ylabel='gates closed')
    np.atleast_1d(axes)[0].legend(loc='upper left', fontsize=8)
    np.atleast_1d(axes)[-1].set_xlabel('iteration')
    figure.savefig(out, dpi=80)
    plt.close(figure)


def rewrite(page: str) -> str:
    """Return a page with the tables of the rows that there are."""
    for name, text in make_tables().items():
        page = replace_part(page, name, text)
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--page', type=Path, default=PAGE, help='to be rewritten')
    args = parser.parse_args(argv)
    args.page.write_text(rewrite(args.page.read_text(encoding='utf-8')), encoding='utf-8')
    draw(
        STREAMS / 'cifar10_shift_one_condensation.csv',
        STREAMS / 'cifar10_shift_one.png',
        DRAWN_LAYERS,
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())

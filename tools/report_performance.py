"""Make the table, the picture and the verdict of what tools/benchmark_norm.py measured.

Prints every bar with its figure and writes the page and the picture beside the CSV file. Exits
with 1 where a bar is missed. Of every device and allocator setting only the last run counts.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

Row = dict[str, str]
METHODS = ('UBN', 'UBN, stage 1 on', 'UBN, kernel 1', 'UBN, kernel 5', 'GN', 'RBN', 'BNET-3')
MODES = ('forward', 'forward+backward', 'evaluation')


class Bar(NamedTuple):
    """Something that must not cost more than a limit.

    Args:
        what (str): In words.
        limit (float): At most this much.
        figure (Callable): Takes the rows of a run; returns the figure, None where it was not
            measured.
        device (str): Where it holds.
        allocator (str): With which setting of the allocator.
    """

    what: str
    limit: float
    figure: Callable[[list[Row]], float | None]
    device: str = 'cpu'
    allocator: str = 'default'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='what tools/benchmark_norm.py wrote')
    args = parser.parse_args()
    if not args.csv.exists():
        parser.error(f'{args.csv}: no such file')
    runs = read_runs(args.csv)
    if not runs:
        parser.error(f'{args.csv}: no rows')
    verdicts, is_missed = judge(runs)
    print('\n'.join(verdicts))
    page = args.csv.with_suffix('.md')
    picture = args.csv.with_suffix('.png')
    page.write_text(make_page(runs, verdicts, picture.name))
    draw(runs, picture)
    print(f'Wrote {page} and {picture}.')
    sys.exit(1 if is_missed else 0)


def read_runs(path: Path) -> dict[tuple[str, str], list[Row]]:
    """Read the rows of the last run of every suite, by device and allocator setting."""
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    last: dict[tuple[str, str, str], str] = {}
    for row in rows:
        key = (row['device'], row['allocator'], row['suite'])
        last[key] = max(last.get(key, ''), row['date'])
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        device, allocator = row['device'].split(':')[0], row['allocator']
        if row['date'] == last[row['device'], allocator, row['suite']]:
            runs.setdefault((device, allocator), []).append(row)
    return dict(sorted(runs.items()))


# --------------------------------------------------------------------------------------- figures


def ratios(
    rows: list[Row], method: str, mode: str, dtype: str = 'float32', suite: str = 'layer'
) -> dict[str, float]:
    """Return the ratio of medians to BN by case."""
    medians = {
        (row['method'], row['case']): float(row['median'])
        for row in rows
        if (row['suite'], row['mode'], row['dtype']) == (suite, mode, dtype)
        and row['memory_format'] == 'contiguous'
    }
    return {
        case: value / medians['BN', case]
        for (name, case), value in medians.items()
        if name == method
    }


def mean_ratio(method: str, mode: str, peer: str = 'BN') -> Callable[[list[Row]], float | None]:
    """Return what takes the geometric mean over the shapes of the ratio to a peer."""

    def figure(rows: list[Row]) -> float | None:
        mine, theirs = ratios(rows, method, mode), ratios(rows, peer, mode)
        return geometric_mean([mine[case] / theirs[case] for case in mine])

    return figure


def worst_ratio(
    method: str, mode: str, suite: str = 'layer', dtype: str = 'float32'
) -> Callable[[list[Row]], float | None]:
    """Return what takes the largest ratio to BN over the shapes."""
    return lambda rows: max(ratios(rows, method, mode, dtype, suite).values(), default=None)


def more_of(method: str, less: str, mode: str) -> Callable[[list[Row]], float | None]:
    """Return what takes by how much of BN one method takes longer than another, on average."""

    def figure(rows: list[Row]) -> float | None:
        mine, theirs = ratios(rows, method, mode), ratios(rows, less, mode)
        return float(np.mean([mine[case] - theirs[case] for case in mine])) if mine else None

    return figure


def geometric_mean(values: list[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def count_of(mode: str, unit: str) -> Callable[[list[Row]], float | None]:
    """Return what takes the largest count of SyncUBN's collectives or bytes over the ranks."""

    def figure(rows: list[Row]) -> float | None:
        counts = [
            float(row['median'])
            for row in rows
            if (row['suite'], row['mode'], row['unit']) == ('ranks', mode, unit)
            and row['case'] != 'ranks=1'
        ]
        return max(counts, default=None)

    return figure


# nn.SyncBatchNorm gathers mean, inverse deviation and count, and reduces two sums; the shape that
# the suite ranks takes has 256 channels in float32.
_SYNC_BN_FORWARD = 4 * (2 * 256 + 1)
_SYNC_BN_BACKWARD = 4 * 2 * 256

BARS = (
    Bar('forward + backward, geometric mean', 0.95, mean_ratio('UBN', MODES[1])),
    Bar(
        'forward + backward, pages kept, geometric mean',
        0.80,
        mean_ratio('UBN', MODES[1]),
        allocator='kept',
    ),
    Bar('forward + backward, worst shape', 1.30, worst_ratio('UBN', MODES[1])),
    Bar(
        'forward + backward, pages kept, worst shape',
        1.30,
        worst_ratio('UBN', MODES[1]),
        allocator='kept',
    ),
    Bar('stage 1 on, more than off', 0.06, more_of('UBN, stage 1 on', 'UBN', MODES[1])),
    Bar('evaluation, geometric mean', 1.15, mean_ratio('UBN', MODES[2])),
    Bar('evaluation, worst shape', 1.60, worst_ratio('UBN', MODES[2])),
    Bar('bytes kept for backward, worst shape', 1.01, worst_ratio('UBN', 'kept', 'memory')),
    Bar('Mask R-CNN training iteration', 1.00, worst_ratio('UBN', 'training iteration', 'model')),
    Bar('Mask R-CNN inference', 1.01, worst_ratio('UBN', 'inference', 'model')),
    Bar('SyncUBN, collectives forward', 1, count_of('forward', 'calls')),
    Bar('SyncUBN, collectives backward', 1, count_of('backward', 'calls')),
    Bar(
        'SyncUBN, bytes a rank forward: SyncBN and two numbers',
        _SYNC_BN_FORWARD + 8,
        count_of('forward', 'bytes'),
    ),
    Bar('SyncUBN, bytes a rank backward', _SYNC_BN_BACKWARD, count_of('backward', 'bytes')),
    Bar('GPU: forward + backward', 1.20, mean_ratio('UBN', MODES[1]), device='cuda'),
    Bar(
        'GPU: training iteration, float32',
        1.03,
        worst_ratio('UBN', 'training iteration', 'model'),
        device='cuda',
    ),
    Bar(
        'GPU: training iteration, bfloat16',
        1.03,
        worst_ratio('UBN', 'training iteration', 'model', 'bfloat16'),
        device='cuda',
    ),
)


def judge(runs: dict[tuple[str, str], list[Row]]) -> tuple[list[str], bool]:
    """Hold every bar against its figure.

    Returns:
        tuple[list[str], bool]: A Markdown table, and whether a bar is missed.
    """
    lines = [
        '| bar (x BN where nothing else is said) | at most | measured | |',
        '|---|---|---|---|',
    ]
    is_missed = False
    for bar in BARS:
        rows = runs.get((bar.device, bar.allocator), [])
        figure = bar.figure(rows)
        if figure is None:
            lines.append(f'| {bar.what} | {bar.limit:g} | - | not measured |')
            continue
        is_met = figure <= bar.limit
        is_missed |= not is_met
        number = f'{figure:.3f}' if bar.limit < 10 else f'{figure:g}'
        lines.append(
            f'| {bar.what} | {bar.limit:g} | {number} | {"met" if is_met else "MISSED"} |'
        )
    return lines, is_missed


# ------------------------------------------------------------------------------------------ page

INTRODUCTION = """# Performance

Regenerated by `make bench`, which runs `tools/benchmark_norm.py` and
`tools/report_performance.py`. All rows are in [performance.csv](performance.csv).

## What is measured

Everything that is compared runs **in one process, in turn, in a new order every round**;
absolute times of a shared machine mean little, so a figure is the **ratio of the medians** over
the rounds. A sample lasts at least 5 ms, by calls in a row. The rows also have the 20 % and 80 %
quantiles of the time and of the ratio within a round.

- **Shapes**: those that Mask R-CNN R50-FPN with norms in backbone, neck and heads feeds them
  with two images of 800 x 1333 (padded to 800 x 1344), 512 sampled RoIs an image for the box
  head and 128 for the mask head.
- **forward**: training mode, with a graph. **forward+backward**: training mode, gradients of the
  input and of all parameters. **evaluation**: evaluation mode without a graph. The rectifiers
  are not the identity.
- **UBN**: what `dict(type='UBN')` gives, with a neighbourhood of 3 x 3, all rectifiers and no
  threshold; all bars are held against it. **stage 1 on**: with a threshold of 0.6 that is looked
  at from the first batch on. **kernel 1**, **kernel 5**: without a neighbourhood, with a larger
  one. **RBN**: composed of operators as in its paper. **BNET-3**: BN, then PyTorch's depthwise
  3 x 3 convolution.
- **bytes kept**: what autograd's saved tensors occupy after a forward, every storage once.
- **training iteration**: loss, backward and optimizer step of the whole detector on random
  images, the same work every time.
- **allocator**: on CPU the allocator of the C library gives large memory back and takes it again
  page by page, which every norm pays for its output and its gradient. *default* is what a user
  has who sets nothing, and what the bars are held against; *kept* has `MALLOC_TRIM_THRESHOLD_`
  and `MALLOC_MMAP_THRESHOLD_` at 16 GiB, so that no page is given back and the kernels alone are
  seen.

## What limits it

On CPU a channel's planes are worked on while they are in a core's cache: moments and output in one
visit, all sums and the gradient of x in another. So memory sees a map read once and written once
in the forward, read twice and written once in the backward, whatever the neighbourhood; BN's own
kernels go over it two and three times. Where memory has to be taken anew for each output (the
default allocator, large maps), that takes most of the time of every norm, and ratios go to 1.

The neighbourhood is 9 multiplications for each value, three times in a training step. They hide
behind memory on large maps; in evaluation, where BN does nothing but read and write, they show on
maps that are in the cache already. Planes of 256 values and less are transposed, so that each lane
of a vector is a channel.

## Bars
"""


def make_page(runs: dict[tuple[str, str], list[Row]], verdicts: list[str], picture: str) -> str:
    """Return the page in Markdown."""
    parts = [INTRODUCTION, '\n'.join(verdicts), f'\n![Ratios to BN]({picture})']
    for (device, allocator), rows in runs.items():
        first = rows[0]
        parts.append(
            f'\n## {first["machine"]}, {device}, allocator {allocator}\n\n'
            f'torch {first["torch"]}, {first["threads"]} threads, commit {first["commit"]}, '
            f'{first["date"][:10]}.'
        )
        for mode in MODES:
            parts.append(ratio_table(rows, mode))
        parts.append(model_table(rows))
        parts.append(growth_table(rows))
        parts.append(ranks_table(rows))
    return '\n'.join(part for part in parts if part) + '\n'


def ratio_table(rows: list[Row], mode: str) -> str:
    """Return the ratios to BN of every shape."""
    columns = {method: ratios(rows, method, mode) for method in METHODS}
    base = {
        row['case']: float(row['median'])
        for row in rows
        if (row['suite'], row['mode'], row['method']) == ('layer', mode, 'BN')
        and (row['dtype'], row['memory_format']) == ('float32', 'contiguous')
    }
    if not base:
        return ''
    lines = [
        f'\n### {mode}, x BN\n',
        '| shape | BN, ms | ' + ' | '.join(METHODS) + ' |',
        '|---' * (len(METHODS) + 2) + '|',
    ]
    for case, milliseconds in base.items():
        cells = [f'{columns[m][case]:.2f}' if case in columns[m] else '-' for m in METHODS]
        lines.append(f'| {case} | {milliseconds:.2f} | ' + ' | '.join(cells) + ' |')
    means = [geometric_mean(list(columns[m].values())) for m in METHODS]
    cells = ['-' if mean is None else f'**{mean:.2f}**' for mean in means]
    lines.append('| **geometric mean** | | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def model_table(rows: list[Row]) -> str:
    """Return what the whole detector takes."""
    lines = []
    for row in rows:
        if row['suite'] == 'model':
            is_time = row['unit'] == 'ms'
            value = float(row['median']) / (1e3 if is_time else 2**30)
            lines.append(
                f'| {row["mode"]} | {row["case"]} | {row["dtype"]} | {row["method"]} | '
                f'{value:.3f} {"s" if is_time else "GiB"} | {float(row["ratio"]):.3f} | '
                f'{float(row["ratio_low"]):.3f} to {float(row["ratio_high"]):.3f} |'
            )
    if not lines:
        return ''
    head = (
        '\n### Mask R-CNN R50-FPN, norm in backbone, neck and heads\n\n'
        '| | images | type | norm | median | x BN, pairwise | 20 % to 80 % |\n'
        '|---|---|---|---|---|---|---|\n'
    )
    return head + '\n'.join(lines)


def growth_table(rows: list[Row]) -> str:
    """Return the fitted exponents of time against size, over the larger half of the sizes."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row['suite'] == 'growth':
            name, size = row['case'].split('=')
            size = float(size) ** 2 if name == 'side' else float(size)
            points.setdefault((name, row['method']), []).append((size, float(row['median'])))
    if not points:
        return ''
    methods = list(dict.fromkeys(method for _, method in points))
    lines = [
        '\n### Growth: e in time ~ size^e, forward + backward, larger half of the sizes\n',
        '| size | ' + ' | '.join(methods) + ' |',
        '|---' * (len(methods) + 1) + '|',
    ]
    for name in dict.fromkeys(name for name, _ in points):
        cells = [f'{exponent(points[name, method]):.2f}' for method in methods]
        label = 'H x W' if name == 'side' else name
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def exponent(points: list[tuple[float, float]]) -> float:
    """Fit the slope of log time against log size over the larger half of the sizes."""
    sizes, times = np.log(sorted(points)[len(points) // 2 :]).T
    return float(np.polyfit(sizes, times, 1)[0])


def ranks_table(rows: list[Row]) -> str:
    """Return what SyncUBN adds to UBN on as many processes."""
    lines = [
        f'| {row["case"].split("=")[1]} | {row["method"]} | {float(row["median"]):.2f} | '
        f'{float(row["ratio"]):.2f} |'
        for row in rows
        if row['suite'] == 'ranks' and row['mode'] == 'forward+backward'
    ]
    if not lines:
        return ''
    head = (
        '\n### Processes, one thread each, 2x256x50x84 a rank, forward + backward\n\n'
        '| ranks | norm | ms | x UBN, pairwise |\n|---|---|---|---|\n'
    )
    return head + '\n'.join(lines)


def draw(runs: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """Draw the ratios to BN of every shape, one row of axes a run."""
    figure, grid = plt.subplots(
        len(runs), len(MODES), figsize=(16, 5.5 * len(runs)), squeeze=False, layout='constrained'
    )
    for axes, ((device, allocator), rows) in zip(grid, runs.items()):
        for ax, mode in zip(axes, MODES):
            for index, method in enumerate(METHODS):
                values = ratios(rows, method, mode)
                style = 'o-' if method.startswith('UBN') else 's--'
                ax.plot(values.values(), list(values), style, color=f'C{index}', label=method)
            ax.axvline(1, color='black', linewidth=1)
            ax.set_xscale('log')
            ax.set_xticks([0.5, 1, 2, 4, 8], labels=['0.5', '1', '2', '4', '8'])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.invert_yaxis()
            ax.set_title(f'{mode}: {device}, allocator {allocator}')
            ax.set_xlabel('time, x BN')
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == '__main__':
    main()

"""Make the tables, the picture and the verdict of what benchmarks/benchmark_norm.py measured.

Prints every bar with its figure, draws the picture beside the CSV file, and writes the tables into
the page beside it, between two markers; what the page says in words stays. Exits with 1 where a
bar is missed. Of every device and allocator setting only the last run of a suite counts.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from pages import replace_part

Row = dict[str, str]
METHODS = (
    *('UBN', 'UBN, stage 1 on', 'UBN, kernel 1', 'UBN, kernel 5', 'UBN, operators'),
    *('GN', 'RBN', 'BNET-3'),
)
DETECTORS = dict(model='Mask R-CNN R50-FPN', study='small Mask R-CNN of the study')
MODES = ('forward', 'forward+backward', 'evaluation')
# Of the features; where nothing is said, float32 and contiguous.
VARIANTS = tuple(
    (dtype, memory_format)
    for dtype in ('float32', 'bfloat16', 'float16')
    for memory_format in ('contiguous', 'channels_last')
)
# Of the page, that the figures are written to.
PART = 'benchmarks/report_performance.py'


class Figure(NamedTuple):
    """What is held against a bar.

    Args:
        value (float): The figure.
        worst (str): The worst single case behind it, in words; nothing where there is only one.
    """

    value: float
    worst: str = ''


class Bar(NamedTuple):
    """Something that must not cost more than a limit, or must reach one.

    Args:
        what (str): In words.
        limits (dict[str, float]): By the setting of the allocator that it holds with.
        figure (Callable): Takes the rows of a run; returns the figure, None where it was not
            measured.
        device (str): Where it holds.
        is_least (bool): Whether the limit is to be reached.
    """

    what: str
    limits: dict[str, float]
    figure: Callable[[list[Row]], Figure | None]
    device: str = 'cpu'
    is_least: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='what benchmarks/benchmark_norm.py wrote')
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
    draw(runs, picture)
    text = (
        page.read_text()
        if page.exists()
        else f'# Performance\n\n<!-- begin: {PART} -->\n<!-- end -->\n'
    )
    page.write_text(replace_figures(text, make_figures(runs, picture.name)))
    print(f'Wrote {page} and {picture}.')
    sys.exit(1 if is_missed else 0)


def read_runs(path: Path) -> dict[tuple[str, str], list[Row]]:
    """Read the rows of the last run of every suite, by device and allocator; none of no file."""
    if not path.exists():
        return {}
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
    rows: list[Row],
    method: str,
    mode: str,
    suite: str = 'layer',
    dtype: str = 'float32',
    memory_format: str = 'contiguous',
) -> dict[str, float]:
    """Return the ratio of medians to BN by case."""
    what = dict(suite=suite, mode=mode, dtype=dtype, memory_format=memory_format)
    medians = {
        (row['method'], row['case']): float(row['median'])
        for row in rows
        if all(row[key] == value for key, value in what.items())
    }
    return {
        case: value / medians['BN', case]
        for (name, case), value in medians.items()
        if name == method
    }


def mean_ratio(mode: str, **variant: str) -> Callable[[list[Row]], Figure | None]:
    """Return what takes the geometric mean over the shapes of UBN's ratio to BN."""

    def figure(rows: list[Row]) -> Figure | None:
        by_case = ratios(rows, 'UBN', mode, **variant)
        return Figure(geometric_mean(by_case.values()), worst_of(by_case)) if by_case else None

    return figure


def worst_ratio(mode: str, suite: str = 'layer', **variant: str) -> Callable:
    """Return what takes the largest ratio of UBN to BN over the cases."""

    def figure(rows: list[Row]) -> Figure | None:
        by_case = ratios(rows, 'UBN', mode, suite, **variant)
        return Figure(max(by_case.values()), worst_of(by_case)) if by_case else None

    return figure


def cost_of_stage_1(rows: list[Row]) -> Figure | None:
    """Return by how much of BN stage 1 makes UBN take longer, on average over the shapes."""
    on, off = (ratios(rows, name, MODES[1]) for name in ('UBN, stage 1 on', 'UBN'))
    more = {case: on[case] - off[case] for case in on}
    return Figure(float(np.mean([*more.values()])), worst_of(more)) if more else None


def least_share(mode: str) -> Callable[[list[Row]], Figure | None]:
    """Return what takes the least share of the copy bandwidth that UBN reaches on a map."""

    def figure(rows: list[Row]) -> Figure | None:
        shares = {case: rates['UBN'] / rates['copy'] for case, rates in rates_of(rows, mode)}
        return Figure(min(shares.values()), worst_of(shares, min)) if shares else None

    return figure


def rates_of(rows: list[Row], mode: str) -> list[tuple[str, dict[str, float]]]:
    """Return by map what the copy and the norms move: GB/s, and the bytes as ``limit``."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row['suite'], row['mode']) == ('bandwidth', mode):
            found.setdefault(row['case'], {})[row['method']] = float(row['median'])
    return list(found.items())


def worst_of(by_case: dict[str, float], choose: Callable = max) -> str:
    """Say which case is the worst, and how bad it is."""
    case = choose(by_case, key=by_case.get)
    return f'{by_case[case]:.2f}, {case}'


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def count_of(mode: str, unit: str) -> Callable[[list[Row]], Figure | None]:
    """Return what takes the largest count of SyncUBN's collectives or bytes over the ranks."""

    def figure(rows: list[Row]) -> Figure | None:
        counts = [
            float(row['median'])
            for row in rows
            if (row['suite'], row['mode'], row['unit']) == ('ranks', mode, unit)
            and row['case'] != 'ranks=1'
        ]
        return Figure(max(counts)) if counts else None

    return figure


# nn.SyncBatchNorm gathers mean, inverse deviation and count, and reduces two sums; the shape that
# the suite ranks takes has 256 channels in float32.
_SYNC_BN_FORWARD = 4 * (2 * 256 + 1)
_SYNC_BN_BACKWARD = 4 * 2 * 256


def in_both(limit: float) -> dict[str, float]:
    """Return a limit that holds with either setting of the allocator."""
    return dict(default=limit, kept=limit)


def by_default(limit: float) -> dict[str, float]:
    """Return a limit that holds where nothing is set."""
    return dict(default=limit)


BARS = (
    Bar('forward + backward, geometric mean', dict(default=0.95, kept=0.80), mean_ratio(MODES[1])),
    Bar('forward + backward, worst shape', in_both(1.30), worst_ratio(MODES[1])),
    Bar('stage 1 on, more than off', in_both(0.06), cost_of_stage_1),
    Bar('evaluation, geometric mean', in_both(1.15), mean_ratio(MODES[2])),
    Bar('evaluation, worst shape', in_both(1.60), worst_ratio(MODES[2])),
    Bar(
        'channels_last, forward + backward, geometric mean',
        in_both(1.10),
        mean_ratio(MODES[1], memory_format='channels_last'),
    ),
    Bar(
        'bfloat16, forward + backward, geometric mean',
        in_both(1.00),
        mean_ratio(MODES[1], dtype='bfloat16'),
    ),
    Bar(
        'Mask R-CNN training iteration',
        by_default(1.00),
        worst_ratio('training iteration', 'model'),
    ),
    Bar('Mask R-CNN inference', by_default(1.01), worst_ratio('inference', 'model')),
    Bar(
        "the study's small Mask R-CNN, training iteration",
        by_default(1.02),
        worst_ratio('training iteration', 'study'),
    ),
    Bar('bytes kept for backward, worst shape', by_default(1.01), worst_ratio('kept', 'memory')),
    *(
        Bar(
            f'largest maps, {mode}: share of the copy bandwidth',
            dict(kept=0.80),
            least_share(mode),
            is_least=True,
        )
        for mode in MODES[1:]
    ),
    Bar('SyncUBN, collectives forward', by_default(1), count_of('forward', 'calls')),
    Bar('SyncUBN, collectives backward', by_default(1), count_of('backward', 'calls')),
    Bar(
        'SyncUBN, bytes a rank forward: SyncBN and two numbers',
        by_default(_SYNC_BN_FORWARD + 8),
        count_of('forward', 'bytes'),
    ),
    Bar(
        'SyncUBN, bytes a rank backward',
        by_default(_SYNC_BN_BACKWARD),
        count_of('backward', 'bytes'),
    ),
    Bar(
        'GPU: forward + backward, geometric mean',
        by_default(1.20),
        mean_ratio(MODES[1]),
        device='cuda',
    ),
    *(
        Bar(
            f'GPU: training iteration, {dtype}',
            by_default(1.03),
            worst_ratio('training iteration', 'model', dtype=dtype),
            device='cuda',
        )
        for dtype in ('float32', 'bfloat16')
    ),
)


def judge(runs: dict[tuple[str, str], list[Row]]) -> tuple[list[str], bool]:
    """Hold every bar against its figure.

    Returns:
        tuple[list[str], bool]: A Markdown table, and whether a bar is missed.
    """
    lines = [
        '| bar (x BN where nothing else is said) | allocator | limit | measured | worst | |',
        '|---|---|---|---|---|---|',
    ]
    is_missed = False
    for bar in BARS:
        for allocator, limit in bar.limits.items():
            figure = bar.figure(runs.get((bar.device, allocator), []))
            limited = f'at {"least" if bar.is_least else "most"} {limit:g}'
            cells = [bar.what, allocator if bar.device == 'cpu' else '-', limited]
            if figure is None:
                cells += ['-', '-', 'not measured']
            else:
                value, worst = figure
                is_met = value >= limit if bar.is_least else value <= limit
                is_missed |= not is_met
                cells.append(f'{value:.3f}' if limit < 10 else f'{value:g}')
                cells += [worst or '-', 'met' if is_met else '**MISSED**']
            lines.append(f'| {" | ".join(cells)} |')
    return lines, is_missed


# ------------------------------------------------------------------------------------------ page


def replace_figures(page: str, figures: str) -> str:
    """Return a page with other figures between its markers."""
    try:
        return replace_part(page, PART, figures.strip('\n'))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def make_figures(runs: dict[tuple[str, str], list[Row]], picture: str) -> str:
    """Return all tables in Markdown, and the picture where anything was measured."""
    parts = ['## Bars\n', '\n'.join(judge(runs)[0])]
    if runs:
        parts.append(f'\n![Ratios to BN]({picture})')
    for (device, allocator), rows in runs.items():
        first = rows[0]
        parts.append(
            f'\n## {first["machine"]}, {device}, allocator {allocator}\n\n'
            f'torch {first["torch"]}, {first["threads"]} threads, commit {first["commit"]}, '
            f'{first["date"][:10]}.'
        )
        parts.append(bandwidth_table(rows))
        for mode in MODES:
            parts.append(ratio_table(rows, mode))
        parts.append(variants_table(rows))
        parts.append(model_table(rows))
        parts.append(growth_table(rows))
        parts.append(ranks_table(rows))
    return '\n'.join(part for part in parts if part) + '\n'


def bandwidth_table(rows: list[Row]) -> str:
    """Return what the largest maps have to move, and how fast the norms move it."""
    lines = []
    for mode in MODES[1:]:
        for case, rates in rates_of(rows, mode):
            limit = 1e-6 * rates['limit'] / rates['copy']
            cells = [case, mode, f'{rates["limit"] / 2**20:.1f}', f'{rates["copy"]:.1f}']
            cells.append(f'{limit:.2f}')
            for method in ('BN', 'UBN'):
                cells.append(f'{limit * rates["copy"] / rates[method]:.2f}')
                cells.append(f'{rates[method] / rates["copy"]:.2f}')
            lines.append(f'| {" | ".join(cells)} |')
    if not lines:
        return ''
    head = (
        '\n### Largest maps against the limit of memory\n\n'
        '| map | mode | MiB that must move | copy, GB/s | limit, ms | BN, ms | share of the limit '
        '| UBN, ms | share of the limit |\n'
        '|---|---|---|---|---|---|---|---|---|\n'
    )
    return head + '\n'.join(lines)


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
    means = [geometric_mean(columns[m].values()) for m in METHODS]
    cells = ['-' if mean is None else f'**{mean:.2f}**' for mean in means]
    lines.append('| **geometric mean** | | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def variants_table(rows: list[Row]) -> str:
    """Return UBN's ratios to BN on features of every type and layout."""
    columns = {
        (mode, *variant): ratios(rows, 'UBN', mode, 'layer', *variant)
        for variant in VARIANTS
        for mode in MODES[1:]
    }
    columns = {key: by_case for key, by_case in columns.items() if by_case}
    if len(columns) <= len(MODES[1:]):
        return ''
    names = [f'{mode}, {dtype}, {layout}' for mode, dtype, layout in columns]
    lines = [
        '\n### UBN by type and layout, x BN of the same\n',
        '| shape | ' + ' | '.join(names) + ' |',
        '|---' * (len(names) + 1) + '|',
    ]
    for case in next(iter(columns.values())):
        cells = [f'{by_case[case]:.2f}' for by_case in columns.values()]
        lines.append(f'| {case} | ' + ' | '.join(cells) + ' |')
    means = [f'**{geometric_mean(by_case.values()):.2f}**' for by_case in columns.values()]
    lines.append('| **geometric mean** | ' + ' | '.join(means) + ' |')
    return '\n'.join(lines)


def model_table(rows: list[Row]) -> str:
    """Return what the whole detector takes."""
    lines = []
    for row in rows:
        if row['suite'] in DETECTORS:
            is_time = row['unit'] == 'ms'
            value = float(row['median']) / (1e3 if is_time else 2**30)
            lines.append(
                f'| {DETECTORS[row["suite"]]}, {row["mode"]} | {row["case"]} | {row["dtype"]} | '
                f'{row["method"]} | '
                f'{value:.3f} {"s" if is_time else "GiB"} | {float(row["ratio"]):.3f} | '
                f'{float(row["ratio_low"]):.3f} to {float(row["ratio_high"]):.3f} |'
            )
    if not lines:
        return ''
    head = (
        '\n### Detectors with the norm in backbone, neck and heads\n\n'
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

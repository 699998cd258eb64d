"""COCO box and mask mAP of one run, or of two side by side, from their result files.

The result files are those that mmdet's ``CocoMetric`` writes when it is given an
``outfile_prefix``: ``PREFIX.bbox.json`` and ``PREFIX.segm.json``. pycocotools evaluates them,
with the settings of ``CocoMetric``, so that each figure equals the one ``tools/test.py`` prints:

- at most 100, 300 and 1000 detections per image, in place of COCO's 1, 10 and 100: ``mAP``
  counts the first 100 of an image, ``AR@N`` the first N, everything else, per-class AP
  included, the first 1000;
- a detection's mask, not its box, decides whether it is small, medium or large in ``segm``;
- the classes are all categories of the annotation file (a dataset configured with a subset of
  them has to be evaluated against an annotation file with that subset).

Figures are shown with three digits, as mmdet does, and written to JSON in full. A figure that
is undefined, because no ground truth belongs to it, is shown as ``-`` and written as null.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# Not from the package, which needs torch and mmengine: results are compared without them.
sys.path.append(str(Path(__file__).resolve().parents[1] / 'ubn_det/datasets'))

from annotations import (  # noqa: E402
    InputError,
    box_fault,
    is_number,
    lacking_key_fault,
    load_annotations,
    load_json,
    reference_fault,
    rle_fault,
)

METRICS = ('bbox', 'segm')
MAX_DETS = (100, 300, 1000)
STAT_NAMES = (
    'mAP',
    'mAP_50',
    'mAP_75',
    'mAP_s',
    'mAP_m',
    'mAP_l',
    'AR@100',
    'AR@300',
    'AR@1000',
    'AR_s@1000',
    'AR_m@1000',
    'AR_l@1000',
)
CLASS_STAT_NAMES = STAT_NAMES[:6]


def find_results(result: str, metrics: Sequence[str] | None) -> dict[str, str]:
    """Finds the result files of a run.

    Args:
        result: A prefix, as in ``PREFIX.bbox.json``, or one file, whose name ends in ``.json``.
        metrics: What to evaluate; None for what there is.

    Returns:
        The file of each metric. A file asked for by name need not exist.

    Raises:
        InputError: If nothing was asked for by name and nothing is found.
    """
    if result.endswith('.json'):
        metrics = metrics or [metric for metric in METRICS if result.endswith(f'.{metric}.json')]
        if not metrics:
            raise InputError(
                f'{result}: the name ends neither in .bbox.json nor in .segm.json, '
                'so --metric has to say what it holds'
            )
        return dict.fromkeys(metrics, result)

    files = {metric: f'{result}.{metric}.json' for metric in metrics or METRICS}
    if metrics is None:
        files = {metric: file for metric, file in files.items() if Path(file).exists()}
        if not files:
            raise InputError(f'{result}: neither {result}.bbox.json nor {result}.segm.json exists')
    return files


def detection_fault(detection: Any, metric: str, ground_truth: COCO) -> str | None:
    """What is wrong with an entry of a result file.

    Args:
        detection: The entry.
        metric: ``bbox`` or ``segm``.
        ground_truth: The annotation file.

    Returns:
        The fault, or None.
    """
    shape = 'bbox' if metric == 'bbox' else 'segmentation'
    fault = lacking_key_fault(detection, ('image_id', 'category_id', 'score', shape))
    fault = fault or reference_fault(detection, ground_truth)
    if fault:
        return fault
    if not is_number(detection['score']):
        return f'score {detection["score"]!r} is not a finite number'
    if metric == 'bbox':
        return box_fault(detection['bbox'])
    image = ground_truth.imgs[detection['image_id']]
    return rle_fault(detection['segmentation'], image, compressed=True)


def load_detections(path: str, metric: str, ground_truth: COCO) -> list[dict[str, Any]]:
    """Reads and checks a result file.

    Args:
        path: The file.
        metric: ``bbox`` or ``segm``.
        ground_truth: The annotation file.

    Returns:
        The detections, with what the metric needs and nothing else. Boxes of ``segm`` results
        are left out as in mmdet, since pycocotools would take the area from them.

    Raises:
        InputError: If the file cannot be evaluated; names it and the entry at fault.
    """
    entries = load_json(path)
    if not isinstance(entries, list):
        raise InputError(f'{path}: is a {type(entries).__name__}, not a list of detections')
    for index, entry in enumerate(entries):
        fault = detection_fault(entry, metric, ground_truth)
        if fault:
            raise InputError(f'{path}: entry {index}: {fault}')
    keys = ('image_id', 'category_id', 'score', 'bbox' if metric == 'bbox' else 'segmentation')
    return [{key: entry[key] for key in keys} for entry in entries]


def run_coco_eval(ground_truth: COCO, detections: list[dict[str, Any]], metric: str) -> COCOeval:
    """Runs COCOeval with the settings of mmdet's ``CocoMetric`` and without its printing.

    Args:
        ground_truth: The annotation file.
        detections: The detections; pycocotools adds its own keys to them.
        metric: ``bbox`` or ``segm``.

    Returns:
        The finished evaluation.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            found = ground_truth.loadRes(detections)
        else:
            # loadRes reads the kind of results from the first one, so it fails without any.
            found = COCO()
            found.dataset = {**ground_truth.dataset, 'annotations': []}
            found.createIndex()
        evaluation = COCOeval(ground_truth, found, metric)
        evaluation.params.maxDets = list(MAX_DETS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def mean_defined(values: np.ndarray) -> float | None:
    """The mean of the values that are defined, which COCOeval's -1 are not; None without any."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def summary(evaluation: COCOeval) -> dict[str, float | None]:
    """The twelve figures of an evaluation by their names in mmdet, ``bbox_mAP`` for one."""
    metric = evaluation.params.iouType
    return {
        f'{metric}_{name}': None if value == -1 else float(value)
        for name, value in zip(STAT_NAMES, evaluation.stats)
    }


def per_class(evaluation: COCOeval) -> dict[str, dict[str, float | None]]:
    """The AP figures of each class, computed as mmdet's ``CocoMetric(classwise=True)`` does.

    Args:
        evaluation: The finished evaluation.

    Returns:
        By the name of the category, for those that occur in the annotations, in the order of
        their ids, the first six figures.
    """
    ground_truth = evaluation.cocoGt
    occurring = {annotation['category_id'] for annotation in ground_truth.anns.values()}
    # (IoU threshold, recall, category, area range, detections per image)
    precision = evaluation.eval['precision'][..., -1]
    figures = {}
    for index, category_id in enumerate(evaluation.params.catIds):
        if category_id not in occurring:
            continue
        of_class = precision[:, :, index]
        # IoU thresholds run from 0.5 in steps of 0.05; area ranges are all, small, medium, large.
        parts = (
            of_class[..., 0],
            of_class[0, :, 0],
            of_class[5, :, 0],
            of_class[..., 1],
            of_class[..., 2],
            of_class[..., 3],
        )
        name = ground_truth.cats[category_id]['name']
        figures[name] = dict(zip(CLASS_STAT_NAMES, map(mean_defined, parts)))
    return figures


def subtract(
    first: Mapping[str, float | None], second: Mapping[str, float | None]
) -> dict[str, float | None]:
    """First minus second, key by key; None where either has no figure."""
    difference = {}
    for key in {**first, **second}:
        pair = first.get(key), second.get(key)
        difference[key] = None if None in pair else pair[0] - pair[1]
    return difference


def evaluate_runs(
    ann_file: str, runs: Mapping[str, Mapping[str, str]], classwise: bool = False
) -> dict[str, Any]:
    """Evaluates one run, or two against the same annotations.

    Args:
        ann_file: The annotation file.
        runs: The result file of each metric, by the name of the run.
        classwise: Whether to add per-class figures.

    Returns:
        What the JSON file holds: ``annotations`` (the file and its counts), ``max_dets``,
        ``runs`` (by name: ``files``, ``detections``, ``metrics`` and, if asked for,
        ``classwise``), ``difference`` of two runs, first minus second (``metrics``,
        ``classwise``), and ``notes`` on what a reader should know of the figures.

    Raises:
        InputError: If a file cannot be evaluated.
    """
    metrics = [metric for metric in METRICS if any(metric in files for files in runs.values())]
    ground_truth = load_annotations(ann_file, masks='segm' in metrics)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
    # Everything is read before anything is evaluated: a fault shows in seconds, not in minutes.
    detections = {
        name: {
            metric: load_detections(files[metric], metric, ground_truth)
            for metric in metrics
            if metric in files
        }
        for name, files in runs.items()
    }

    report: dict[str, Any] = {
        'annotations': {
            'file': ann_file,
            'images': len(ground_truth.imgs),
            'annotations': len(ground_truth.anns),
            'categories': len(ground_truth.cats),
        },
        'max_dets': list(MAX_DETS),
        'runs': {},
        'notes': [],
    }
    for name, files in runs.items():
        run: dict[str, Any] = {'files': dict(files), 'detections': {}, 'metrics': {}}
        if classwise:
            run['classwise'] = {}
        for metric in metrics:
            if metric not in files:
                report['notes'].append(f'{name} has no {metric} results')
                continue
            found = detections[name][metric]
            run['detections'][metric] = len(found)
            if not found:
                report['notes'].append(
                    f'{name}: {files[metric]} holds no detections, so its defined figures are 0'
                )
            evaluation = run_coco_eval(ground_truth, found, metric)
            run['metrics'].update(summary(evaluation))
            if classwise:
                run['classwise'][metric] = per_class(evaluation)
        report['runs'][name] = run

    if len(runs) == 2:
        first, second = report['runs'].values()
        report['difference'] = {'metrics': subtract(first['metrics'], second['metrics'])}
        if classwise:
            report['difference']['classwise'] = {
                metric: {
                    category: subtract(figures, second['classwise'][metric][category])
                    for category, figures in of_classes.items()
                }
                for metric, of_classes in first['classwise'].items()
                if metric in second['classwise']
            }
    return report


def format_figure(value: float | None, signed: bool = False) -> str:
    """A figure with three digits; ``-`` for None."""
    if value is None:
        return '-'
    # numpy rounds halves as mmdet does, where Python would not; the zero added drops its sign.
    rounded = np.round(value, 3) + 0.0
    return f'{rounded:+.3f}' if signed else f'{rounded:.3f}'


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of cells, the header first: the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, '-' * len(lines[0]))
    return '\n'.join(lines)


def format_report(report: Mapping[str, Any]) -> str:
    """Formats the outcome of an evaluation for reading.

    Args:
        report: What :func:`evaluate_runs` returned.

    Returns:
        The table of all runs, their difference and the notes. Per-class figures follow in one
        table per metric: all six of one run, or the mAP of two and its difference.
    """
    counts = report['annotations']
    runs = report['runs']
    names = list(runs)
    two = len(names) == 2
    header = [*names, ' - '.join(names)] if two else names

    rows = [['metric', *header]]
    figures = {key for run in runs.values() for key in run['metrics']}
    for key in (f'{metric}_{name}' for metric in METRICS for name in STAT_NAMES):
        if key in figures:
            row = [key, *(format_figure(run['metrics'].get(key)) for run in runs.values())]
            if two:
                row.append(format_figure(report['difference']['metrics'][key], signed=True))
            rows.append(row)
    parts = [
        f'{counts["file"]}: {counts["images"]} images, {counts["annotations"]} annotations, '
        f'{counts["categories"]} categories',
        format_table(rows),
    ]

    for metric in METRICS:
        tables = [run.get('classwise', {}).get(metric, {}) for run in runs.values()]
        categories = list({category: None for table in tables for category in table})
        if not categories:
            continue
        if two:
            rows = [[f'{metric}_mAP of', *header]]
            differences = report['difference']['classwise'].get(metric, {})
            for category in categories:
                cells = [format_figure(table.get(category, {}).get('mAP')) for table in tables]
                change = differences.get(category, {}).get('mAP')
                rows.append([category, *cells, format_figure(change, signed=True)])
        else:
            rows = [[f'{metric} of', *CLASS_STAT_NAMES]]
            for category in categories:
                rows.append([category, *map(format_figure, tables[0][category].values())])
        parts.append(format_table(rows))
        if len(categories) < counts['categories']:
            parts.append(
                'Not listed, since without annotations: '
                f'{counts["categories"] - len(categories)} of {counts["categories"]} categories'
            )

    parts.extend(f'Note: {note}.' for note in report['notes'])
    return '\n\n'.join(parts)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate result files of mmdet's CocoMetric: COCO box and mask mAP of one "
        'run, or of two side by side'
    )
    parser.add_argument('ann', help='annotation file in COCO format')
    parser.add_argument(
        'result',
        help='results of the run: the prefix of PREFIX.bbox.json and PREFIX.segm.json, or one '
        '.json file',
    )
    parser.add_argument('result_b', nargs='?', help='results of a second run to compare with')
    parser.add_argument(
        '--metric',
        nargs='+',
        choices=METRICS,
        help='what to evaluate; by default the result files that exist, or what the name of a '
        'single file says',
    )
    parser.add_argument('--classwise', action='store_true', help='add per-class AP')
    parser.add_argument('--out', help='file to write all figures to as JSON')
    parser.add_argument(
        '--names',
        nargs='+',
        help='names of the runs in the output, as many as runs; by default what was given as '
        'their results',
    )
    return parser.parse_args(argv)


def run_tool(args: argparse.Namespace) -> None:
    """Evaluates, prints the tables and writes the JSON file.

    Args:
        args: The parsed command line.

    Raises:
        InputError: If an argument or a file cannot be used.
    """
    results = [args.result] if args.result_b is None else [args.result, args.result_b]
    names = args.names or results
    if len(names) != len(results):
        raise InputError(f'--names: {len(names)} given for {len(results)} results')
    if len(set(names)) != len(names):
        raise InputError(f'{names[0]}: two runs of one name; --names tells them apart')
    runs = {name: find_results(result, args.metric) for name, result in zip(names, results)}
    if args.out:
        inputs = [args.ann, *(file for files in runs.values() for file in files.values())]
        if Path(args.out).resolve() in [Path(file).resolve() for file in inputs]:
            raise InputError(f'{args.out}: --out would overwrite an input')
        if not Path(args.out).resolve().parent.is_dir():
            raise InputError(f'{args.out}: --out is in a folder that does not exist')

    report = evaluate_runs(args.ann, runs, args.classwise)
    print(format_report(report))
    if args.out:
        try:
            with open(args.out, 'w', encoding='utf-8') as file:
                json.dump(report, file, indent=2, allow_nan=False)
                file.write('\n')
        except OSError as error:
            raise InputError(f'{args.out}: {error.strerror}') from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool.

    Args:
        argv: The arguments; those of the command line by default.

    Returns:
        The exit code: 0, or 2 after an error, which is one line on stderr.
    """
    args = parse_args(argv)
    try:
        run_tool(args)
    except InputError as error:
        print(f'eval_coco.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Tier 3: pictures of a training run; the only module of the package that needs matplotlib."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

METRICS = ('coco/bbox_mAP', 'coco/segm_mAP')
# Tag, title, colour map and its lower end.
HEATMAPS = (
    ('condensation', 'condensation score of the last batch', 'viridis', -0.2),
    ('condensation_threshold', 'threshold of the score', 'viridis', -0.2),
    ('condensed_share', 'share of batches with a closed gate', 'magma', 0.0),
)


def read_scalars(work_dir: Path) -> dict[int, dict[str, float]]:
    """Read what the visualizer wrote in all runs of a work folder.

    Returns:
        dict[int, dict[str, float]]: Scalars by step. A resumed run wins over the one before.

    Raises:
        FileNotFoundError: The folder holds no scalars.json.
    """
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir}: no */vis_data/scalars.json, so nothing to plot')
    steps: dict[int, dict[str, float]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            scalars = json.loads(line)
            steps.setdefault(int(scalars.pop('step')), {}).update(scalars)
    return dict(sorted(steps.items()))


def plot_training(work_dir: Path, out: Path) -> None:
    """Draw the picture of a run, from the scalars in its work folder, to an image file."""
    steps = read_scalars(work_dir)
    prefixes = tuple(f'{name}/' for name, *_ in HEATMAPS)
    layers = list(
        dict.fromkeys(
            tag.split('/', 1)[1]
            for scalars in steps.values()
            for tag in scalars
            if tag.startswith(prefixes) and not tag.endswith(('/mean', '/max'))
        )
    )
    height = max(7.0, 1.5 + 0.17 * len(layers))
    figure = plt.figure(figsize=(21, height), layout='constrained')
    grid = figure.add_gridspec(3, 4, width_ratios=(1, 1.25, 1, 1))
    _plot_curves(figure.add_subplot(grid[0, 0]), steps, ('loss',), 'training loss')
    _plot_curves(figure.add_subplot(grid[1, 0]), steps, METRICS, 'COCO mAP on held-out images')
    _plot_curves(
        figure.add_subplot(grid[2, 0]),
        steps,
        (
            *('condensation/mean', 'condensation/max'),
            *('condensation_threshold/mean', 'condensed_share/mean'),
        ),
        'over all layers',
    )
    for column, (tag, title, colours, low) in enumerate(HEATMAPS, start=1):
        values = {
            step: {
                layer: scalars[f'{tag}/{layer}'] for layer in layers if f'{tag}/{layer}' in scalars
            }
            for step, scalars in steps.items()
            if f'{tag}/mean' in scalars
        }
        draw_heatmap(
            figure.add_subplot(grid[:, column]),
            values,
            layers,
            title,
            colours,
            low,
            fontsize=7 if column == 1 else 0,
            location='bottom',
            shrink=0.8,
            pad=0.01,
        )
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _plot_curves(
    axes: Axes, steps: dict[int, dict[str, float]], tags: tuple[str, ...], title: str
) -> None:
    for tag in tags:
        points = [(step, scalars[tag]) for step, scalars in steps.items() if tag in scalars]
        if points:
            axes.plot(*zip(*points, strict=True), marker='.', label=tag.removeprefix('coco/'))
    axes.set(title=title, xlabel='iteration')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8, framealpha=0.5)


def draw_heatmap(
    axes: Axes,
    values: dict[int, dict[str, float]],
    layers: list[str],
    title: str,
    colours: str,
    low: float,
    fontsize: int = 7,
    **colorbar: Any,
) -> None:
    """Draw a value of every layer over the iterations, a row for each layer.

    Args:
        axes (Axes): Where.
        values (dict[int, dict[str, float]]): By iteration and layer; a missing one stays blank.
        layers (list[str]): The rows, from the top.
        title (str): Of the axes.
        colours (str): Name of the colour map.
        low (float): Value of its lower end; that of its upper one is 1.
        fontsize (int): Of the layers' names; 0 for none.
        **colorbar: Options of its scale.
    """
    axes.set(title=title, xlabel='iteration')
    if not values:
        axes.text(0.5, 0.5, 'nothing was logged', ha='center')
        return
    steps = sorted(values)
    grid = np.array([[values[step].get(layer, np.nan) for step in steps] for layer in layers])
    # A column ends at its step: it tells of the iterations up to there.
    mesh = axes.pcolormesh(
        [0, *steps], np.arange(len(layers) + 1), grid, cmap=colours, vmin=low, vmax=1
    )
    axes.invert_yaxis()
    if fontsize:
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=fontsize)
    else:
        axes.set_yticks([])
    axes.figure.colorbar(mesh, ax=axes, **colorbar)

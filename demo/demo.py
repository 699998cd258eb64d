"""Train a small Mask R-CNN with UBN on CPU, evaluate it and draw what happened.

Without --data it makes its own data set. Run again, it goes on where it was interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import torch
from generated import generate_coco
from mmdet.utils import register_all_modules
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from ubn_det.datasets import InputError, check_data
from ubn_det.engine import prepare
from ubn_det.visualization import plot_training

FOLDER = Path(__file__).resolve().parent
CONFIG = FOLDER / 'mask-rcnn_r18-scratch_fpn_ubn_demo.py'
EVAL_COCO = FOLDER.parent / 'tools/eval_coco.py'
LAYOUTS = (('train', 'val'), ('train2017', 'val2017'))
# What the demo has to reach on its own data.
MIN_BOX_MAP = 0.30
MIN_MASK_MAP = 0.25
SCORE_THRESHOLD = 0.5
METRICS = ('bbox', 'segm')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--data',
        type=Path,
        help='data set of your own in COCO instance format: a folder with train/, val/ and '
        'annotations/instances_{train,val}.json, or the same with train2017 and val2017',
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--max-iters', type=int, help='number of iterations, 300 by default')
    return parser.parse_args(argv)


def find_splits(root: Path) -> tuple[str, str]:
    """Return the names of the training and the validation split of a COCO-format folder.

    Raises:
        FileNotFoundError: Neither layout is there; names what is missing.
    """
    missing = []
    for splits in LAYOUTS:
        paths = [root / 'annotations' / f'instances_{split}.json' for split in splits]
        paths += [root / split for split in splits]
        absent = [str(path) for path in paths if not path.exists()]
        if not absent:
            return splits
        missing.append(', '.join(absent))
    raise FileNotFoundError(
        f'{root} is no COCO-format folder: missing {" (or else ".join(missing)})'
    )


def build_config(root: Path, work_dir: Path, max_iters: int | None) -> Config:
    """Put a data set and a work folder into the demo's config."""
    cfg = Config.fromfile(CONFIG)
    train, val = find_splits(root)
    annotations = root / 'annotations'
    with open(annotations / f'instances_{train}.json', encoding='utf-8') as file:
        classes = tuple(category['name'] for category in json.load(file)['categories'])
    for name, split in (('train', train), ('val', val), ('test', val)):
        cfg[f'{name}_dataloader'].dataset.update(
            data_root=f'{root}/',
            metainfo=dict(classes=classes),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
        )
    cfg.val_evaluator.update(
        ann_file=str(annotations / f'instances_{val}.json'),
        outfile_prefix=str(work_dir / 'predictions'),
    )
    cfg.test_evaluator = cfg.val_evaluator
    cfg.model.roi_head.bbox_head.num_classes = len(classes)
    cfg.model.roi_head.mask_head.num_classes = len(classes)
    if max_iters is not None:
        cfg.train_cfg.update(max_iters=max_iters, val_interval=max_iters)
        cfg.default_hooks.checkpoint.interval = max_iters
        warmup, cosine = cfg.param_scheduler
        warmup.end = cosine.begin = max(1, max_iters // 10)
        cosine.update(end=max_iters, T_max=max(1, max_iters - warmup.end))
    cfg.work_dir = str(work_dir)
    cfg.resume = True
    cfg.launcher = 'none'
    prepare(cfg)
    return cfg


def check_same_run(work_dir: Path, settings: dict[str, object]) -> None:
    """Refuse to go on with a work folder that belongs to a run with other settings."""
    path = work_dir / 'demo.json'
    if path.exists() and json.loads(path.read_text()) != settings:
        raise FileExistsError(
            f'{work_dir} holds a run with other settings ({path.read_text()}). Choose another '
            'folder with WORK_DIR=... (--work-dir) or remove this one'
        )
    path.write_text(json.dumps(settings))


def check_bars(metrics: dict[str, float]) -> int:
    """Return 0 if the demo reached what it has to, else say by how much not and return 1."""
    missed = [
        f'{name} {metrics[name]:.3f} < {bar}'
        for name, bar in (('bbox_mAP', MIN_BOX_MAP), ('segm_mAP', MIN_MASK_MAP))
        if metrics[name] < bar
    ]
    if missed:
        print(f'demo: failed: {", ".join(missed)}', file=sys.stderr)
    return int(bool(missed))


@torch.no_grad()
def draw_predictions(runner: Runner, out: Path, num_images: int = 8) -> None:
    """Draw held-out images, each with its truth on the left and the predictions on the right."""
    dataset = runner.val_dataloader.dataset
    visualizer = DetLocalVisualizer.get_instance('demo', line_width=1, alpha=0.5)
    visualizer.dataset_meta = dict(dataset.metainfo, palette='coco')
    runner.model.eval()
    num_images = min(num_images, len(dataset))
    num_rows = (num_images + 1) // 2
    figure, axes = plt.subplots(
        num_rows, 2, figsize=(16, 4 * num_rows), layout='constrained', squeeze=False
    )
    for ax in axes.flat:
        ax.axis('off')
    for i, ax in zip(range(num_images), axes.flat, strict=False):
        sample = runner.model.test_step(pseudo_collate([dataset[i]]))[0]
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        visualizer.add_datasample('demo', image, sample, pred_score_thr=SCORE_THRESHOLD)
        ax.imshow(visualizer.get_image())
        ax.set_title(f'{Path(sample.img_path).name}: truth | predictions over {SCORE_THRESHOLD}')
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.time()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        root = args.data
        if root is None:
            root = args.work_dir / 'data'
            written = generate_coco(root)
            print(f'demo: {"made" if written else "found"} the generated data set in {root}')
        cfg = build_config(root, args.work_dir, args.max_iters)
        check_same_run(
            args.work_dir, dict(data=str(root.resolve()), max_iters=cfg.train_cfg.max_iters)
        )
        check_data(cfg, ('train', 'val'))
    except (FileNotFoundError, FileExistsError, InputError) as error:
        print(f'demo: {error}', file=sys.stderr)
        return 2
    print(
        f'demo: training {cfg.train_cfg.max_iters} iterations, about 5 minutes on two cores; '
        'each log line has the time left (eta)',
        flush=True,
    )
    # The set-up compiles mmcv's operators for CPU only.
    os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    register_all_modules()
    results = args.work_dir / 'predictions'
    for metric in METRICS:
        Path(f'{results}.{metric}.json').unlink(missing_ok=True)
    runner = Runner.from_cfg(cfg)
    runner.train()
    if not Path(f'{results}.bbox.json').exists():
        # The run was complete before, so that training had nothing left to evaluate.
        runner.val()

    logs = sorted(args.work_dir.glob('*/vis_data/scalars.json'))
    (args.work_dir / 'scalars.json').write_text(''.join(log.read_text() for log in logs))
    plot_training(args.work_dir, args.work_dir / 'training.png')
    draw_predictions(runner, args.work_dir / 'predictions.png')
    metrics = args.work_dir / 'metrics.json'
    arguments = ['--classwise', '--names', 'UBN', '--out', str(metrics)]
    command = [sys.executable, EVAL_COCO, cfg.val_evaluator.ann_file, results, *arguments]
    if subprocess.run(command).returncode:
        return 2
    print(
        f'demo: {time.time() - start:.0f} s; {args.work_dir} holds the checkpoint, scalars.json, '
        'training.png, predictions.png and metrics.json'
    )
    if args.data is not None:
        return 0
    return check_bars(json.loads(metrics.read_text())['runs']['UBN']['metrics'])


if __name__ == '__main__':
    sys.exit(main())

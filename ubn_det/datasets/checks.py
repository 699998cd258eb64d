"""Check the data that a config asks for before anything is built.

What mmdet's ``CocoDataset`` and ``CocoMetric`` would leave out without a word, meet after hours or
wait for in vain becomes an error, or a warning, that names the file and the id.
"""

import os
from collections.abc import Iterator
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO

from .annotations import InputError, load_annotations, shortened

# The process's number on its machine, by what started it.
_LOCAL_RANKS = dict(
    pytorch='LOCAL_RANK', slurm='SLURM_LOCALID', mpi='OMPI_COMM_WORLD_LOCAL_RANK', none=''
)


def check_data(cfg: Config, stages: tuple[str, ...]) -> None:
    """Check annotation files and images of all data sets in COCO's format.

    Only the first process of a machine does. Data sets of another format, and those that are not
    on a local disk, are left to mmdet.

    Args:
        cfg (Config): The whole config.
        stages (tuple[str, ...]): Of 'train', 'val' and 'test', those that will run.

    Raises:
        InputError: A file, an image or an entry cannot be used; names it.
    """
    if int(os.environ.get(_LOCAL_RANKS[cfg.get('launcher', 'none')], 0)) > 0:
        return
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    for stage in stages:
        dataloader = cfg.get(f'{stage}_dataloader')
        evaluators = list(_coco_evaluators(cfg.get(f'{stage}_evaluator')))
        if any(evaluator.get('format_only') for evaluator in evaluators):
            # Images without annotations, such as COCO's test-dev.
            continue
        masks = any('segm' in evaluator.get('metric', '') for evaluator in evaluators)
        checked = set()
        for dataset in _coco_datasets(dataloader.dataset if dataloader else None):
            evaluated = stage != 'train'
            path = _join(dataset, dataset.ann_file)
            checked.add(path)
            ground_truth = load_annotations(
                path, masks if evaluated else _loads_masks(dataset), evaluated
            )
            _check_classes(path, dataset, ground_truth)
            _check_images(path, dataset, ground_truth)
        for evaluator in evaluators:
            path = evaluator.get('ann_file')
            if path and path not in checked and _is_local(evaluator, path):
                load_annotations(path, masks)


def _coco_evaluators(evaluator: Any) -> Iterator[dict]:
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        if isinstance(metric, dict) and metric.get('type') == 'CocoMetric':
            yield metric


def _coco_datasets(dataset: Any) -> Iterator[dict]:
    """Find the data sets that read COCO's format as ``CocoDataset`` does, in any wrappers."""
    if isinstance(dataset, (list, tuple)):
        for part in dataset:
            yield from _coco_datasets(part)
    if not isinstance(dataset, dict):
        return
    for key in ('dataset', 'datasets'):
        yield from _coco_datasets(dataset.get(key))
    cls = _class_of(dataset)
    if (
        isinstance(cls, type)
        and issubclass(cls, CocoDataset)
        and cls.load_data_list is CocoDataset.load_data_list
        and cls.parse_data_info is CocoDataset.parse_data_info
        and dataset.get('ann_file')
        and _is_local(dataset, _join(dataset, dataset['ann_file']))
    ):
        yield dataset


def _class_of(dataset: dict) -> Any:
    kind = dataset.get('type')
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _is_local(cfg: dict, path: str) -> bool:
    return cfg.get('backend_args') is None and '://' not in path


def _join(dataset: dict, path: str) -> str:
    """Join a path to the root of its data set, as mmengine does."""
    return os.path.join(dataset.get('data_root') or '', path)


def _loads_masks(dataset: dict) -> bool:
    return any(
        transform.get('type') == 'LoadAnnotations' and transform.get('with_mask', False)
        for transform in dataset.get('pipeline', ())
    )


def _check_classes(path: str, dataset: dict, ground_truth: COCO) -> None:
    """Raise if the classes are not those of the file: the labels of others would shift."""
    metainfo = _class_of(dataset)._load_metainfo(dataset.get('metainfo'))
    names = {category['name'] for category in ground_truth.cats.values()}
    classes = metainfo['classes']
    missing = [name for name in classes if name not in names]
    if missing:
        raise InputError(
            f'{path}: has no category {shortened(missing)}, which the data set names among its '
            f'{len(classes)} classes; set metainfo=dict(classes=...) of the data set and '
            'num_classes of the heads to what the file has'
        )


def _check_images(path: str, dataset: dict, ground_truth: COCO) -> None:
    folder = _join(dataset, dataset.get('data_prefix', {}).get('img', ''))
    listings: dict[str, set[str]] = {}
    missing = []
    for image in ground_truth.dataset['images']:
        if not isinstance(image.get('file_name'), str):
            raise InputError(f'{path}: image id {image["id"]}: has no file_name')
        file = os.path.join(folder, image['file_name'])
        parent, name = os.path.split(file)
        if parent not in listings:
            # One listing is a thousand times cheaper than to ask for every file.
            listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if name not in listings[parent]:
            missing.append(f'{file} (image id {image["id"]})')
    if missing:
        raise InputError(
            f'{path}: {len(missing)} of {len(ground_truth.imgs)} images are not there: '
            f'{shortened(missing, 3)}'
        )

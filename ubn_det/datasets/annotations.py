"""Annotation files in COCO's instance format: reading them and finding what is wrong with them.

mmdet and pycocotools check next to nothing: entries at fault are left out, or counted wrongly,
without a word, or fail long after the start with an error that does not say which one it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO


class InputError(Exception):
    """A file or an argument that cannot be evaluated; the message names it."""


def load_json(path: str) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: If the file cannot be read or does not hold JSON; names file and position.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}: broken JSON: {error}') from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; JSON's true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # Unlike math.isfinite this does not overflow on an integer of hundreds of digits.
    return abs(value) <= sys.float_info.max


def is_id(value: Any) -> bool:
    """Whether a value is an integer that numpy keeps exact among others.

    COCOeval sorts ids with numpy, which turns a mixture with larger integers into floats, and
    then finds nothing under the rounded ids.
    """
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def box_fault(box: Any) -> str | None:
    """What is wrong with a box in COCO's [x, y, width, height]; None if nothing is."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return f'bbox {box} is not four finite numbers'
    if box[2] < 0 or box[3] < 0:
        return f'bbox {box} has a negative size'
    return None


def decode_counts(counts: str) -> np.ndarray | None:
    """Decodes the run lengths of COCO's compressed mask encoding.

    A run length is written in groups of five bits, the lowest first, one character each, offset
    by 48; bit 5 says that another group follows, bit 4 of the last one is the sign. From the
    fourth run on, the number written is the difference to the run before the previous one.

    Args:
        counts: The encoded run lengths.

    Returns:
        The run lengths, or None if the text is no such encoding.
    """
    codes = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    # Run lengths have 32 bits, so seven groups hold the longest one.
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def rle_fault(rle: Any, image: Mapping[str, Any], compressed: bool) -> str | None:
    """What is wrong with a run-length encoded mask.

    pycocotools checks none of this: broken counts can abort the process, and a mask of another
    size than the ground truth's has an overlap of -1, which counts as a miss.

    Args:
        rle: The mask.
        image: The image's entry in the annotation file.
        compressed: Whether the counts have to be compressed.

    Returns:
        The fault, or None.
    """
    if not isinstance(rle, dict) or 'size' not in rle or 'counts' not in rle:
        return 'segmentation is not a run-length encoding with size and counts'
    size = [image['height'], image['width']]
    if rle['size'] != size:
        return f'segmentation has the size {rle["size"]}, its image has {size}'
    counts = rle['counts']
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif not compressed and isinstance(counts, list) and all(map(is_id, counts)):
        runs = np.array(counts)
    else:
        runs = None
    if runs is None or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        return 'segmentation has counts that do not describe a mask of its size'
    return None


def polygons_fault(polygons: Sequence[Any], evaluated: bool) -> str | None:
    """What is wrong with a mask given as polygons [[x, y, x, y, x, y, ...], ...].

    pycocotools takes lists of four numbers for boxes and drops the last number of an odd list;
    in training mmdet leaves such polygons out.
    """
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            return 'segmentation has a polygon that is not a list of finite numbers'
        if evaluated and not is_polygon(polygon):
            return f'segmentation has a polygon of {len(polygon)} numbers'
    return None if polygons or not evaluated else 'segmentation has no polygon'


def is_polygon(numbers: Sequence[float]) -> bool:
    """Whether a list of numbers can be the corners of a polygon."""
    return len(numbers) >= 6 and len(numbers) % 2 == 0


def lacking_key_fault(entry: Any, keys: Iterable[str]) -> str | None:
    """What is wrong if an entry is no object or lacks one of the keys; None if neither."""
    if not isinstance(entry, dict):
        return f'is a {type(entry).__name__}, not an object'
    for key in keys:
        if key not in entry:
            return f"has no '{key}'"
    return None


def reference_fault(entry: Mapping[str, Any], ground_truth: COCO) -> str | None:
    """What is wrong if the image or the category of an entry is not in the annotation file.

    COCOeval leaves out such entries without a word, or fails on them.
    """
    for key, known in (('image_id', ground_truth.imgs), ('category_id', ground_truth.cats)):
        if not is_id(entry[key]) or entry[key] not in known:
            return f'{key} {entry[key]!r} is not in the annotation file'
    return None


def image_fault(image: Mapping[str, Any]) -> str | None:
    """What is wrong with the size of an image of the annotation file."""
    for key in ('height', 'width'):
        if not is_id(image.get(key)) or image[key] <= 0:
            return f'{key} {image.get(key)!r} is not a positive integer'
    return None


def annotation_fault(
    annotation: Mapping[str, Any], ground_truth: COCO, masks: bool, evaluated: bool
) -> str | None:
    """What is wrong with an object of the annotation file.

    Args:
        annotation: The object.
        ground_truth: The annotation file.
        masks: Whether masks are used.
        evaluated: Whether COCOeval reads it; if not, what mmdet's ``CocoDataset`` trains on.

    Returns:
        The fault, or None.
    """
    keys = ('image_id', 'category_id', 'bbox', 'area')
    keys += ('iscrowd',) * evaluated + ('segmentation',) * masks
    fault = lacking_key_fault(annotation, keys)
    fault = fault or reference_fault(annotation, ground_truth) or box_fault(annotation['bbox'])
    if fault:
        return fault
    if evaluated and annotation['id'] == 0:
        return 'COCOeval reads a match with id 0 as no match; ids have to start at 1'
    if not is_number(annotation['area']) or annotation['area'] < 0:
        return f'area {annotation["area"]} is not a finite number from 0'
    if annotation.get('iscrowd', 0) not in (0, 1):
        return f'iscrowd {annotation["iscrowd"]!r} is neither 0 nor 1'
    if not masks:
        return None
    if isinstance(annotation['segmentation'], list):
        return polygons_fault(annotation['segmentation'], evaluated)
    image = ground_truth.imgs[annotation['image_id']]
    return rle_fault(annotation['segmentation'], image, compressed=False)


def lost_reason(
    annotation: Mapping[str, Any], image: Mapping[str, Any], masks: bool
) -> str | None:
    """Why a sound entry is no object all the same, so that nothing can be learnt or found there.

    mmdet's ``CocoDataset`` leaves such entries out of training without a word; COCOeval counts
    them as objects that are always missed.
    """
    if image_fault(image):
        return None
    x, y, width, height = annotation['bbox']
    if x >= image['width'] or y >= image['height'] or x + width <= 0 or y + height <= 0:
        return 'outside of the image'
    # mmdet's own limits.
    if width < 1 or height < 1 or annotation['area'] <= 0:
        return 'with no area or less than a pixel wide or high'
    segmentation = annotation.get('segmentation')
    if masks and isinstance(segmentation, list):
        polygons = [np.array(polygon) for polygon in segmentation if is_polygon(polygon)]
        if not any(polygon_area(polygon) > 0 for polygon in polygons):
            return 'with a mask of no area'
    return None


def polygon_area(polygon: np.ndarray) -> float:
    """Area inside of [x, y, x, y, ...] by the shoelace formula."""
    x, y = polygon[::2], polygon[1::2]
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def load_annotations(path: str, masks: bool, evaluated: bool = True) -> COCO:
    """Reads and checks an annotation file, and warns on stderr of objects that are none.

    Args:
        path: The file, in COCO's instance format.
        masks: Whether masks are used, and so have to be there.
        evaluated: Whether COCOeval reads it; if not, what mmdet's ``CocoDataset`` trains on.

    Returns:
        The ground truth; ``createIndex`` is left to who evaluates.

    Raises:
        InputError: If the file cannot be used; names it and what is at fault.
    """
    dataset = load_json(path)
    if not isinstance(dataset, dict):
        raise InputError(
            f'{path}: is a {type(dataset).__name__}, not an object with images, '
            'categories and annotations'
        )
    for section in ('images', 'categories', 'annotations'):
        entries = dataset.get(section)
        if not isinstance(entries, list) or not entries:
            raise InputError(f'{path}: has no {section}')
        seen = set()
        for index, entry in enumerate(entries):
            fault = lacking_key_fault(entry, ('id',))
            if not fault and not is_id(entry['id']):
                fault = f'id {entry["id"]!r} is not an integer of 64 bits'
            if not fault and entry['id'] in seen:
                fault = f'id {entry["id"]} occurs twice'
            if fault:
                raise InputError(f'{path}: {section}[{index}]: {fault}')
            seen.add(entry['id'])

    names: dict[str, int] = {}
    for category in dataset['categories']:
        name = category.get('name')
        if not isinstance(name, str):
            raise InputError(f'{path}: category id {category["id"]} has no name')
        if name in names:
            raise InputError(
                f'{path}: category ids {names[name]} and {category["id"]} share the name {name!r}'
            )
        names[name] = category['id']

    ground_truth = COCO()
    ground_truth.dataset = dataset
    ground_truth.imgs = {image['id']: image for image in dataset['images']}
    ground_truth.cats = {category['id']: category for category in dataset['categories']}
    if masks or not evaluated:
        for image in dataset['images']:
            fault = image_fault(image)
            if fault:
                raise InputError(f'{path}: image id {image["id"]}: {fault}')
    lost: dict[str, list[int]] = {}
    for annotation in dataset['annotations']:
        fault = annotation_fault(annotation, ground_truth, masks, evaluated)
        if fault:
            raise InputError(f'{path}: annotation id {annotation["id"]}: {fault}')
        reason = lost_reason(annotation, ground_truth.imgs[annotation['image_id']], masks)
        if reason:
            lost.setdefault(reason, []).append(annotation['id'])
    effect = 'they count as objects that are missed' if evaluated else 'they are left out'
    for reason, ids in lost.items():
        print(
            f'warning: {path}: {len(ids)} annotations {reason}, {effect}: id {shortened(ids)}',
            file=sys.stderr,
        )
    if not evaluated and sum(map(len, lost.values())) == len(dataset['annotations']):
        raise InputError(
            f'{path}: all of its {len(dataset["annotations"])} annotations are left out, so that '
            'there is nothing to train on'
        )
    return ground_truth


def shortened(items: Sequence[Any], limit: int = 5) -> str:
    """The first items in words, and how many more there are."""
    text = ', '.join(map(str, items[:limit]))
    return text if len(items) <= limit else f'{text} and {len(items) - limit} more'

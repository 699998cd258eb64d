"""A small instance segmentation data set in COCO format that the project draws itself.

Five classes that their outline tells apart, on textured backgrounds: textures, rotations, sizes
and contrasts are drawn without regard to the class, and colours give it away four times in five.
Objects hide each other and leave the image; their annotations are the parts that can still be
seen.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ('disk', 'square', 'triangle', 'star', 'cross')
SIDE_RANGE = (160, 256)

# Stands in the files' settings: raise it when the same seed no longer draws the same data, so
# that data of an older version is replaced instead of reused.
VERSION = 2

_DESCRIPTION = 'Generated shapes in COCO instance format'
_SPLITS = ('train', 'val')
_MIN_SIDE = 64

# A hint that a small detector can learn in minutes; the outline has to be learnt beside it. BGR.
_COLOR_TELLS = 0.8
_COLORS = ((60, 60, 200), (200, 90, 50), (60, 190, 70), (50, 200, 220), (190, 60, 190))

# Fixed places instead of a chance per image: every split of eight images or more has both kinds.
_EMPTY_EVERY, _EMPTY_AT = 20, 7
_CROWD_EVERY, _CROWD_AT = 8, 3

# Sizes are the square root of the full area in pixels. COCO parts areas at 32^2 and 96^2; the
# large band starts above 96 since occlusion takes some of the area away.
_SIZE_BANDS = ((24, 32), (40, 94), (102, 140))
_SIZE_SHARES = (0.12, 0.58, 0.3)
_MAX_SIZE_OF_SIDE = 0.66
_OBJECTS = (1, 4)
_CROWD_MEMBERS = (14, 26)
_CROWD_SIZES = (7, 11)
_TRIES = 30

# Below this share of its full area an outline no longer tells the class.
_MIN_VISIBLE = 0.7
# A speck that sticks out from behind another object would stretch the box for nothing.
_MIN_PIECE = 24


@dataclass
class SceneObject:
    """One annotated object, or one crowd, of a scene.

    Attributes:
        category (int): Index into ``CLASSES``.
        full (np.ndarray): (H, W) bool, the object inside the image as if nothing hid it.
        visible (np.ndarray): (H, W) bool, the part of ``full`` that nothing drawn later hides.
        full_area (int): Pixels of the whole object, those outside the image included.
        is_crowd (bool): Whether this is a cluster of tiny objects of one class.
    """

    category: int
    full: np.ndarray
    visible: np.ndarray
    full_area: int
    is_crowd: bool = False


@dataclass
class Scene:
    """An image and what can be seen in it.

    Attributes:
        image (np.ndarray): (H, W, 3) uint8, channels in OpenCV's order (BGR).
        objects (list[SceneObject]): From back to front.
    """

    image: np.ndarray
    objects: list[SceneObject]


def generate_coco(
    root: str | os.PathLike,
    num_train: int = 240,
    num_val: int = 60,
    side_range: tuple[int, int] = SIDE_RANGE,
    seed: int = 0,
) -> bool:
    """Write the data set, unless it is there already with the same settings.

    The layout is ``root/{train,val}/*.png`` and
    ``root/annotations/instances_{train,val}.json``. An image depends on ``seed``, its split, its
    index and ``side_range`` alone, so a smaller set is the beginning of a larger one. Images are
    PNG: low-contrast edges stay as drawn, and every decoder reads the same pixels.

    The annotation files are put in place last, by renaming, and old ones are removed first: a
    directory that has both holds a complete set.

    Args:
        root (str | os.PathLike): Directory of the data set, made if missing.
        num_train (int): Number of training images, at least 1. Defaults to 240.
        num_val (int): Number of validation images, at least 1. Defaults to 60.
        side_range (tuple[int, int]): Smallest and largest height and width of an image in
            pixels, both included and at least 64; height and width are drawn independently.
            Large objects need about 160. Defaults to (160, 256).
        seed (int): Seed of the whole set, not negative. Defaults to 0.

    Returns:
        bool: True if the data set was written, False if it was there already.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
        FileExistsError: If an annotation file of another data set is in the way.
    """
    _check_count('num_train', num_train, 1)
    _check_count('num_val', num_val, 1)
    _check_count('seed', seed, 0)
    _check_side_range(side_range)
    root = Path(root)
    settings = {
        'version': VERSION,
        'seed': seed,
        'num_train': num_train,
        'num_val': num_val,
        'side_range': list(side_range),
    }
    if _is_complete(root, settings):
        return False

    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for split in _SPLITS:
        _annotation_file(root, split).unlink(missing_ok=True)
    written = []
    for split in _SPLITS:
        content = _write_split(root, split, settings)
        target = _annotation_file(root, split)
        partial = target.with_suffix('.json.partial')
        partial.write_text(json.dumps(content), encoding='utf-8')
        written.append((partial, target))
    for partial, target in written:
        os.replace(partial, target)
    return True


def draw_scene(
    seed: int, split: str, index: int, side_range: tuple[int, int] = SIDE_RANGE
) -> Scene:
    """Draw one image of the data set.

    Args:
        seed (int): Seed of the whole set, not negative.
        split (str): 'train' or 'val'.
        index (int): Place of the image in its split, from 0.
        side_range (tuple[int, int]): Smallest and largest side in pixels. Defaults to (160, 256).

    Returns:
        Scene: The image with its objects, always the same ones for the same arguments.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """
    _check_count('seed', seed, 0)
    _check_count('index', index, 0)
    _check_side_range(side_range)
    if split not in _SPLITS:
        raise ValueError(f'split must be one of {_SPLITS}, got {split!r}')
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    height, width = (int(side) for side in rng.integers(*side_range, size=2, endpoint=True))
    canvas = _background(rng, height, width)
    objects = []
    if index % _EMPTY_EVERY != _EMPTY_AT:
        if index % _CROWD_EVERY == _CROWD_AT:
            objects.append(_draw_crowd(rng, canvas))
        _draw_objects(rng, canvas, objects)
    return Scene(_develop(rng, canvas), objects)


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Outline a mask with polygons that decode to exactly this mask.

    The polygons run along the edges of the pixels, so a pixel (x, y) covers [x, x + 1] by
    [y, y + 1]: outlines through pixel centres would lose half a pixel on two sides when
    pycocotools decodes them. Pixels that touch at a corner belong to one polygon.

    Args:
        mask (np.ndarray): (H, W) bool.

    Returns:
        list[list[float]]: One flat list x0, y0, x1, y1, ... for each connected part, in pixels.

    Raises:
        ValueError: If the mask has a hole, which COCO's polygons cannot express.
    """
    if _has_hole(mask):
        raise ValueError('mask must not have holes')
    padded = np.pad(mask.astype(np.int8), 1)
    across = np.diff(padded, axis=0)[:, 1:-1]
    along = np.diff(padded, axis=1)[1:-1, :]
    # The pixels' edges with the mask on their right hand, as steps (dx, dy) from a corner (x, y).
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for edges, value, start, step in (
        (across, 1, (0, 0), (1, 0)),
        (across, -1, (1, 0), (-1, 0)),
        (along, 1, (0, 1), (0, -1)),
        (along, -1, (0, 0), (0, 1)),
    ):
        for y, x in np.argwhere(edges == value).tolist():
            steps.setdefault((x + start[0], y + start[1]), []).append(step)

    polygons = []
    while steps:
        # Top edges come first, row by row: this is the top left corner of a part.
        x, y = next(iter(steps))
        dx, dy = 0, 0
        polygon = []
        while (x, y) in steps:
            leaving = steps[x, y]
            # Where two parts touch at a corner there are two ways on: turning left joins them.
            step = (dy, -dx) if len(leaving) == 2 else leaving[0]
            leaving.remove(step)
            if not leaving:
                del steps[x, y]
            if step != (dx, dy):
                polygon += [float(x), float(y)]
                dx, dy = step
            x, y = x + dx, y + dy
        polygons.append(polygon)
    return polygons


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a mask as COCO's uncompressed run lengths: column by column, zeros first.

    Args:
        mask (np.ndarray): (H, W) bool.

    Returns:
        dict[str, list[int]]: 'counts', the lengths in pixels, and 'size', [H, W].
    """
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {'counts': [0, *runs] if flat[0] else runs, 'size': list(mask.shape)}


def _check_count(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f'{name} must be an integer of at least {smallest}, got {value!r}')


def _check_side_range(side_range: tuple[int, int]) -> None:
    if not isinstance(side_range, (tuple, list)) or len(side_range) != 2:
        raise ValueError(f'side_range must be a pair of integers, got {side_range!r}')
    for side in side_range:
        _check_count('side_range', side, _MIN_SIDE)
    if side_range[0] > side_range[1]:
        raise ValueError(f'side_range must not decrease, got {side_range!r}')


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'instances_{split}.json'


def _is_complete(root: Path, settings: dict[str, Any]) -> bool:
    """Tell whether both splits are there with these settings.

    Raises:
        FileExistsError: If there is an annotation file that this module has not written.
    """
    complete = True
    for split in _SPLITS:
        path = _annotation_file(root, split)
        if not path.exists():
            complete = False
            continue
        content = json.loads(path.read_text(encoding='utf-8'))
        info = content.get('info', {})
        if info.get('description') != _DESCRIPTION:
            raise FileExistsError(f'{path} belongs to another data set')
        names = (image['file_name'] for image in content['images'])
        complete &= info.get('settings') == settings
        complete &= all((root / split / name).exists() for name in names)
    return complete


def _write_split(root: Path, split: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Draw and write the images of one split and return the content of its annotation file."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(settings[f'num_{split}']):
        scene = draw_scene(settings['seed'], split, index, settings['side_range'])
        image_id = index + 1
        file_name = f'shapes_{image_id:06d}.png'
        encoded = cv2.imencode('.png', scene.image)[1]
        (folder / file_name).write_bytes(encoded.tobytes())
        height, width = scene.image.shape[:2]
        images.append({'id': image_id, 'file_name': file_name, 'height': height, 'width': width})
        for item in scene.objects:
            # From 1: COCOeval takes the id 0 for 'not matched'.
            annotations.append(_annotation(len(annotations) + 1, image_id, item))
    names = {image['file_name'] for image in images}
    for path in folder.glob('shapes_*.png'):
        if path.name not in names:
            path.unlink()
    return {
        'info': {'description': _DESCRIPTION, 'version': str(VERSION), 'settings': settings},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': number, 'name': name, 'supercategory': 'shape'}
            for number, name in enumerate(CLASSES, start=1)
        ],
    }


def _annotation(annotation_id: int, image_id: int, item: SceneObject) -> dict[str, Any]:
    ys, xs = np.nonzero(item.visible)
    left, top = int(xs.min()), int(ys.min())
    box = [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]
    encode = mask_to_rle if item.is_crowd else mask_to_polygons
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': item.category + 1,
        'iscrowd': int(item.is_crowd),
        'area': float(len(xs)),
        'bbox': [float(value) for value in box],
        'segmentation': encode(item.visible),
    }


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a (height, width, 3) float32 background in grey levels of 0 to 255."""
    middle = rng.uniform(60, 195, 3)
    spread = _direction(rng) * rng.uniform(20, 70)
    blend = _texture(rng, height, width)[..., None] - 0.5
    canvas = (middle + blend * spread).astype(np.float32)
    for _ in range(rng.choice([0, 0, 2, 5])):
        # Strokes are edges that belong to no class.
        points = rng.uniform(-0.1, 1.1, (3, 2)) * (width, height)
        color = np.clip(middle + _direction(rng) * rng.uniform(20, 80), 0, 255)
        curve = _bend(points).round().astype(np.int32)
        cv2.polylines(canvas, [curve], False, color.tolist(), int(rng.integers(1, 9)))
    return canvas


def _bend(points: np.ndarray) -> np.ndarray:
    """Sample the quadratic curve of three control points; (3, 2) to (24, 2)."""
    t = np.linspace(0, 1, 24)[:, None]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def _direction(rng: np.random.Generator) -> np.ndarray:
    """Draw a unit vector in colour space, (3,)."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a (height, width) pattern in [0, 1] of a random kind."""
    kind = rng.choice(['gradient', 'clouds', 'grain', 'stripes', 'weave', 'cells'])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if kind == 'clouds':
        return _clouds(rng, height, width)
    if kind == 'grain':
        return np.clip(rng.normal(0.5, 0.25, (height, width)), 0, 1)
    if kind == 'cells':
        centres = rng.uniform(-0.1, 1.1, (int(rng.integers(6, 20)), 2)) * (height, width)
        far = [(y - centre[0]) ** 2 + (x - centre[1]) ** 2 for centre in centres]
        return rng.uniform(0, 1, len(centres))[np.argmin(far, axis=0)]
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == 'gradient':
        return (along - along.min()) / max(np.ptp(along), 1)
    period = rng.uniform(5, 28)
    wave = np.sin(2 * np.pi * along / period + rng.uniform(0, 2 * np.pi))
    if kind == 'weave':
        across = np.cos(angle) * y - np.sin(angle) * x
        wave = wave * np.sin(2 * np.pi * across / (period * rng.uniform(0.7, 1.4)))
    return np.clip(0.5 + wave * rng.uniform(0.5, 2), 0, 1)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sum smooth noise of growing fineness; (height, width) in [0, 1]."""
    total = np.zeros((height, width), np.float32)
    for octave in range(4):
        cells = 3 * 2**octave
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.clip(0.5 + 0.4 * total, 0, 1)


def _develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Turn a float canvas into an image: uneven light, a little blur, noise; (H, W, 3) uint8."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    slope = rng.uniform(-0.25, 0.25, 2)
    light = 1 + slope[0] * (y / height - 0.5) + slope[1] * (x / width - 0.5)
    image = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 1.0)) * light[..., None]
    image = image + rng.normal(0, rng.uniform(2, 9), canvas.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray) -> SceneObject:
    """Draw a cluster of tiny objects of one class; they may hide each other freely."""
    height, width = canvas.shape[:2]
    category = int(rng.integers(len(CLASSES)))
    members = int(rng.integers(*_CROWD_MEMBERS, endpoint=True))
    radius = 0.6 * np.mean(_CROWD_SIZES) * np.sqrt(members)
    middle = rng.uniform(radius, np.array([width, height]) - radius)
    mask = np.zeros((height, width), bool)
    for _ in range(members):
        angle = rng.uniform(0, 2 * np.pi)
        distance = radius * np.sqrt(rng.uniform())
        centre = middle + distance * np.array([np.cos(angle), np.sin(angle)])
        outline = _Outline(rng, category, centre, rng.uniform(*_CROWD_SIZES))
        _paint(rng, canvas, outline, category)
        mask |= outline.mask(height, width)
    return SceneObject(category, mask, mask.copy(), int(mask.sum()), is_crowd=True)


def _draw_objects(
    rng: np.random.Generator, canvas: np.ndarray, objects: list[SceneObject]
) -> None:
    """Draw objects from back to front, adding them to ``objects`` and updating those behind."""
    height, width = canvas.shape[:2]
    bands = rng.choice(len(_SIZE_BANDS), rng.integers(*_OBJECTS, endpoint=True), p=_SIZE_SHARES)
    sizes = [np.exp(rng.uniform(*np.log(_SIZE_BANDS[band]))) for band in bands]
    # Roughly the large ones first: placed last they would hide too much and find no room.
    sizes.sort(key=lambda size: size * rng.uniform(0.5, 1), reverse=True)
    for size in np.minimum(sizes, _MAX_SIZE_OF_SIDE * min(height, width)):
        category = int(rng.integers(len(CLASSES)))
        for _ in range(_TRIES):
            outline = _Outline(rng, category, _place(rng, canvas, objects, size), size)
            mask = outline.mask(height, width)
            full_area = int(outline.patch.sum())
            hidden = [item.visible & ~mask for item in objects]
            if _is_sound(mask, full_area) and all(
                _is_sound(visible, item.full_area, item.is_crowd)
                for item, visible in zip(objects, hidden, strict=True)
            ):
                break
        else:
            continue
        _paint(rng, canvas, outline, category)
        for item, visible in zip(objects, hidden, strict=True):
            item.visible = visible
        objects.append(SceneObject(category, mask, mask.copy(), full_area))


def _place(
    rng: np.random.Generator, canvas: np.ndarray, objects: list[SceneObject], size: float
) -> np.ndarray:
    """Choose a centre (x, y): often near another object, so that it gets hidden in part."""
    height, width = canvas.shape[:2]
    room = np.array([width, height]) - 0.3 * size
    if not objects or rng.uniform() < 0.5:
        return rng.uniform(0.3 * size, room)
    other = objects[rng.integers(len(objects))]
    ys, xs = np.nonzero(other.visible)
    angle = rng.uniform(0, 2 * np.pi)
    distance = rng.uniform(0.2, 0.55) * (size + np.sqrt(other.full_area))
    centre = np.array([xs.mean() + distance * np.cos(angle), ys.mean() + distance * np.sin(angle)])
    return np.clip(centre, 0.3 * size, room)


def _is_sound(visible: np.ndarray, full_area: int, is_crowd: bool = False) -> bool:
    """Tell whether a visible part can stand in the annotations.

    Enough of the object must be left. Crowds are run lengths and may have any form; polygons can
    have several parts, none of them a speck, but no hole.
    """
    if visible.sum() < _MIN_VISIBLE * full_area:
        return False
    if is_crowd:
        return True
    parts = cv2.connectedComponentsWithStats(visible.astype(np.uint8), connectivity=8)[2]
    if parts[1:, cv2.CC_STAT_AREA].min() < _MIN_PIECE:
        return False
    return not _has_hole(visible)


def _has_hole(mask: np.ndarray) -> bool:
    """Tell whether some pixels outside a (H, W) bool mask are cut off from its surroundings."""
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    # Pixels of the mask that touch at a corner close a ring, so those outside connect by edges.
    return cv2.connectedComponents(outside, connectivity=4)[0] > 2


class _Outline:
    """A shape at its place: one of ``CLASSES``, turned, stretched and moved.

    Args:
        rng (np.random.Generator): Draws the angle and the stretch.
        category (int): Index into ``CLASSES``.
        centre (np.ndarray): (2,), x and y in pixels.
        size (float): Square root of the area in pixels; the same for every class, so that it
            tells nothing about the class.

    Attributes:
        left (int): Column of the patch's first pixel in the image; may lie outside the image.
        top (int): Row of the patch's first pixel in the image; may lie outside the image.
        patch (np.ndarray): (side, side) bool, the pixels whose centre lies inside the shape.
    """

    def __init__(
        self, rng: np.random.Generator, category: int, centre: np.ndarray, size: float
    ) -> None:
        angle = rng.uniform(-np.pi / 9, np.pi / 9)
        stretch = rng.uniform(0.85, 1.18)
        # No point of a stretched outline of area 1 is farther than 1.12 from its centre.
        reach = int(np.ceil(1.12 * size))
        self.left, self.top = (int(value) - reach for value in np.floor(centre))
        steps = np.arange(2 * reach + 1) + 0.5
        x = (self.left + steps - centre[0])[None, :] / size
        y = (self.top + steps - centre[1])[:, None] / size
        u = (np.cos(angle) * x + np.sin(angle) * y) * stretch
        v = (np.cos(angle) * y - np.sin(angle) * x) / stretch
        self.patch = _INSIDE[CLASSES[category]](u, v)

    def windows(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return the patch's window in the image and the image's window in the patch."""
        side = len(self.patch)
        x0, x1 = np.clip([self.left, self.left + side], 0, width)
        y0, y1 = np.clip([self.top, self.top + side], 0, height)
        image = slice(y0, y1), slice(x0, x1)
        return image, (
            slice(y0 - self.top, y1 - self.top),
            slice(x0 - self.left, x1 - self.left),
        )

    def mask(self, height: int, width: int) -> np.ndarray:
        """Return the shape inside an image as a (height, width) bool mask."""
        mask = np.zeros((height, width), bool)
        image, patch = self.windows(height, width)
        mask[image] = self.patch[patch]
        return mask


def _paint(rng: np.random.Generator, canvas: np.ndarray, outline: _Outline, category: int) -> None:
    """Fill an outline with a texture whose colour keeps some distance from what it covers."""
    image, patch = outline.windows(*canvas.shape[:2])
    inside = outline.patch[patch]
    ground = canvas[image][inside].mean(0)
    contrast = rng.uniform(30, 50) if rng.uniform() < 0.1 else rng.uniform(80, 150)
    if rng.uniform() < _COLOR_TELLS:
        middle = np.clip(_COLORS[category] + rng.normal(0, 25, 3), 10, 245)
    else:
        offset = _direction(rng) * contrast
        # Of the two ways to differ take the one that stays within the range of grey levels.
        middle = max(
            np.clip(ground + offset, 10, 245),
            np.clip(ground - offset, 10, 245),
            key=lambda color: np.abs(color - ground).sum(),
        )
    spread = _direction(rng) * rng.uniform(0.1, 0.5) * contrast
    blend = _texture(rng, *outline.patch.shape)[patch][inside][:, None] - 0.5
    canvas[image][inside] = middle + blend * spread


def _disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.pi * (u**2 + v**2) <= 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.5


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equilateral: an inscribed circle of radius 27^(-1/4) gives the area 1.
    slope = np.sqrt(3) / 2 * np.abs(u) - v / 2
    return np.maximum(slope, v) <= 27**-0.25


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A pentagram: inside at least four of the five sides of its inner pentagon, prolonged. The
    # inner pentagon's inscribed circle has this radius when the area of the star is 1.
    inscribed = 0.2917
    angles = np.pi / 2 + 2 * np.pi / 5 * np.arange(5)
    return sum(np.cos(a) * u + np.sin(a) * v <= inscribed for a in angles) >= 4


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Two bars three times as long as wide: their union has the area 20 (length / 6)^2.
    half_length, half_width = np.sqrt(9 / 20), np.sqrt(1 / 20)
    wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return (wide <= half_length) & (narrow <= half_width)


# Each tells which points (u, v) lie inside an outline of area 1 around the origin.
_INSIDE = dict(zip(CLASSES, (_disk, _square, _triangle, _star, _cross), strict=True))

"""Tests of the generated data set, of its annotations against pycocotools, and of its command."""

import json
import runpy
from pathlib import Path

import generated
import numpy as np
import pytest
from generated import CLASSES, SIDE_RANGE, draw_scene, generate_coco
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / 'demo' / 'make_demo_data.py'
COUNTS = {'train': 60, 'val': 24}
SMALL = {'num_train': 5, 'num_val': 2}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('generated')
    assert generate_coco(root, COUNTS['train'], COUNTS['val'])
    return root


@pytest.fixture(scope='module', params=COUNTS)
def split(request):
    return request.param


@pytest.fixture(scope='module')
def coco(root, split):
    return COCO(root / 'annotations' / f'instances_{split}.json')


@pytest.fixture(scope='module')
def scenes(split):
    return [draw_scene(0, split, index) for index in range(COUNTS[split])]


def read(root):
    """Return the bytes of every file under a directory by its relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def load(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def objects_of(scenes):
    return [item for scene in scenes for item in scene.objects if not item.is_crowd]


def test_same_seed_gives_same_bytes(tmp_path):
    for name in 'ab':
        generate_coco(tmp_path / name, **SMALL, seed=3)
    assert len(read(tmp_path / 'a')) == 5 + 2 + 2
    assert read(tmp_path / 'a') == read(tmp_path / 'b')


def test_seed_split_and_index_each_change_the_image():
    drawn = [
        draw_scene(seed, split, index).image.tobytes()
        for seed in (0, 1)
        for split in ('train', 'val')
        for index in (0, 1)
    ]
    assert len(set(drawn)) == 8


def test_smaller_set_is_beginning_of_larger(root, tmp_path):
    generate_coco(tmp_path, **SMALL)
    large = read(root)
    images = {name: data for name, data in read(tmp_path).items() if name.endswith('.png')}
    assert len(images) == 7
    assert images == {name: large[name] for name in images}
    for split, count in (('train', 5), ('val', 2)):
        few, many = load(tmp_path, split), load(root, split)
        assert few['images'] == many['images'][:count]
        kept = [item for item in many['annotations'] if item['image_id'] <= count]
        assert few['annotations'] == kept
        assert few['categories'] == many['categories']


def test_keys_and_ids_are_those_of_coco(coco, split):
    content = coco.dataset
    assert set(content) == {'info', 'licenses', 'images', 'annotations', 'categories'}
    assert [item['name'] for item in content['categories']] == list(CLASSES)
    assert len(coco.imgs) == len(content['images']) == COUNTS[split]
    assert len(coco.anns) == len(content['annotations'])
    # COCOeval takes an annotation with the id 0 for no match.
    assert min(coco.anns) == 1
    for item in content['annotations']:
        assert set(item) == {
            'id',
            'image_id',
            'category_id',
            'bbox',
            'area',
            'segmentation',
            'iscrowd',
        }
        assert item['image_id'] in coco.imgs
        assert item['category_id'] in coco.cats


def test_images_have_the_sizes_of_their_entries(root, coco, split, scenes):
    sides = set()
    for entry, scene in zip(coco.dataset['images'], scenes, strict=True):
        written = generated.cv2.imread(str(root / split / entry['file_name']))
        assert np.array_equal(written, scene.image)
        assert scene.image.shape == (entry['height'], entry['width'], 3)
        sides.add((entry['height'], entry['width']))
    assert len(sides) > COUNTS[split] // 2
    assert {height > width for height, width in sides} == {True, False}
    assert min(map(min, sides)) >= SIDE_RANGE[0]
    assert max(map(max, sides)) <= SIDE_RANGE[1]


def test_annotations_say_what_is_visible(coco, scenes):
    """Decoded by pycocotools, every segmentation is the visible mask, area and box are its own."""
    items = [item for scene in scenes for item in scene.objects]
    for annotation, item in zip(coco.dataset['annotations'], items, strict=True):
        assert annotation['category_id'] == item.category + 1
        assert annotation['iscrowd'] == item.is_crowd
        assert isinstance(annotation['segmentation'], dict if item.is_crowd else list)
        mask = coco.annToMask(annotation).astype(bool)
        assert np.array_equal(mask, item.visible)
        encoded = coco.annToRLE(annotation)
        assert annotation['area'] == mask_utils.area(encoded)
        assert annotation['bbox'] == mask_utils.toBbox(encoded).tolist()


def test_visible_masks_do_not_overlap(coco):
    for image_id in coco.imgs:
        annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        if annotations:
            assert sum(coco.annToMask(item) for item in annotations).max() == 1


def test_split_has_every_kind(coco):
    """Every class, crowds, images without objects, and COCO's three sizes in fair shares."""
    objects = coco.loadAnns(coco.getAnnIds(iscrowd=False))
    assert {item['category_id'] for item in objects} == set(coco.cats)
    assert coco.getAnnIds(iscrowd=True)
    empty = [image_id for image_id in coco.imgs if not coco.getAnnIds(image_id)]
    assert 0 < len(empty) <= len(coco.imgs) / 8
    areas = np.array([item['area'] for item in objects])
    assert np.mean(areas < 32**2) > 0.1
    assert np.mean((areas >= 32**2) & (areas < 96**2)) > 0.3
    assert np.mean(areas >= 96**2) > 0.05


def test_objects_hide_each_other(coco, scenes):
    objects = objects_of(scenes)
    shown = np.array([item.visible.sum() / item.full.sum() for item in objects])
    # At least seven tenths of each are left, so that a small detector can learn them in minutes.
    assert np.mean(shown < 1) > 0.25
    assert np.mean(shown < 0.9) > 0.1
    # Some in such a way that more than one part is left.
    annotations = coco.loadAnns(coco.getAnnIds(iscrowd=False))
    assert any(len(item['segmentation']) > 1 for item in annotations)


def test_objects_leave_the_image_but_stay_recognisable(scenes):
    objects = objects_of(scenes)
    assert any(item.full.sum() < item.full_area for item in objects)
    for item in objects:
        assert not (item.visible & ~item.full).any()
        assert item.visible.sum() >= 0.7 * item.full_area


@pytest.mark.parametrize('name', CLASSES)
def test_outlines_of_all_classes_have_area_one(name):
    """Else the size would tell something about the class."""
    steps = (np.arange(2000) + 0.5) / 1000 - 1
    inside = generated._INSIDE[name](steps[None, :], steps[:, None])
    assert inside.mean() * 4 == pytest.approx(1, abs=2e-3)
    assert np.hypot(*np.broadcast_arrays(steps[None, :], steps[:, None]))[inside].max() < 0.95


MASKS = {
    'pixel': ('#', 1),
    'full': ('### ###', 1),
    'bar': ('.## .## ...', 1),
    'notch': ('#.# ### #..', 1),
    'touching corners': ('#.. .#. ..#', 1),
    'touching corners the other way': ('..# .#. #..', 1),
    'two parts': ('##.## ##.## ##..#', 2),
    'open ring': ('#### #..# #.##', 1),
}


def parse(rows):
    return np.array([[pixel == '#' for pixel in row] for row in rows.split()])


def decode(segmentation, mask):
    encoded = mask_utils.frPyObjects(segmentation, *mask.shape)
    return mask_utils.decode(mask_utils.merge(encoded)).astype(bool)


@pytest.mark.parametrize(('rows', 'parts'), MASKS.values(), ids=MASKS)
def test_polygons_decode_to_their_mask(rows, parts):
    mask = parse(rows)
    polygons = generated.mask_to_polygons(mask)
    assert len(polygons) == parts
    assert all(len(polygon) >= 8 and len(polygon) % 2 == 0 for polygon in polygons)
    assert np.array_equal(decode(polygons, mask), mask)


def has_hole(mask):
    """Whether a pixel of the background cannot be reached from outside, side by side."""
    outside = np.pad(mask, 1) * -1
    todo = [(0, 0)]
    while todo:
        y, x = todo.pop()
        if 0 <= y < outside.shape[0] and 0 <= x < outside.shape[1] and outside[y, x] == 0:
            outside[y, x] = 1
            todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return (outside == 0).any()


def test_polygons_of_random_masks_decode_to_their_mask():
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(300, 5, 7)) < 0.4
    holes = [has_hole(mask) for mask in masks]
    assert 50 < sum(holes) < 250
    for mask, is_refused in zip(masks, holes, strict=True):
        if is_refused:
            with pytest.raises(ValueError, match='holes'):
                generated.mask_to_polygons(mask)
        else:
            assert np.array_equal(decode(generated.mask_to_polygons(mask), mask), mask)


def test_empty_mask_has_no_polygons():
    assert generated.mask_to_polygons(np.zeros((2, 3), bool)) == []


@pytest.mark.parametrize('rows', ['### #.# ###', '.#. #.# .#.', '##### #.#.# #####'])
def test_polygons_refuse_holes(rows):
    with pytest.raises(ValueError, match='holes'):
        generated.mask_to_polygons(parse(rows))


@pytest.mark.parametrize('rows', ['.#. ###', '##. #..', '...', '###', '.#. #.# .#.'])
def test_run_lengths_decode_to_their_mask(rows):
    mask = parse(rows)
    encoded = mask_utils.frPyObjects(generated.mask_to_rle(mask), *mask.shape)
    assert np.array_equal(mask_utils.decode(encoded), mask)


def test_complete_set_is_kept(tmp_path):
    assert generate_coco(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert not generate_coco(tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


@pytest.mark.parametrize(
    'changed',
    [
        {'num_train': 4},
        {'num_val': 3},
        {'seed': 1},
        {'side_range': (96, 128)},
    ],
    ids=str,
)
def test_other_settings_replace_the_set(tmp_path, changed):
    generate_coco(tmp_path / 'a', **SMALL)
    assert generate_coco(tmp_path / 'a', **{**SMALL, **changed})
    generate_coco(tmp_path / 'b', **{**SMALL, **changed})
    assert read(tmp_path / 'a') == read(tmp_path / 'b')


def test_other_version_replaces_the_set(tmp_path, monkeypatch):
    generate_coco(tmp_path, **SMALL)
    monkeypatch.setattr(generated, 'VERSION', generated.VERSION + 1)
    assert generate_coco(tmp_path, **SMALL)


def test_missing_image_is_drawn_again(tmp_path):
    generate_coco(tmp_path, **SMALL)
    before = read(tmp_path)
    (tmp_path / 'val' / 'shapes_000002.png').unlink()
    assert generate_coco(tmp_path, **SMALL)
    assert read(tmp_path) == before


@pytest.mark.parametrize('there', [False, True])
def test_interrupted_set_is_not_taken_for_complete(tmp_path, monkeypatch, there):
    """Whether or not there was a complete set of other settings before."""
    if there:
        generate_coco(tmp_path / 'a', **SMALL, seed=1)

    def interrupt(seed, split, index, side_range):
        if (split, index) == ('val', 1):
            raise KeyboardInterrupt
        return draw_scene(seed, split, index, side_range)

    with monkeypatch.context() as patch:
        patch.setattr(generated, 'draw_scene', interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate_coco(tmp_path / 'a', **SMALL)
    assert (tmp_path / 'a' / 'val' / 'shapes_000001.png').exists()
    assert not list((tmp_path / 'a').rglob('*.json'))
    assert generate_coco(tmp_path / 'a', **SMALL)
    generate_coco(tmp_path / 'b', **SMALL)
    assert read(tmp_path / 'a') == read(tmp_path / 'b')


def test_annotations_of_another_data_set_are_kept(tmp_path):
    path = tmp_path / 'annotations' / 'instances_val.json'
    path.parent.mkdir()
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    before = read(tmp_path)
    with pytest.raises(FileExistsError, match='instances_val.json'):
        generate_coco(tmp_path, **SMALL)
    assert read(tmp_path) == before


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('num_train', 0),
        ('num_train', 2.0),
        ('num_val', -1),
        ('num_val', True),
        ('seed', -1),
        ('seed', '0'),
        ('side_range', 160),
        ('side_range', (160,)),
        ('side_range', (63, 160)),
        ('side_range', (160.0, 256)),
        ('side_range', (256, 160)),
    ],
)
def test_bad_argument_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        generate_coco(tmp_path / 'out', **{name: value})
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('name', 'value'),
    [('seed', -1), ('split', 'test'), ('index', -1), ('side_range', (10, 20))],
)
def test_bad_argument_of_scene_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        draw_scene(**{'seed': 0, 'split': 'val', 'index': 0, name: value})


def test_smallest_sides_have_room_for_objects():
    scenes = [draw_scene(0, 'train', index, (64, 64)) for index in range(16)]
    assert sum(bool(scene.objects) for scene in scenes) == 15


def test_command_writes_once(tmp_path, capsys):
    main = runpy.run_path(str(TOOL))['main']
    args = [str(tmp_path), '--num-train', '2', '--num-val', '1', '--seed', '4']
    args += ['--side-range', '64', '96']
    main(args)
    assert 'wrote 2 training and 1 validation images, seed 4' in capsys.readouterr().out
    assert load(tmp_path, 'train')['info']['settings']['side_range'] == [64, 96]
    main(args)
    assert 'already has' in capsys.readouterr().out


def test_command_names_a_bad_argument(tmp_path):
    main = runpy.run_path(str(TOOL))['main']
    with pytest.raises(SystemExit, match='num_train'):
        main([str(tmp_path), '--num-train', '0'])

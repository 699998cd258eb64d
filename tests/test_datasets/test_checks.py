"""Faulty data sets are named, with the file and the id, before anything is trained on them."""

import json
import shutil

import pytest
from mmengine.config import Config
from tiny_config import ROOT, run_tool, write_config

from ubn_det.datasets import InputError, check_data

TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    """A config and its data set, which take longer to draw than to copy."""
    return write_config(tmp_path_factory.mktemp('sound'), max_iters=1)


@pytest.fixture
def config(sound, tmp_path):
    shutil.copytree(sound.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / sound.name
    path.write_text(path.read_text().replace(str(sound.parent), str(tmp_path)))
    return path


def annotations(config, split):
    return config.parent / f'data/annotations/instances_{split}.json'


def edit(config, split, change):
    """Change the annotation file of a split; return its path."""
    path = annotations(config, split)
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))
    return path


def check(config, *stages):
    check_data(Config.fromfile(config), stages)


def change(section, **values):
    def apply(dataset):
        dataset[section][1].update(values)

    return apply


def remove(section, key):
    def apply(dataset):
        del dataset[section][1][key]

    return apply


def test_sound_data_passes_without_a_word(config, capsys):
    check(config, 'train', 'val', 'test')
    assert capsys.readouterr().err == ''


FAULTS = [
    (lambda d: d.update(annotations=[]), 'has no annotations'),
    (lambda d: d.pop('annotations'), 'has no annotations'),
    (lambda d: d.update(images=[]), 'has no images'),
    (lambda d: d.pop('categories'), 'has no categories'),
    (change('annotations', category_id=77), 'annotation id 2: category_id 77 is not in'),
    (change('annotations', image_id=77), 'annotation id 2: image_id 77 is not in'),
    (change('annotations', id=1), 'annotations[1]: id 1 occurs twice'),
    (change('annotations', bbox=[1, 2, 3]), 'annotation id 2: bbox [1, 2, 3] is not four finite'),
    (change('annotations', bbox=[1, 2, -3, 4]), 'annotation id 2: bbox [1, 2, -3, 4] has a neg'),
    (change('annotations', segmentation=[[1, 2, None]]), 'annotation id 2: segmentation has a'),
    (remove('annotations', 'area'), "annotation id 2: has no 'area'"),
    (remove('annotations', 'segmentation'), "annotation id 2: has no 'segmentation'"),
    (remove('annotations', 'bbox'), "annotation id 2: has no 'bbox'"),
    (remove('images', 'file_name'), 'image id 2: has no file_name'),
    (remove('images', 'height'), 'image id 2: height None is not a positive integer'),
    (change('images', width=0), 'image id 2: width 0 is not a positive integer'),
    (change('images', file_name='none.png'), 'none.png (image id 2)'),
    (change('categories', name='gnu'), 'has no category'),
]


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(('fault', 'message'), FAULTS)
def test_faults_name_the_file_and_the_id(config, split, fault, message):
    path = edit(config, split, fault)
    with pytest.raises(InputError) as raised:
        check(config, 'train', 'val')
    assert str(raised.value).startswith(f'{path}: ')
    assert message in str(raised.value)


LOST = [
    (change('annotations', bbox=[5000, 1, 9, 9]), 'outside of the image'),
    (change('annotations', bbox=[1, 1, 0, 9]), 'with no area or less than a pixel wide or high'),
    (change('annotations', area=0), 'with no area or less than a pixel wide or high'),
    (change('annotations', segmentation=[[1, 1, 5, 5, 9, 9]]), 'with a mask of no area'),
]
# What COCOeval would read as something else is left out in training.
LOST_IN_TRAINING = [
    (change('annotations', segmentation=[[1, 1, 5, 5]]), 'with a mask of no area'),
    (change('annotations', segmentation=[]), 'with a mask of no area'),
]


@pytest.mark.parametrize(('fault', 'reason'), LOST + LOST_IN_TRAINING)
def test_objects_that_mmdet_leaves_out_are_named(config, capsys, fault, reason):
    path = edit(config, 'train', fault)
    check(config, 'train', 'val')
    assert capsys.readouterr().err == (
        f'warning: {path}: 1 annotations {reason}, they are left out: id 2\n'
    )


@pytest.mark.parametrize(('fault', 'reason'), LOST)
def test_objects_that_nothing_can_match_are_named(config, capsys, fault, reason):
    path = edit(config, 'val', fault)
    check(config, 'test')
    assert capsys.readouterr().err == (
        f'warning: {path}: 1 annotations {reason}, they count as objects that are missed: id 2\n'
    )


@pytest.mark.parametrize(('fault', 'reason'), LOST_IN_TRAINING)
def test_polygons_that_cocoeval_misreads_are_errors_in_evaluation(config, fault, reason):
    path = edit(config, 'val', fault)
    with pytest.raises(InputError, match=f'{path}: annotation id 2: segmentation has'):
        check(config, 'val')


def test_data_set_of_which_nothing_is_left(config):
    """mmengine's sampler would wait for ever for the first index of an empty data set."""

    def empty(dataset):
        for annotation in dataset['annotations']:
            annotation['area'] = 0

    path = edit(config, 'train', empty)
    with pytest.raises(InputError, match=f'{path}: all of its .* annotations are left out'):
        check(config, 'train')


def test_many_ids_are_counted(config, capsys):
    def empty(dataset):
        for annotation in dataset['annotations'][:7]:
            annotation['area'] = 0

    edit(config, 'train', empty)
    check(config, 'train')
    assert capsys.readouterr().err.endswith('left out: id 1, 2, 3, 4, 5 and 2 more\n')


def test_masks_may_be_missing_where_none_are_loaded(config):
    path = edit(config, 'train', remove('annotations', 'segmentation'))
    cfg = Config.fromfile(config)
    with pytest.raises(InputError, match=f'{path}.*segmentation'):
        check_data(cfg, ('train',))
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    check_data(cfg, ('train',))


def test_images_without_annotations_are_tested_where_nothing_is_evaluated(config):
    edit(config, 'val', lambda dataset: dataset.pop('annotations'))
    cfg = Config.fromfile(config)
    cfg.test_evaluator.format_only = True
    check_data(cfg, ('test',))


def wrap(cfg, how):
    inner = cfg.train_dataloader.dataset
    if how == 'repeated':
        return dict(type='RepeatDataset', times=2, dataset=inner)
    return dict(type='ConcatDataset', datasets=[dict(type='RepeatDataset', dataset=inner)])


@pytest.mark.parametrize('how', ['repeated', 'concatenated'])
def test_wrapped_data_sets_are_checked(config, how):
    edit(config, 'train', change('annotations', category_id=77))
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset = wrap(cfg, how)
    with pytest.raises(InputError, match='category_id 77'):
        check_data(cfg, ('train',))


def test_annotations_of_the_evaluator_are_checked(config, tmp_path):
    cfg = Config.fromfile(config)
    cfg.test_evaluator = [cfg.test_evaluator]
    cfg.test_evaluator[0].ann_file = str(tmp_path / 'missing.json')
    with pytest.raises(InputError, match='missing.json: No such file'):
        check_data(cfg, ('test',))


@pytest.mark.parametrize('setting', [dict(backend_args=dict(backend='petrel')), dict(type='Mine')])
def test_other_data_sets_are_left_to_mmdet(config, setting):
    annotations(config, 'train').unlink()
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset.update(setting)
    check_data(cfg, ('train',))


def test_only_the_first_process_of_a_machine_checks(config, monkeypatch):
    annotations(config, 'train').unlink()
    cfg = Config.fromfile(config)
    cfg.launcher = 'pytorch'
    monkeypatch.setenv('LOCAL_RANK', '1')
    check_data(cfg, ('train',))
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(InputError, match='No such file'):
        check_data(cfg, ('train',))


def break_json(config):
    path = annotations(config, 'val')
    path.write_text(path.read_text()[:-5])
    return path, 'broken JSON'


def drop_image(config):
    path = annotations(config, 'val')
    image = json.loads(path.read_text())['images'][0]
    (config.parent / 'data/val' / image['file_name']).unlink()
    return path, f'val/{image["file_name"]} (image id {image["id"]})'


@pytest.mark.parametrize('break_it', [break_json, drop_image])
@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_tools_end_with_one_line(config, tmp_path, tool, break_it):
    path, message = break_it(config)
    command = [ROOT / 'tools' / tool, config, *(['none.pth'] if tool == 'test.py' else [])]
    done = run_tool(*command, '--work-dir', tmp_path / 'run', check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f'{tool}: error: {path}: ') and message in last
    assert 'Traceback' not in done.stderr

"""Tests of tools/eval_coco.py, against pycocotools called directly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('pycocotools')

from pycocotools import mask as mask_utils  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

TOOL = Path(__file__).parents[2] / 'tools' / 'eval_coco.py'
# The tool imports its neighbours, as it does when it is run.
sys.path.append(str(TOOL.parent))

import eval_coco  # noqa: E402
from annotations import decode_counts  # noqa: E402

HEIGHT, WIDTH = 240, 320
# In the order of a file, which need not be sorted. The last two have no figures of their own:
# no annotation is a bird, and every sheep is in a crowd.
CATEGORIES = {12: 'zebra', 3: 'apple', 7: 'cup', 20: 'bird', 5: 'sheep'}
STATS = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']
STATS += ['AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000']


def triangle(box):
    """A polygon that fills half of its box: the two areas often differ in their size class."""
    x, y, width, height = box
    return [[x, y, x + width, y, x, y + height]]


def encode(polygons):
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, HEIGHT, WIDTH))
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def encode_runs(runs):
    """COCO's compressed counts of any numbers, those of no mask included."""
    counts = ''
    for index, value in enumerate(runs):
        value -= runs[index - 2] if index > 2 else 0
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            counts += chr(48 + bits + 32 * more)
    return counts


def random_box(rng, low, high):
    width, height = rng.uniform(low, high, 2)
    x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
    return [float(value) for value in (x, y, width, height)]


def make_dataset():
    rng = np.random.default_rng(0)
    images = [{'id': 10 * i + 4, 'height': HEIGHT, 'width': WIDTH} for i in range(6)]
    annotations = []

    def annotate(image_id, category_id, box, segmentation, iscrowd=0):
        annotations.append(
            {
                'id': len(annotations) + 1,
                'image_id': image_id,
                'category_id': category_id,
                'bbox': box,
                'area': box[2] * box[3] / 2,
                'segmentation': segmentation,
                'iscrowd': iscrowd,
            }
        )

    for image in images:
        for category_id in (3, 7, 12):
            for low, high in ((10, 30), (35, 90), (120, 200)):
                box = random_box(rng, low, high)
                annotate(image['id'], category_id, box, triangle(box))
    # The two other ways of the format to write a mask.
    box = random_box(rng, 40, 80)
    annotate(images[0]['id'], 7, box, encode(triangle(box)))
    crowd = {'size': [HEIGHT, WIDTH], 'counts': [0, HEIGHT * 100, HEIGHT * (WIDTH - 100)]}
    for category_id in (5, 7):
        annotate(images[1]['id'], category_id, [0.0, 0.0, 100.0, HEIGHT], crowd, iscrowd=1)
    categories = [{'id': id_, 'name': name} for id_, name in CATEGORIES.items()]
    return {'images': images, 'categories': categories, 'annotations': annotations}


def make_results(dataset, seed, jitter):
    """Results as CocoMetric writes them: moved annotations, false alarms, missed objects."""
    rng = np.random.default_rng(seed)
    bbox, segm = [], []

    def detect(image_id, category_id, box, score):
        entry = {
            'image_id': image_id,
            'bbox': box,
            'score': float(score),
            'category_id': category_id,
        }
        bbox.append(entry)
        # Mask scores can differ from box scores.
        rle = encode(triangle(box))
        segm.append({**entry, 'score': float(score) ** 2 * 0.9, 'segmentation': rle})

    for annotation in dataset['annotations']:
        if rng.random() < 0.15:
            continue
        box = np.array(annotation['bbox'])
        box[:2] += rng.normal(0, jitter, 2) * box[2:]
        box[2:] *= np.exp(rng.normal(0, jitter, 2))
        detect(annotation['image_id'], annotation['category_id'], box.tolist(), rng.random())
    for image in dataset['images']:
        for category_id in CATEGORIES:
            detect(image['id'], category_id, random_box(rng, 20, 150), rng.random())
    # So many false alarms that objects are found at about the ranks 1, 110 and 340 only: what
    # the limits of 100, 300 and 1000 detections per image and category leave out.
    first = dataset['images'][0]['id']
    for _ in range(360):
        detect(first, 3, random_box(rng, 10, 30), rng.uniform(0.2, 1))
    for annotation, score in zip(dataset['annotations'][:3], (0.999, 0.75, 0.25)):
        detect(first, 3, annotation['bbox'], score)
    return bbox, segm


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A folder with ann.json and the results of two runs, by the prefixes ubn and bn."""
    dataset = make_dataset()
    write(tmp_path / 'ann.json', dataset)
    for name, seed, jitter in (('ubn', 1, 0.05), ('bn', 2, 0.12)):
        for metric, results in zip(('bbox', 'segm'), make_results(dataset, seed, jitter)):
            write(tmp_path / f'{name}.{metric}.json', results)
    return tmp_path


def reference(ann_file, result_file, metric, **params):
    """COCOeval by hand, on the detections' mask areas as in mmdet."""
    ground_truth = COCO(str(ann_file))
    entries = json.loads(Path(result_file).read_text())
    if metric == 'segm':
        entries = [{key: entry[key] for key in entry if key != 'bbox'} for entry in entries]
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(entries), metric)
    evaluation.params.maxDets = [100, 300, 1000]
    for key, value in params.items():
        setattr(evaluation.params, key, value)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def reference_figures(ann_file, result_file, metric):
    stats = reference(ann_file, result_file, metric).stats
    return {
        f'{metric}_{name}': None if value == -1 else pytest.approx(value, abs=1e-12)
        for name, value in zip(STATS, stats)
    }


def reference_class(ann_file, result_file, metric, category_id):
    """The six figures of one class, from an evaluation of that class alone."""
    evaluation = reference(ann_file, result_file, metric, catIds=[category_id])
    # COCOeval's own mAP counts 100 detections per image; mmdet's per-class mAP counts 1000.
    precision = evaluation.eval['precision'][:, :, 0, 0, 2]
    values = [precision.mean() if (precision > -1).all() else -1, *evaluation.stats[1:6]]
    return {
        name: None if value == -1 else pytest.approx(value, abs=1e-12)
        for name, value in zip(STATS, values)
    }


def evaluate(files, *args):
    """Runs the tool with --out and returns what it wrote."""
    out = files / 'out.json'
    args = [str(arg) for arg in args]
    assert eval_coco.main([str(files / 'ann.json'), *args, '--out', str(out)]) == 0
    return json.loads(out.read_text())


def table_rows(text):
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize('metric', ['bbox', 'segm'])
def test_figures_equal_pycocotools(files, metric):
    run = evaluate(files, files / 'ubn', '--metric', metric)['runs'][str(files / 'ubn')]
    expected = reference_figures(files / 'ann.json', files / f'ubn.{metric}.json', metric)
    assert run['metrics'] == expected
    assert list(run['metrics']) == [f'{metric}_{name}' for name in STATS]
    assert run['detections'] == {metric: run['detections'][metric]}
    assert run['detections'][metric] > 400


def test_data_tells_the_settings_apart(files):
    """The figures above depend on the settings of mmdet that they have to follow."""
    ann = files / 'ann.json'
    stats = reference(ann, files / 'ubn.bbox.json', 'bbox').stats
    assert stats[6] < stats[7] < stats[8]
    plain = reference(ann, files / 'ubn.bbox.json', 'bbox', maxDets=[1, 10, 100]).stats
    assert not np.isclose(plain[[1, 2, 6, 7, 8, 10]], stats[[1, 2, 6, 7, 8, 10]]).any()

    ground_truth = COCO(str(ann))
    by_box = COCOeval(ground_truth, ground_truth.loadRes(str(files / 'ubn.segm.json')), 'segm')
    by_box.evaluate()
    by_box.accumulate()
    by_box.summarize()
    by_mask = reference(ann, files / 'ubn.segm.json', 'segm', maxDets=[1, 10, 100])
    assert by_box.stats[0] == by_mask.stats[0]
    assert not np.isclose(by_box.stats[4:6], by_mask.stats[4:6]).any()


def test_table_shows_the_figures_and_nothing_of_pycocotools(files, capfd):
    metrics = evaluate(files, files / 'ubn', '--names', 'UBN')['runs']['UBN']['metrics']
    output = capfd.readouterr()
    assert output.err == ''
    rows = table_rows(output.out)
    title = f'{files / "ann.json"}: 6 images, 57 annotations, 5 categories'
    assert output.out.splitlines()[0] == title
    assert rows[2] == ['metric', 'UBN']
    # Title, blank, header and rule; then 24 figures; nothing after them.
    assert rows[4:] == [[key, f'{metrics[key]:.3f}'] for key in metrics]
    assert len(metrics) == 24


@pytest.mark.parametrize('metric', ['bbox', 'segm'])
def test_classwise_equals_evaluating_each_class_alone(files, metric):
    report = evaluate(files, files / 'ubn', '--metric', metric, '--classwise')
    found = report['runs'][str(files / 'ubn')]['classwise'][metric]
    # In the order of the ids; without birds, of which there is no annotation.
    assert list(found) == ['apple', 'sheep', 'cup', 'zebra']
    for category_id, name in CATEGORIES.items():
        if name != 'bird':
            expected = reference_class(
                files / 'ann.json', files / f'ubn.{metric}.json', metric, category_id
            )
            assert found[name] == expected
    assert set(found['sheep'].values()) == {None}


def test_classwise_table_of_one_run(files, capsys):
    report = evaluate(files, files / 'ubn.bbox.json', '--classwise', '--names', 'UBN')
    output = capsys.readouterr().out
    rows = table_rows(output)
    assert ['bbox', 'of', *STATS[:6]] in rows
    assert ['sheep', *'------'] in rows
    cup = report['runs']['UBN']['classwise']['bbox']['cup']
    assert ['cup', *(f'{cup[name]:.3f}' for name in STATS[:6])] in rows
    assert 'Not listed, since without annotations: 1 of 5 categories' in output


def test_two_runs_and_their_difference(files, capsys):
    report = evaluate(files, files / 'ubn', files / 'bn', '--names', 'UBN', 'BN', '--classwise')
    rows = table_rows(capsys.readouterr().out)
    assert ['metric', 'UBN', 'BN', 'UBN', '-', 'BN'] in rows
    for metric in ('bbox', 'segm'):
        stats = {
            name: reference(files / 'ann.json', files / f'{name}.{metric}.json', metric).stats
            for name in ('ubn', 'bn')
        }
        for name, ubn, bn in zip(STATS, stats['ubn'], stats['bn']):
            key = f'{metric}_{name}'
            assert report['runs']['UBN']['metrics'][key] == pytest.approx(ubn)
            assert report['runs']['BN']['metrics'][key] == pytest.approx(bn)
            assert report['difference']['metrics'][key] == pytest.approx(ubn - bn)
            assert [key, f'{ubn:.3f}', f'{bn:.3f}', f'{ubn - bn:+.3f}'] in rows
        ubn, bn = (
            reference_class(files / 'ann.json', files / f'{name}.{metric}.json', metric, 12)
            for name in ('ubn', 'bn')
        )
        of_zebras = report['difference']['classwise'][metric]['zebra']
        assert list(of_zebras) == STATS[:6]
        for name in STATS[:6]:
            expected = ubn[name].expected - bn[name].expected
            assert of_zebras[name] == pytest.approx(expected)
        assert set(report['difference']['classwise'][metric]['sheep'].values()) == {None}
        ubn, bn = ubn['mAP'].expected, bn['mAP'].expected
        assert ['zebra', f'{ubn:.3f}', f'{bn:.3f}', f'{ubn - bn:+.3f}'] in rows
    assert rows.count(['sheep', '-', '-', '-']) == 2


def test_names_default_to_the_results(files):
    ubn, bn = str(files / 'ubn.bbox.json'), str(files / 'bn.bbox.json')
    report = evaluate(files, ubn, bn)
    assert list(report['runs']) == [ubn, bn]
    assert report['runs'][bn]['files'] == {'bbox': bn}
    assert 'classwise' not in report['runs'][bn]
    assert 'classwise' not in report['difference']


def test_metric_of_only_one_run(files, capsys):
    (files / 'bn.segm.json').unlink()
    report = evaluate(files, files / 'ubn', files / 'bn', '--names', 'UBN', 'BN', '--classwise')
    assert report['difference']['metrics']['bbox_mAP'] is not None
    assert report['difference']['metrics']['segm_mAP'] is None
    assert list(report['difference']['classwise']) == ['bbox']
    assert report['notes'] == ['BN has no segm results']
    output = capsys.readouterr().out
    assert 'Note: BN has no segm results.' in output
    ubn = report['runs']['UBN']
    rows = table_rows(output)
    assert ['segm_mAP', f'{ubn["metrics"]["segm_mAP"]:.3f}', '-', '-'] in rows
    assert ['cup', f'{ubn["classwise"]["segm"]["cup"]["mAP"]:.3f}', '-', '-'] in rows


@pytest.mark.parametrize(
    ('result', 'args', 'metrics'),
    [
        ('ubn', [], ['bbox', 'segm']),
        ('ubn', ['--metric', 'segm'], ['segm']),
        ('only_boxes', [], ['bbox']),
        ('ubn.bbox.json', [], ['bbox']),
        ('ubn.segm.json', [], ['segm']),
        ('results.json', ['--metric', 'bbox'], ['bbox']),
        ('ubn.segm.json', ['--metric', 'bbox', 'segm'], ['bbox', 'segm']),
    ],
)
def test_what_is_evaluated(files, result, args, metrics):
    for name in ('only_boxes.bbox.json', 'results.json'):
        write(files / name, (files / 'ubn.bbox.json').read_text())
    run = evaluate(files, files / result, *args, '--names', 'run')['runs']['run']
    assert list(run['files']) == metrics
    assert [key for key in run['metrics'] if key.endswith('_mAP')] == [
        f'{metric}_mAP' for metric in metrics
    ]


def test_boxes_alone_need_no_masks_in_the_annotations(files):
    dataset = make_dataset()
    for image in dataset['images']:
        del image['height'], image['width']
    for annotation in dataset['annotations']:
        del annotation['segmentation']
    expected = reference_figures(files / 'ann.json', files / 'ubn.bbox.json', 'bbox')
    write(files / 'ann.json', dataset)
    run = evaluate(files, files / 'ubn.bbox.json', '--names', 'UBN')['runs']['UBN']
    assert run['metrics'] == expected


@pytest.mark.parametrize('metric', ['bbox', 'segm'])
def test_empty_results_are_zero(files, metric, capsys):
    empty = write(files / f'empty.{metric}.json', [])
    report = evaluate(files, empty, '--names', 'UBN', '--classwise')
    run = report['runs']['UBN']
    assert run['metrics'] == {f'{metric}_{name}': 0.0 for name in STATS}
    assert set(run['classwise'][metric]['cup'].values()) == {0.0}
    assert set(run['classwise'][metric]['sheep'].values()) == {None}
    assert report['notes'] == [f'UBN: {empty} holds no detections, so its defined figures are 0']
    output = capsys.readouterr().out
    assert f'Note: {report["notes"][0]}.' in output
    assert [f'{metric}_mAP', '0.000'] in table_rows(output)


def test_undefined_figures_are_null_and_no_number(files, capsys):
    dataset = make_dataset()
    dataset['annotations'] = [
        annotation for annotation in dataset['annotations'] if annotation['area'] < 32**2
    ]
    write(files / 'ann.json', dataset)
    report = evaluate(
        files, files / 'ubn.bbox.json', files / 'bn.bbox.json', '--names', 'UBN', 'BN'
    )
    for part in (*report['runs'].values(), report['difference']):
        assert part['metrics']['bbox_mAP_s'] is not None
        assert part['metrics']['bbox_mAP_l'] is None
        assert part['metrics']['bbox_AR_l@1000'] is None
    rows = table_rows(capsys.readouterr().out)
    assert ['bbox_mAP_l', '-', '-', '-'] in rows
    assert not any('-1.000' in row for row in rows)


@pytest.mark.parametrize(
    ('value', 'signed', 'text'),
    [
        (None, False, '-'),
        (None, True, '-'),
        # numpy and so mmdet have 0.0 here, Python's own formatting 0.001.
        (0.0005, False, '0.000'),
        (0.34567, False, '0.346'),
        (0.0123, True, '+0.012'),
        (-0.0123, True, '-0.012'),
        (-0.0001, True, '+0.000'),
    ],
)
def test_format_figure(value, signed, text):
    assert eval_coco.format_figure(value, signed) == text


def test_decode_counts_inverts_the_encoding():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 7)) < share for share in (0, 0.1, 0.5, 0.9, 1)]
    # Run lengths that need several characters, rising and falling.
    long_runs = np.zeros((900, 800), dtype=bool)
    long_runs[:500, 3:400] = long_runs[20:, 500:] = True
    for mask in [*masks, long_runs]:
        flat = mask.flatten('F')
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
        runs = [0, *runs] if flat[0] else runs
        counts = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))['counts'].decode()
        assert counts == encode_runs(runs)
        assert decode_counts(counts).tolist() == runs


def change(key, value):
    """An edit of the entry at index 2 of a list."""

    def edit(entries):
        entries[2][key] = value

    return edit


def remove(key):
    def edit(entries):
        del entries[2][key]

    return edit


def replace(value):
    def edit(entries):
        entries[2] = value

    return edit


def change_mask(**values):
    def edit(entries):
        entries[2]['segmentation'] = {**entries[2]['segmentation'], **values}

    return edit


RESULT_FAULTS = [
    ('bbox', replace([1, 2]), 'is a list, not an object'),
    ('bbox', remove('image_id'), "has no 'image_id'"),
    ('bbox', remove('category_id'), "has no 'category_id'"),
    ('bbox', remove('score'), "has no 'score'"),
    ('bbox', remove('bbox'), "has no 'bbox'"),
    ('segm', remove('segmentation'), "has no 'segmentation'"),
    ('bbox', change('image_id', 987), 'image_id 987 is not in the annotation file'),
    ('bbox', change('image_id', '4'), "image_id '4' is not in the annotation file"),
    ('bbox', change('image_id', [4]), 'image_id [4] is not in the annotation file'),
    ('bbox', change('category_id', 99), 'category_id 99 is not in the annotation file'),
    ('bbox', change('category_id', None), 'category_id None is not in the annotation file'),
    ('bbox', change('score', float('nan')), 'score nan is not a finite number'),
    ('segm', change('score', float('inf')), 'score inf is not a finite number'),
    ('bbox', change('score', '0.5'), "score '0.5' is not a finite number"),
    ('bbox', change('score', True), 'score True is not a finite number'),
    ('bbox', change('bbox', [1, 2, 3]), 'bbox [1, 2, 3] is not four finite numbers'),
    ('bbox', change('bbox', 5), 'bbox 5 is not four finite numbers'),
    ('bbox', change('bbox', [1, 2, 3, float('nan')]), 'bbox [1, 2, 3, nan] is not four finite'),
    ('bbox', change('bbox', [1, 2, float('inf'), 3]), 'bbox [1, 2, inf, 3] is not four finite'),
    ('bbox', change('bbox', [1, 2, -3, 4]), 'bbox [1, 2, -3, 4] has a negative size'),
    ('bbox', change('bbox', [1, 2, 3, -4]), 'bbox [1, 2, 3, -4] has a negative size'),
    ('segm', change('segmentation', [[1, 2, 3, 4, 5, 6]]), 'is not a run-length encoding'),
    ('segm', change('segmentation', {'size': [240, 320]}), 'is not a run-length encoding'),
    ('segm', change_mask(size=[320, 240]), 'the size [320, 240], its image has [240, 320]'),
    ('segm', change_mask(counts='!!'), 'counts that do not describe a mask'),
    ('segm', change_mask(counts=''), 'counts that do not describe a mask'),
    ('segm', change_mask(counts='o'), 'counts that do not describe a mask'),
    # A number of more bits than a run length can have, which is 0 in 64 bits.
    ('segm', change_mask(counts='P' * 14 + '0' + encode_runs([76800])), 'counts that do not'),
    ('segm', change_mask(counts=encode_runs([0, 76799])), 'counts that do not describe a mask'),
    ('segm', change_mask(counts=encode_runs([76801, -1])), 'counts that do not describe a mask'),
    # A character outside of the encoding, of which only the upper bits differ from a 0.
    ('segm', change_mask(counts='p' + encode_runs([76800])), 'counts that do not describe a mask'),
    ('segm', change_mask(counts=[0, 76800]), 'counts that do not describe a mask'),
]


def check_error(capsys, files, args, *fragments):
    """The tool fails as promised: code 2, one line on stderr, nothing on stdout or written."""
    out = files / 'out.json'
    args = [str(arg) for arg in args]
    assert eval_coco.main([str(files / 'ann.json'), *args, '--out', str(out)]) == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert output.err.startswith('eval_coco.py: error: ')
    assert output.err.count('\n') == 1 and output.err.endswith('\n')
    for fragment in fragments:
        assert fragment in output.err
    assert not out.exists()


@pytest.mark.parametrize(('metric', 'edit', 'message'), RESULT_FAULTS)
def test_faults_of_results(files, capsys, metric, edit, message):
    path = files / f'bn.{metric}.json'
    entries = json.loads(path.read_text())[:5]
    write(path, entries)
    # Sound but for the edit.
    assert eval_coco.main([str(files / 'ann.json'), str(path)]) == 0
    capsys.readouterr()
    edit(entries)
    write(path, entries)
    args = (files / f'ubn.{metric}.json', path)
    check_error(capsys, files, args, f'error: {path}: entry 2: ', message)


ANNOTATION_FAULTS = [
    ('annotations', remove('id'), "annotations[2]: has no 'id'"),
    ('annotations', change('id', 'x'), "annotations[2]: id 'x' is not an integer"),
    ('annotations', change('id', 1), 'annotations[2]: id 1 occurs twice'),
    ('annotations', change('id', 0), 'annotation id 0: COCOeval reads a match with id 0'),
    ('annotations', remove('image_id'), "annotation id 3: has no 'image_id'"),
    ('annotations', remove('category_id'), "annotation id 3: has no 'category_id'"),
    ('annotations', remove('bbox'), "annotation id 3: has no 'bbox'"),
    ('annotations', remove('area'), "annotation id 3: has no 'area'"),
    ('annotations', remove('iscrowd'), "annotation id 3: has no 'iscrowd'"),
    ('annotations', remove('segmentation'), "annotation id 3: has no 'segmentation'"),
    ('annotations', change('image_id', 55), 'annotation id 3: image_id 55 is not in'),
    ('annotations', change('category_id', 55), 'annotation id 3: category_id 55 is not in'),
    ('annotations', change('bbox', [1, 2, 3, -1]), 'annotation id 3: bbox [1, 2, 3, -1] has a'),
    ('annotations', change('area', -1), 'annotation id 3: area -1 is not'),
    ('annotations', change('area', float('nan')), 'annotation id 3: area nan is not'),
    ('annotations', change('iscrowd', 'no'), "annotation id 3: iscrowd 'no' is neither"),
    ('annotations', change('segmentation', []), 'annotation id 3: segmentation has no polygon'),
    ('annotations', change('segmentation', [[1, 2, 3, 4]]), 'a polygon of 4 numbers'),
    ('annotations', change('segmentation', [[1, 2, 3, 4, 5, 6, 7]]), 'a polygon of 7 numbers'),
    ('annotations', change('segmentation', [[1, 2, 3, 4, 5, None]]), 'not a list of finite'),
    ('annotations', change('segmentation', [7]), 'not a list of finite'),
    ('annotations', change('segmentation', 7), 'annotation id 3: segmentation is not a run'),
    (
        'annotations',
        change('segmentation', {'size': [HEIGHT, WIDTH], 'counts': [5, -5, 76800]}),
        'annotation id 3: segmentation has counts that do not describe',
    ),
    ('images', replace(7), 'images[2]: is a int, not an object'),
    ('images', change('id', 4), 'images[2]: id 4 occurs twice'),
    ('images', change('id', 2**63), f'images[2]: id {2**63} is not an integer of 64 bits'),
    ('images', remove('height'), 'image id 24: height None is not a positive integer'),
    ('images', change('width', 0), 'image id 24: width 0 is not a positive integer'),
    ('categories', change('id', 3), 'categories[2]: id 3 occurs twice'),
    ('categories', remove('name'), 'category id 7 has no name'),
    ('categories', change('name', 'zebra'), "category ids 12 and 7 share the name 'zebra'"),
]


@pytest.mark.parametrize(('section', 'edit', 'message'), ANNOTATION_FAULTS)
def test_faults_of_annotations(files, capsys, section, edit, message):
    dataset = make_dataset()
    edit(dataset[section])
    path = write(files / 'ann.json', dataset)
    check_error(capsys, files, (files / 'ubn',), f'error: {path}: ', message)


@pytest.mark.parametrize('section', ['images', 'categories', 'annotations'])
@pytest.mark.parametrize('content', [None, [], {'4': {}}])
def test_annotation_file_without_a_section(files, capsys, section, content):
    dataset = make_dataset()
    if content is None:
        del dataset[section]
    else:
        dataset[section] = content
    path = write(files / 'ann.json', dataset)
    check_error(capsys, files, (files / 'ubn',), f'error: {path}: has no {section}')


def test_annotation_file_of_the_wrong_type(files, capsys):
    path = write(files / 'ann.json', make_dataset()['annotations'])
    check_error(capsys, files, (files / 'ubn',), f'error: {path}: is a list, not an object')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'No such file or directory'),
        ('', 'broken JSON: Expecting value: line 1 column 1 (char 0)'),
        ('[{"image_id": 4},\n {', 'broken JSON: Expecting property name enclosed in double'),
        ('[{"image_id": 4},\n {', 'line 2 column 3 (char 20)'),
        ('[' * 100000, 'broken JSON: maximum recursion depth exceeded'),
    ],
)
@pytest.mark.parametrize('name', ['ann.json', 'ubn.bbox.json'])
def test_unreadable_files(files, capsys, name, content, message):
    path = files / name
    path.unlink()
    if content is not None:
        write(path, content)
    args = (files / 'ubn.bbox.json', files / 'bn.bbox.json')
    check_error(capsys, files, args, f'error: {path}: ', message)


@pytest.mark.parametrize(
    ('edit', 'reason'),
    [
        (change('bbox', [WIDTH, 0, 30, 30]), 'outside of the image'),
        (change('bbox', [-31, 0, 30, 30]), 'outside of the image'),
        (change('bbox', [0, HEIGHT + 5, 30, 30]), 'outside of the image'),
        (change('bbox', [10, 10, 0, 30]), 'with no area or less than a pixel wide or high'),
        (change('area', 0), 'with no area or less than a pixel wide or high'),
        (change('segmentation', [[1, 1, 5, 5, 9, 9]]), 'with a mask of no area'),
    ],
)
def test_annotations_that_are_no_objects(files, capsys, edit, reason):
    dataset = make_dataset()
    edit(dataset['annotations'])
    path = write(files / 'ann.json', dataset)
    assert eval_coco.main([path, str(files / 'ubn')]) == 0
    assert capsys.readouterr().err == (
        f'warning: {path}: 1 annotations {reason}, they count as objects that are missed: id 3\n'
    )


def test_bytes_that_are_no_text(files, capsys):
    path = files / 'ubn.bbox.json'
    path.write_bytes(b'[\xff]')
    check_error(capsys, files, (path,), f'error: {path}: broken JSON: ', 'position 1')


def test_results_that_are_no_list(files, capsys):
    path = write(files / 'ubn.bbox.json', {'bbox': []})
    check_error(capsys, files, (path,), f'error: {path}: is a dict, not a list of detections')


def test_results_that_are_not_there(files, capsys):
    prefix = files / 'none'
    message = f'error: {prefix}: neither {prefix}.bbox.json nor {prefix}.segm.json exists'
    check_error(capsys, files, (prefix,), message)


def test_metric_asked_for_by_name_has_to_be_there(files, capsys):
    (files / 'bn.segm.json').unlink()
    args = (files / 'ubn', files / 'bn', '--metric', 'bbox', 'segm')
    check_error(capsys, files, args, f'error: {files / "bn.segm.json"}: No such file')


def test_file_whose_name_does_not_say_what_it_holds(files, capsys):
    path = write(files / 'results.json', [])
    check_error(capsys, files, (path,), f'error: {path}: ', '--metric')


def test_names_have_to_fit_the_results(files, capsys):
    ubn, bn = files / 'ubn', files / 'bn'
    check_error(capsys, files, (ubn, bn, '--names', 'A'), '--names: 1 given for 2 results')
    check_error(capsys, files, (ubn, bn, '--names', 'A', 'A'), 'A: two runs of one name')
    check_error(capsys, files, (ubn, ubn), f'{ubn}: two runs of one name')


def test_out_has_to_be_a_place_of_its_own(files, capsys):
    ann, result = str(files / 'ann.json'), files / 'ubn.bbox.json'
    content = result.read_text()
    for out, message in (
        (str(result), '--out would overwrite an input'),
        (ann, '--out would overwrite an input'),
        (str(files / 'none' / 'out.json'), '--out is in a folder that does not exist'),
    ):
        assert eval_coco.main([ann, str(result), '--out', out]) == 2
        output = capsys.readouterr()
        assert output.out == ''
        assert output.err == f'eval_coco.py: error: {out}: {message}\n'
    assert result.read_text() == content
    # Found out only by writing.
    assert eval_coco.main([ann, str(result), '--out', str(files)]) == 2
    assert capsys.readouterr().err == f'eval_coco.py: error: {files}: Is a directory\n'


def run_as_program(*args):
    """Runs the tool in a process of its own where mmdet, mmengine and torch do not import."""
    code = (
        'import os, runpy, sys\n'
        'sys.modules.update(dict.fromkeys(["mmdet", "mmengine", "torch"]))\n'
        'sys.argv = sys.argv[1:]\n'
        'sys.path.insert(0, os.path.dirname(sys.argv[0]))\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    command = [sys.executable, '-c', code, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_program_needs_neither_mmdet_nor_torch(files):
    done = run_as_program(files / 'ann.json', files / 'ubn.bbox.json', '--names', 'UBN')
    assert done.returncode == 0 and done.stderr == ''
    assert ['metric', 'UBN'] in table_rows(done.stdout)


def test_program_exits_with_2_and_one_line(files):
    done = run_as_program(files / 'ann.json', files / 'none.bbox.json')
    assert done.returncode == 2 and done.stdout == ''
    missing = files / 'none.bbox.json'
    assert done.stderr == f'eval_coco.py: error: {missing}: No such file or directory\n'


def test_real_annotations(tmp_path, capsys):
    root = os.environ.get('UBN_DATA_ROOT')
    if not root:
        pytest.skip('UBN_DATA_ROOT does not name a folder with coco-tiny')
    ann = Path(root) / 'coco-tiny' / 'annotations' / 'instances_val2017.json'
    if not ann.exists():
        pytest.skip(f'UBN_DATA_ROOT has no {ann.relative_to(root)}')

    rng = np.random.default_rng(0)
    ground_truth = COCO(str(ann))
    bbox, segm = [], []
    for annotation in ground_truth.anns.values():
        box = np.array(annotation['bbox'], dtype=float)
        box[:2] += rng.normal(0, 0.1, 2) * box[2:]
        box[2:] *= np.exp(rng.normal(0, 0.1, 2))
        entry = {
            'image_id': annotation['image_id'],
            'bbox': box.tolist(),
            'score': float(rng.random()),
            'category_id': annotation['category_id'],
        }
        bbox.append(entry)
        moved = dict(annotation)
        if not annotation['iscrowd']:
            # Masks of crowds are run lengths, which do not move as the points of polygons do.
            shift = rng.normal(0, 0.1) * np.sqrt(annotation['area'])
            moved['segmentation'] = [
                (np.array(polygon) + shift).tolist() for polygon in annotation['segmentation']
            ]
        rle = ground_truth.annToRLE(moved)
        segmentation = {'size': rle['size'], 'counts': rle['counts'].decode()}
        segm.append({**entry, 'segmentation': segmentation})
    write(tmp_path / 'real.bbox.json', bbox)
    write(tmp_path / 'real.segm.json', segm)
    capsys.readouterr()

    out = tmp_path / 'out.json'
    args = [str(ann), str(tmp_path / 'real'), '--classwise', '--names', 'real']
    assert eval_coco.main([*args, '--out', str(out)]) == 0
    run = json.loads(out.read_text())['runs']['real']
    for metric in ('bbox', 'segm'):
        result = tmp_path / f'real.{metric}.json'
        expected = reference_figures(ann, result, metric)
        assert {key: run['metrics'][key] for key in expected} == expected
        assert 0.1 < run['metrics'][f'{metric}_mAP'] < 0.9
        category = next(iter(ground_truth.cats.values()))
        found = run['classwise'][metric][category['name']]
        assert found == reference_class(ann, result, metric, category['id'])

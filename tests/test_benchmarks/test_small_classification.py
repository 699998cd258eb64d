"""The study on CIFAR-10, on an archive of noise in its layout."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_classification import CIFAR10, SmallResNet
from tiny_config import ROOT, run_tool

CLASSES = CIFAR10.metainfo['classes']
STUDY = """
config = '{folder}/config.py'
baseline = 'BN'
seeds = [0]
settings = {{
    'BN': {{}},
    'UBN, condensed': {{
        'model.norm_cfg': dict(type='UBN', condensation_threshold=0.6, warmup=2),
        'train_dataloader.batch_sampler': dict(
            type='CondensedBatchSampler', num_batches=8, last=4
        ),
    }},
}}
"""
CONFIG = """
_base_ = '{root}/benchmarks/study/resnet-small_cifar10.py'
cache = dict(dataset=dict(cache_dir='{folder}/cache'))
train_dataloader = dict(cache, batch_size=8)
val_dataloader = cache
test_dataloader = cache
model = dict(channels=(4, 4, 8))
train_cfg = dict(max_iters=8, val_interval=2, dynamic_intervals=[(4, 4)])
param_scheduler = [dict(type='OneCycleLR', by_epoch=False, eta_max=0.1, total_steps=8)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=8))
"""


def write_archive(folder, num_train=4, num_test=2, extra=()):
    """Write images of 10 classes, each of one colour by its class and number."""
    path = folder / 'cifar10.tar.xz'
    with tarfile.open(path, 'w:xz', preset=0) as tar:
        for split, count in (('train', num_train), ('test', num_test)):
            for label, name in enumerate(CLASSES):
                for number in reversed(range(count)):
                    image = np.zeros((32, 32, 3), np.uint8)
                    # RGB; OpenCV has BGR.
                    image[:] = [20 * label, 20 * number, 200 if split == 'test' else 100]
                    _, data = cv2.imencode(
                        '.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 99]
                    )
                    add(tar, f'{split}/{name}/{number:04}.jpg', data.tobytes())
        for name, data in extra:
            add(tar, name, data)
    return path


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def load(folder, split='train', **options):
    return CIFAR10(
        'cifar10.tar.xz', split, data_root=str(folder), cache_dir=str(folder / 'cache'), **options
    )


def test_images_and_labels_are_those_of_the_archive(tmp_path):
    write_archive(tmp_path)
    for split, count, blue in (('train', 4, 100), ('test', 2, 200)):
        dataset = load(tmp_path, split)
        assert len(dataset) == 10 * count
        for i in range(len(dataset)):
            # Classes take turns.
            number, label = divmod(i, 10)
            item = dataset[i]
            assert item['labels'] == label
            assert item['inputs'].dtype == torch.uint8
            colour = torch.tensor([20 * label, 20 * number, blue])[:, None, None]
            # JPEG rounds.
            assert (item['inputs'].int() - colour).abs().max() <= 4
    part = load(tmp_path, start=10, end=25)
    assert [part[i]['labels'] for i in range(len(part))] == [*range(10), *range(5)]


def test_archive_is_decoded_once_and_again_where_it_is_another(tmp_path, monkeypatch):
    path = write_archive(tmp_path)
    load(tmp_path)
    (cache,) = (tmp_path / 'cache').iterdir()
    written = cache.stat().st_mtime_ns
    load(tmp_path, 'test')
    assert cache.stat().st_mtime_ns == written
    os.utime(path, ns=(0, 1))
    load(tmp_path)
    assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_interrupted_decoding_leaves_nothing(tmp_path, monkeypatch):
    write_archive(tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, 'savez', stop)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert not list((tmp_path / 'cache').iterdir())


def test_augmentation_crops_the_padded_image_and_flips_it(tmp_path):
    write_archive(tmp_path)
    dataset = load(tmp_path, augment=True)
    image = np.arange(3 * 32 * 32, dtype=np.uint32).reshape(3, 32, 32) % 255 + 1
    padded = np.pad(image.astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    dataset.images = padded[None]
    crops = {
        (flip, y, x): padded[:, y : y + 32, x : x + 32][..., :: -1 if flip else 1]
        for flip in (False, True)
        for y in range(9)
        for x in range(9)
    }
    names = {crop.tobytes(): name for name, crop in crops.items()}
    np.random.seed(0)
    seen = [names[dataset[0]['inputs'].numpy().tobytes()] for _ in range(2000)]
    assert set(seen) == set(crops)
    assert 0.45 < np.mean([flip for flip, _, _ in seen]) < 0.55
    np.random.seed(0)
    assert names[dataset[0]['inputs'].numpy().tobytes()] == seen[0]
    # Without it an image is always itself.
    plain = load(tmp_path)
    assert torch.equal(plain[3]['inputs'], plain[3]['inputs'])


def test_missing_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no CIFAR-10 archive {tmp_path}/cifar10.tar.xz'):
        load(tmp_path)
    study = write_study(tmp_path)
    done = run_tool(ROOT / 'benchmarks/study.py', study, '--data-root', tmp_path, check=False)
    assert done.returncode == 2
    assert 'no CIFAR-10 archive' in done.stderr
    assert not (tmp_path / 'cache').exists()


def test_what_is_no_image_is_named(tmp_path):
    write_archive(tmp_path, extra=[('train/cat/9999.jpg', b'nothing')])
    with pytest.raises(ValueError, match=r'train/cat/9999.jpg is no image of 32 x 32'):
        load(tmp_path)


def test_split_that_the_archive_lacks_is_named(tmp_path):
    write_archive(tmp_path)
    with pytest.raises(ValueError, match='split: .* has no images val/CLASS/NUMBER.jpg'):
        load(tmp_path, 'val')


def test_network_has_a_norm_after_every_convolution():
    model = SmallResNet(dict(type='BN'), in_channels=3, channels=(16, 32, 64))
    norms = [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sorted(norms) == [16] * 3 + [32] * 3 + [64] * 3
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 9 and all(conv.bias is None for conv in convs)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    assert model(images, labels).shape == (4, 10)
    assert model(images, labels, mode='loss')['loss'].item() == pytest.approx(
        torch.nn.functional.cross_entropy(model(images, labels), labels).item()
    )


def write_study(folder):
    (folder / 'config.py').write_text(CONFIG.format(root=ROOT, folder=folder))
    path = folder / 'study.py'
    path.write_text(STUDY.format(folder=folder))
    return path


def test_study_trains_and_evaluates(tmp_path):
    write_archive(tmp_path)
    study = write_study(tmp_path)
    options = ('--data-root', tmp_path, '--work-dir', tmp_path / 'runs', '--jobs', '1')
    run_tool(ROOT / 'benchmarks/study.py', study, *options)
    with Path(tmp_path / 'runs/study.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    steps = {
        (row['setting'], int(row['step'])) for row in rows if row['tag'] == 'cifar10/accuracy'
    }
    assert steps == {(s, step) for s in ('BN', 'UBN, condensed') for step in (2, 4, 8)}
    [result] = Path(tmp_path / 'runs/bn').glob('*/result.json')
    scalars = json.loads(result.read_text())['scalars']
    rates = [scalars[step]['lr'] for step in sorted(scalars, key=int) if 'lr' in scalars[step]]
    assert max(rates) == pytest.approx(0.1, rel=0.05) and rates[-1] < 1e-3
    # The stream of one image a batch is condensed, and the score says so.
    with Path(tmp_path / 'runs/study_condensation.csv').open(newline='') as file:
        scores = {
            int(row['step']): float(row['value'])
            for row in csv.DictReader(file)
            if row['tag'] == 'condensation/stem.bn'
        }
    assert min(scores[step] for step in range(5, 9)) > max(scores[step] for step in range(1, 5))

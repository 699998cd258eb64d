"""benchmarks/condensed_stream.py: what is in every batch of a stream."""

import itertools

import distributed
import numpy as np
import pytest
import torch
from condensed_stream import BlackFrames, CondensedBatchSampler, SortedDataset
from generated import CLASSES, generate_coco
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

SIZE = 23


@DATASETS.register_module()
class NumberedImages(torch.utils.data.Dataset):
    """Image i is full of i + 1."""

    metainfo = dict(classes=('a', 'b', 'c'))
    labels = torch.arange(SIZE) % 3

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        image = torch.full((1, 2, 2), index + 1, dtype=torch.uint8)
        return dict(inputs=image, labels=self.labels[index])


def take(num_batches, seed=0, shuffle=True, batch_size=4, dataset=None, **options):
    """Return the first batches of a condensed stream, and those of the sampler alone."""
    samplers = [
        InfiniteSampler(dataset or NumberedImages(), shuffle=shuffle, seed=seed) for _ in range(2)
    ]
    condensed = CondensedBatchSampler(samplers[0], batch_size, num_batches, **options)
    plain = torch.utils.data.BatchSampler(samplers[1], batch_size, False)
    return [list(itertools.islice(batches, num_batches)) for batches in (condensed, plain)]


def test_last_batches_are_of_one_image_each_and_all_others_stay():
    batches, plain = take(200, last=10)
    assert batches[:190] == plain[:190]
    images = [set(batch) for batch in batches[190:]]
    assert all(len(image) == 1 for image in images)
    assert all(len(batch) == 4 for batch in batches)
    # Each batch has its own.
    assert len(set.union(*images)) > 5


def test_fraction_of_all_batches_is_exact_and_at_random_places():
    places = []
    for seed in (0, 1):
        batches, plain = take(50, seed=seed, fraction=0.2)
        places.append([i for i in range(50) if batches[i] != plain[i]])
        assert all(len(set(batches[i])) == 1 for i in places[-1])
    assert [len(place) for place in places] == [10, 10]
    assert places[0] != places[1]
    assert len(set(np.diff(places[0]))) > 1


@pytest.mark.parametrize(('images', 'counts'), [(1, [4]), (2, [2, 2]), (3, [1, 1, 2])])
def test_condensed_batch_has_as_many_images_as_asked_for(images, counts):
    batches, _ = take(20, fraction=1.0, images=images)
    for batch in batches:
        assert sorted(map(batch.count, set(batch))) == counts
    assert len({tuple(batch) for batch in batches}) > 5


def test_stream_is_that_of_the_seed():
    one, same, other = (take(30, seed=seed, last=10)[0] for seed in (3, 3, 4))
    assert one == same
    # The images of condensed batches, too.
    assert one[:20] != other[:20] and one[20:] != other[20:]


def test_later_batches_are_ordinary():
    sampler, other = (InfiniteSampler(NumberedImages(), seed=0) for _ in range(2))
    stream = itertools.islice(CondensedBatchSampler(sampler, 4, 10, last=10), 30)
    plain = itertools.islice(torch.utils.data.BatchSampler(other, 4, False), 30)
    assert list(stream)[10:] == list(plain)[10:]


@pytest.mark.parametrize(('drop_last', 'per_epoch'), [(False, 6), (True, 5)])
def test_batches_are_counted_over_epochs(drop_last, per_epoch):
    sampler = DefaultSampler(NumberedImages(), seed=0)
    num_batches = 3 * per_epoch
    stream = CondensedBatchSampler(sampler, 4, num_batches, last=2, drop_last=drop_last)
    assert len(stream) == per_epoch
    condensed = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == per_epoch
        # The last batch of an epoch has 3 images.
        assert len(batches[-1]) == (4 if drop_last else 3)
        condensed += [len(set(batch)) == 1 for batch in batches]
    assert condensed == [False] * (num_batches - 2) + [True] * 2


def rank_batches(rank):
    assert get_dist_info() == (rank, 2)
    return take(20, last=5, images=2)


def test_ranks_share_the_images_of_a_condensed_batch_and_nothing_else():
    (first, plain), (second, other_plain) = distributed.run(2, rank_batches)
    assert first[15:] == second[15:]
    assert all(len(set(batch)) == 2 for batch in first[15:])
    assert first[:15] == plain[:15] and second[:15] == other_plain[:15]
    # One pass of the data set is 23 of their 2 x 4 images a step.
    seen = [*itertools.chain(*first[:2]), *itertools.chain(*second[:2])]
    assert len(set(seen)) == len(seen)


def test_black_frames_are_in_the_batches_that_were_asked_for():
    loader = Runner.build_dataloader(
        dict(
            batch_size=4,
            num_workers=0,
            sampler=dict(type='InfiniteSampler'),
            batch_sampler=dict(
                type='CondensedBatchSampler', num_batches=12, fraction=0.25, black=True, images=4
            ),
            dataset=dict(type='BlackFrames', dataset=dict(type='NumberedImages')),
            collate_fn=dict(type='default_collate'),
        ),
        seed=0,
    )
    assert loader.dataset.metainfo is NumberedImages.metainfo
    batches = list(itertools.islice(loader, 12))
    black = [batch for batch in batches if not batch['inputs'].any()]
    assert len(black) == 3
    assert all(batch['inputs'].all() for batch in batches if batch['inputs'].any())
    # Labels stay those of the images.
    assert len({tuple(batch['labels'].tolist()) for batch in black}) > 1


@pytest.mark.parametrize('cls', [InfiniteSampler, DefaultSampler])
def test_sorted_by_class(cls):
    dataset = SortedDataset(NumberedImages(), 'labels')
    indices = itertools.islice(cls(dataset, shuffle=False), SIZE)
    items = [dataset[i] for i in indices]
    assert [int(item['labels']) for item in items] == [0] * 8 + [1] * 8 + [2] * 7
    # Stable: in a class the order is that of the data set.
    assert [int(item['inputs'][0, 0, 0]) for item in items[:3]] == [1, 4, 7]


def test_streams_of_a_detection_data_set(tmp_path):
    generate_coco(tmp_path, num_train=6, num_val=1, side_range=(64, 96))
    init_default_scope('mmdet')
    dataset = dict(
        type='CocoDataset',
        data_root=str(tmp_path),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=CLASSES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=('img_path',)),
        ],
    )

    def paths(num_batches, dataset, **options):
        cfg = dict(batch_size=2, num_workers=0, dataset=dataset, **options)
        loader = Runner.build_dataloader(cfg, seed=0)
        batches = list(itertools.islice(loader, num_batches))
        return batches, [[s.img_path for s in batch['data_samples']] for batch in batches]

    sampler = dict(type='InfiniteSampler')
    _, found = paths(
        6,
        dataset,
        sampler=sampler,
        batch_sampler=dict(type='CondensedBatchSampler', num_batches=6, last=2),
    )
    assert [len(set(batch)) for batch in found] == [2, 2, 2, 2, 1, 1]
    batches, _ = paths(
        4,
        dict(type='BlackFrames', dataset=dataset),
        sampler=sampler,
        batch_sampler=dict(type='CondensedBatchSampler', num_batches=4, last=1, black=True),
    )
    lit = [any(bool(image.any()) for image in batch['inputs']) for batch in batches]
    assert lit == [True, True, True, False]
    # The file names are in order already.
    by_width = SortedDataset(dataset, 'width')
    infos = [by_width.get_data_info(i) for i in range(6)]
    widths = [info['width'] for info in infos]
    assert widths == sorted(widths) and len(set(widths)) > 1
    order = [info['img_path'] for info in infos]
    assert order != sorted(order)
    by_width = dict(type='SortedDataset', dataset=dataset, key='width')
    _, found = paths(3, by_width, sampler=dict(type='InfiniteSampler', shuffle=False))
    assert list(itertools.chain(*found)) == order
    grouped = dict(type='AspectRatioBatchSampler')
    sampler = dict(type='DefaultSampler', shuffle=False)
    _, found = paths(3, by_width, sampler=sampler, batch_sampler=grouped)
    shapes = {info['img_path']: info['width'] < info['height'] for info in infos}
    assert len({shapes[path] for path in found[0]}) == 1
    assert sorted(itertools.chain(*found)) == sorted(order)


@pytest.mark.parametrize(
    ('options', 'error', 'name'),
    [
        (dict(), ValueError, 'last or fraction'),
        (dict(last=1, fraction=0.5), ValueError, 'last or fraction'),
        (dict(last=11), ValueError, 'last'),
        (dict(last=-1), ValueError, 'last'),
        (dict(last=1.0), TypeError, 'last'),
        (dict(fraction=1.5), ValueError, 'fraction'),
        (dict(fraction='half'), TypeError, 'fraction'),
        (dict(last=1, num_batches=0), ValueError, 'num_batches'),
        (dict(last=1, images=0), ValueError, 'images'),
        (dict(last=1, images=5), ValueError, 'images'),
        (dict(last=1, images=True), TypeError, 'images'),
        (dict(last=1, black=True), TypeError, 'black'),
        (dict(last=1, sampler=range(5)), TypeError, 'sampler'),
    ],
)
def test_argument_that_cannot_be_used_is_named(options, error, name):
    arguments = dict(sampler=InfiniteSampler(NumberedImages(), seed=0), batch_size=4)
    with pytest.raises(error, match=rf'\b{name}\b'):
        CondensedBatchSampler(**(arguments | dict(num_batches=10) | options))


@pytest.mark.parametrize('key', ['img_path', 'sequence'])
def test_key_that_the_data_set_lacks_is_named(key):
    with pytest.raises(ValueError, match=f"key: NumberedImages has no '{key}'"):
        SortedDataset(NumberedImages(), key)


def test_black_needs_no_more_than_the_wrapper():
    batches, plain = take(5, dataset=BlackFrames(NumberedImages()), last=1, black=True)
    assert batches[:4] == plain[:4]
    assert all(SIZE <= i < 2 * SIZE for i in batches[4])

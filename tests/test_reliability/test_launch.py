"""What the tools make of a config and a command line."""

import argparse

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from ubn_det.reliability import add_arguments, prepare, read_config, set_data_root
from ubn_det.reliability.launch import check_checkpoint_file

MMDET = "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"


def parse(config, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_arguments(parser)
    return read_config(parser.parse_args([str(config), *options]))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'detector.py'
    path.write_text(MMDET)
    return path


def test_work_dir_is_named_after_the_config(config):
    assert parse(config).work_dir == 'work_dirs/detector'
    assert parse(config, '--work-dir', 'here').work_dir == 'here'
    assert parse(config, '--cfg-options', 'work_dir=there').work_dir == 'there'


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ({}, 'AtomicCheckpointHook'),
        (dict(checkpoint=dict(type='CheckpointHook', interval=7)), 'AtomicCheckpointHook'),
        (dict(checkpoint=dict(type=CheckpointHook, interval=7)), 'AtomicCheckpointHook'),
        (dict(checkpoint=dict(type='Another', interval=7)), 'Another'),
    ],
)
def test_checkpoint_hook_is_replaced(given, expected):
    cfg = Config(dict(default_hooks=given, launcher='none'))
    prepare(cfg)
    prepare(cfg)
    hook = cfg.default_hooks.checkpoint
    assert hook.type == expected
    assert hook.get('interval') == (7 if given else None)


def test_checkpoint_hook_that_is_switched_off_stays_so():
    cfg = Config(dict(default_hooks=dict(checkpoint=None), launcher='none'))
    prepare(cfg)
    assert cfg.default_hooks.checkpoint is None


@pytest.mark.parametrize(
    ('content', 'error', 'message'),
    [
        (None, FileNotFoundError, 'is not there'),
        (b'', ValueError, 'is no checkpoint of PyTorch'),
        (b'<html>', ValueError, 'is no checkpoint of PyTorch'),
        (..., ValueError, 'is truncated'),
    ],
)
def test_file_that_is_no_checkpoint_is_named(tmp_path, content, error, message):
    path = tmp_path / 'some.pth'
    if content is ...:
        torch.save(dict(weight=torch.randn(1000)), path)
        content = path.read_bytes()[:-100]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f'{path}.*{message}'):
        check_checkpoint_file(str(path))


@pytest.mark.parametrize('is_archive', [True, False])
def test_both_formats_of_checkpoints_pass(tmp_path, is_archive):
    path = tmp_path / 'some.pth'
    weights = dict(weight=torch.randn(10))
    torch.save(weights, path, _use_new_zipfile_serialization=is_archive)
    check_checkpoint_file(str(path))
    check_checkpoint_file('https://example.com/some.pth')


def test_checkpoint_without_checksums_passes(tmp_path):
    path = tmp_path / 'some.pth'
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(weight=torch.randn(1000)), path)
    finally:
        torch.serialization.set_crc32_options(True)
    torch.load(path)
    check_checkpoint_file(str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'{path} is truncated'):
        check_checkpoint_file(str(path))


def test_data_root_is_replaced_wherever_it_begins_a_path(config, tmp_path):
    cfg = parse(config, '--data-root', str(tmp_path))
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == f'{tmp_path}/'
    for split in ('val', 'test'):
        expected = f'{tmp_path}/annotations/instances_val2017.json'
        assert cfg[f'{split}_evaluator'].ann_file == expected
    assert 'data/coco' not in str(cfg.train_dataloader)


@pytest.mark.parametrize('slash', ['', '/'])
def test_data_root_ends_where_a_folder_does(tmp_path, slash):
    paths = dict(
        itself=('data/coco', f'{tmp_path}/'),
        folder=('data/coco/', f'{tmp_path}/'),
        within=('data/coco/ann.json', f'{tmp_path}/ann.json'),
        beside=('data/coco_extra/ann.json', 'data/coco_extra/ann.json'),
        above=('data/', 'data/'),
        other=('my/data/coco/ann.json', 'my/data/coco/ann.json'),
    )
    nested = dict(files=[old for old, _ in paths.values()])
    cfg = Config(dict(data_root=f'data/coco{slash}', **nested))
    set_data_root(cfg, str(tmp_path))
    assert dict(zip(paths, cfg.files, strict=True)) == {k: new for k, (_, new) in paths.items()}
    assert cfg.data_root == f'{tmp_path}/'


def test_data_root_errors_name_the_option(tmp_path):
    with pytest.raises(ValueError, match='--data-root'):
        set_data_root(Config(dict(model=dict())), str(tmp_path))
    with pytest.raises(FileNotFoundError, match='--data-root: no folder'):
        set_data_root(Config(dict(data_root='data/')), str(tmp_path / 'missing'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='on CPU only: a GPU takes NCCL')
def test_processes_without_a_gpu_meet_on_gloo(tmp_path, monkeypatch):
    for name, value in dict(
        RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0'
    ).items():
        monkeypatch.setenv(name, value)
    cfg = Config(dict(launcher='pytorch', find_unused_parameters=True))
    try:
        prepare(cfg)
        assert dist.get_backend() == 'gloo'
    finally:
        dist.destroy_process_group()
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    )

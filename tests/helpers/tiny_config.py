"""A Mask R-CNN and a data set that train in seconds, for tests that run the real tools."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

from generated import CLASSES, generate_coco

ROOT = Path(__file__).parents[2]

# Nothing is random in training: no flips, and no sampling, as num is larger than what there is to
# sample from. mmengine does not restore the random state of a resumed run, which could not equal
# an uninterrupted one otherwise.
CONFIG = """
_base_ = '{root}/configs/pennfudan/mask-rcnn_r18-scratch_fpn_ubn_400i_pennfudan.py'
norm_cfg = dict(type='{norm}', condensation_threshold=0.3, warmup=1, patience=2)
model = dict(
    backbone=dict(base_channels=8, norm_cfg=norm_cfg),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes={num_classes}),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            in_channels=16,
            conv_out_channels=16,
            num_convs=1,
            num_classes={num_classes},
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=1000000)),
        rpn_proposal=dict(max_per_img=20),
        rcnn=dict(sampler=dict(num=1000000)),
    ),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(max_per_img=5)),
)
data_root = '{data}/'
dataset = dict(data_root=data_root, metainfo=dict(classes={classes}))
loading = dict(num_workers=0, persistent_workers=False, dataset=dataset)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(loading, batch_size=2, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = loading
test_dataloader = loading
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters={max_iters}, val_interval={max_iters})
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=-1)
)
log_processor = dict(window_size=1)
{extra}
"""


def write_config(folder, max_iters=4, norm='UBN', extra=''):
    """Write the data set and a config that trains on it into a folder; return the config."""
    data = folder / 'data'
    generate_coco(data, num_train=6, num_val=3, side_range=(64, 96))
    path = folder / f'tiny_{norm}.py'
    path.write_text(
        CONFIG.format(
            root=ROOT,
            data=data,
            norm=norm,
            num_classes=len(CLASSES),
            classes=CLASSES,
            max_iters=max_iters,
            extra=extra,
        )
    )
    return path


def free_port():
    """Return a port that nobody listens to, as text."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def run_tool(*command, check=True, **environment):
    """Run a tool as a user does, on CPU and one thread, and return the finished process."""
    command = [str(part) for part in command]
    if command[0].endswith('.py'):
        command = [sys.executable, *command]
    variables = os.environ | dict(
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
        PYTHON=sys.executable,
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]),
    )
    variables |= environment
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=500, cwd=ROOT
    )
    if check and done.returncode:
        output = f'{done.stdout[-2000:]}\n{done.stderr[-6000:]}'
        raise AssertionError(f'{command} exited with {done.returncode}\n{output}')
    return done


def load_tool(path, monkeypatch):
    """Import a script by its path as a module; its neighbours can be imported too."""
    path = ROOT / path
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module

"""UBN in mmpretrain and mmsegmentation, and from a classifier into a detector."""

import json
from pathlib import Path

import cv2
import extra_packages
import mmdet.models
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from pretraining import CHANNELS, NUM_CLASSES
from tiny_config import run_tool
from tiny_detector import Trainer, make_batch

from ubn_det import UBN
from ubn_det.layers.ubn import EXTRA_PARAMETERS

assert mmdet.models, 'imported for its registrations'

ROOT = Path(__file__).parent.parent
R18, R50 = 20, 53
# Norm layers of each config; all of them are UBN.
EXPECTED = {
    'resnet18_ubn_8xb16_cifar10': dict(norms=R18),
    'resnet18_ubn_8xb32_in1k': dict(norms=R18),
    'resnet50_ubn_8xb16_cifar10': dict(norms=R50),
    'resnet50_ubn_8xb32_in1k': dict(norms=R50),
    # A stem of three convolutions, and the heads' 2 + 1 and 1.
    'fcn_r50-d8_syncubn_4xb2-80k_cityscapes-512x1024': dict(norms=R50 + 2 + 4, sync=R50 + 2 + 4),
}

pytestmark = pytest.mark.skipif(
    not extra_packages.FOLDER.is_dir(), reason='needs the extra packages of `make setup`'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Run pretraining.py on images of two textures."""
    folder = tmp_path_factory.mktemp('pretraining')
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (folder / 'images' / str(label)).mkdir(parents=True)
        for i in range(6):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image[:: 2 + label] = 255
            cv2.imwrite(str(folder / 'images' / str(label) / f'{i}.png'), image)
    run_tool(ROOT / 'tests/helpers/pretraining.py', folder)
    return folder


def test_every_config_trains_a_step(folder):
    steps = json.loads((folder / 'steps.json').read_text())
    assert set(steps) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        num = expected['norms']
        assert steps[name] == dict(sync=0, ubn=num, trained=num, finite=True) | expected, name


def test_classifier_was_pretrained(folder):
    checkpoint = torch.load(folder / 'classifier' / 'epoch_2.pth', weights_only=False)
    values = checkpoint['state_dict']
    # 3 batches an epoch.
    assert values['backbone.bn1.num_batches_tracked'] == 6
    for extra in EXTRA_PARAMETERS:
        assert values[f'backbone.layer4.1.bn2.{extra}'].abs().max() > 0
    [scalars] = (folder / 'classifier').glob('*/vis_data/scalars.json')
    assert 'accuracy/top1' in scalars.read_text()


def test_backbone_goes_into_a_detector_whole(folder):
    path = str(folder / 'classifier' / 'epoch_2.pth')
    pretrained = {
        key.removeprefix('backbone.'): value
        for key, value in torch.load(path, weights_only=False)['state_dict'].items()
        if key.startswith('backbone.')
    }
    cfg = Config.fromfile(ROOT / 'configs/_base_/mask-rcnn_r18-scratch_fpn.py')
    cfg.model.backbone.update(
        base_channels=CHANNELS,
        norm_cfg=dict(type='UBN'),
        init_cfg=dict(type='Pretrained', checkpoint=path, prefix='backbone.'),
    )
    cfg.model.neck.in_channels = [CHANNELS * i for i in (1, 2, 4, 8)]
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    own = detector.backbone.state_dict()
    assert set(own) == set(pretrained)
    for name, value in pretrained.items():
        assert torch.equal(own[name], value), name

    # The same features in evaluation, by the classifier's own numbers.
    twin = MODELS.build(cfg.model.backbone)
    twin.load_state_dict(pretrained, strict=True)
    image = torch.randn(1, 3, 64, 64)
    detector.backbone.eval(), twin.eval()
    for one, other in zip(detector.backbone(image), twin(image), strict=True):
        assert torch.equal(one, other)

    detector.train()
    log = Trainer(detector).step(make_batch([(96, 128), (128, 96)], [2, 1]))
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    for name, module in detector.backbone.named_modules():
        if isinstance(module, UBN):
            tracked = pretrained[f'{name}.num_batches_tracked'] + 1
            assert module.num_batches_tracked == tracked, name
    state = detector.backbone.state_dict()
    for extra in EXTRA_PARAMETERS:
        name = f'layer4.1.bn2.{extra}'
        assert not torch.equal(state[name], pretrained[name]), name

"""The same seed gives the same result to the bit."""

import itertools
import json

import distributed
import pytest
import torch
from mmengine.runner import set_random_seed
from reference import random_params
from tiny_config import ROOT, free_port, run_tool, write_config

from ubn_det import UBN, SyncUBN, UBN1d, UBN3d

C = 4

# What measures the machine.
MEASURED = {'time', 'data_time', 'memory'}


def bits(value):
    """Turn tensors into bytes, for a comparison that tells -0 from 0 and knows NaN."""
    if isinstance(value, torch.Tensor):
        # numpy does not know bfloat16.
        flat = value.detach().cpu().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), flat.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


# The real tools.

# Different from run to run without a seed: the order of the images and flips of them, and what the
# heads sample.
RANDOM = """
model['train_cfg']['rpn']['sampler']['num'] = 16
model['train_cfg']['rcnn']['sampler']['num'] = 8
train_pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
randomness = dict(seed={seed}, deterministic=True)
"""


def train(folder, name, norm, num_processes, seed=0):
    """Train and evaluate by the tools; return the checkpoint's state and the logged scalars."""
    folder = folder / name
    folder.mkdir()
    config = write_config(folder, max_iters=4, norm=norm, extra=RANDOM.format(seed=seed))
    work_dir = '--work-dir', folder / 'run'
    if num_processes == 1:
        run_tool(ROOT / 'tools/train.py', config, *work_dir)
    else:
        script = ROOT / 'tools/dist_train.sh'
        run_tool(script, config, num_processes, *work_dir, PORT=free_port())
    checkpoint = torch.load(folder / 'run/iter_4.pth', map_location='cpu', weights_only=False)
    (log,) = (folder / 'run').glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    scalars = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return bits({key: checkpoint[key] for key in ('state_dict', 'optimizer')}), scalars


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A training on one process."""
    return train(tmp_path_factory.mktemp('determinism'), 'first', 'UBN', 1)


def assert_same_runs(first, second):
    (checkpoint, scalars), (other, again) = first, second
    assert checkpoint['state_dict'] == other['state_dict']
    assert checkpoint['optimizer'] == other['optimizer']
    assert scalars == again
    tags = {tag for row in scalars for tag in row}
    assert {'loss', 'condensation/mean', 'coco/segm_mAP'} <= tags
    assert len([row for row in scalars if 'loss' in row]) == 4


def test_two_runs_are_the_same(tmp_path, trained):
    assert_same_runs(trained, train(tmp_path, 'second', 'UBN', 1))


def test_two_runs_of_two_processes_are_the_same(tmp_path):
    assert_same_runs(*(train(tmp_path, name, 'SyncUBN', 2) for name in ('first', 'second')))


def test_another_seed_is_another_result(tmp_path, trained):
    """What is compared above tells runs that differ."""
    first, scalars = trained
    second, others = train(tmp_path, 'another', 'UBN', 1, seed=1)
    names = first['state_dict'].keys()
    differing = [n for n in names if first['state_dict'][n] != second['state_dict'][n]]
    assert len(differing) > len(names) / 2
    assert scalars != others


# The layers.


@pytest.fixture
def deterministic(monkeypatch):
    """Let torch raise an error where an operator is not deterministic, as mmengine asks it to."""
    # cuBLAS, with which a GPU takes the score of large batches, is not by default.
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    set_random_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


SHAPES = {2: (6, C), 3: (6, C, 5), 4: (3, C, 6, 5), 5: (3, C, 2, 4, 3)}


def layer_for(dims, affine_kernel):
    """The layer whose neighbourhood fits inputs of so many dimensions."""
    if affine_kernel == 1:
        return UBN
    return {2: UBN1d, 3: UBN1d, 4: UBN, 5: UBN3d}[dims]


def options_of(dims):
    """All settings that change what is computed."""
    for affine_kernel, threshold, rectifiers, affine in itertools.product(
        (1, 3), (None, 0.3), (True, False), (True, False)
    ):
        if not (affine_kernel > 1 and not affine):
            yield dict(
                affine_kernel=affine_kernel,
                condensation_threshold=threshold,
                centering=rectifiers,
                scaling=rectifiers,
                affine=affine,
            )


def run_layer(kind, options, params, batches, gradients):
    """Return all that a layer computes in training and then in evaluation."""
    layer = kind(C, warmup=1, patience=2, **options).to(batches[0].device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params[name].view_as(parameter))
    found = []
    for training in (True, False):
        layer.train(training)
        for batch, dy in zip(batches, gradients, strict=True):
            layer.zero_grad()
            x = batch.clone().requires_grad_()
            y = layer(x)
            y.backward(dy)
            grads = {name: p.grad for name, p in layer.named_parameters()}
            found.append(bits([y, x.grad, grads, dict(layer.named_buffers())]))
    return found, layer.num_batches_condensed.item()


def draw(shape, dims_of_kernel):
    """Draw parameters and batches, most of which are alike enough to close a gate."""
    params = random_params(C, dims_of_kernel, 3)
    common = 2 * torch.randn(shape[1:])
    batches = [share * common + torch.randn(shape) for share in (0, 1, 1, 0, 1)]
    return params, batches, [torch.randn(shape) for _ in batches]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dims', SHAPES)
@pytest.mark.usefixtures('deterministic')
def test_layer_is_deterministic(dims, dtype, device):
    shape = SHAPES[dims]
    acted = set()
    for options in options_of(dims):
        kind = layer_for(dims, options['affine_kernel'])
        params, batches, gradients = draw(shape, kind._kernel_dims)
        batches, gradients = (
            [t.to(device, dtype) for t in tensors] for tensors in (batches, gradients)
        )
        first, closed = run_layer(kind, options, params, batches, gradients)
        for _ in range(3):
            again, _ = run_layer(kind, options, params, batches, gradients)
            assert again == first, options
        acted.add((options['condensation_threshold'], closed > 0))
    assert acted == {(None, False), (0.3, True)}


def run_sync_layers(rank, dims):
    """Train with all settings on ranks whose batches differ in size; one is empty in one batch."""
    found = []
    set_random_seed(0, deterministic=True)
    try:
        for options in sync_options_of(dims):
            params, batches, gradients = draw(SHAPES[dims], 2)
            batches, gradients = ([t[rank:] for t in tensors] for tensors in (batches, gradients))
            if rank == 1:
                batches[3], gradients[3] = batches[3][:0], gradients[3][:0]
            found.append(run_layer(SyncUBN, options, params, batches, gradients))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def sync_options_of(dims):
    """SyncUBN's neighbourhood has two dimensions."""
    return [o for o in options_of(dims) if o['affine_kernel'] == 1 or dims == 4]


@pytest.mark.parametrize('dims', SHAPES)
def test_sync_layer_is_deterministic(dims):
    first, *others = (distributed.run(2, run_sync_layers, dims) for _ in range(3))
    for ranks in others:
        for rank, found in enumerate(ranks):
            assert found == first[rank]
    for options, *found in zip(sync_options_of(dims), *first, strict=True):
        closed = [closed for _, closed in found]
        assert closed[0] == closed[1]
        assert (closed[0] > 0) == (options['condensation_threshold'] is not None), options

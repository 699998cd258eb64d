"""What is not finite in one sample, on one rank or at one layer does no lasting harm."""

import json
import math
import os

import pytest
import torch
import torch.distributed as dist
from distributed import run
from inject_faults import CPUAmpOptimWrapper, in_half
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from tiny_detector import build_detector, layers_of, make_batch
from torch.utils.data import DataLoader

from ubn_det.engine import NonFiniteStepHook

NUM_ITERS = 60
FAULTY = range(20, 23)
# The score is not looked at before the end: only what is not finite closes a gate.
SYNC = dict(type='SyncUBN', warmup=NUM_ITERS)
INIT_SCALE = 2.0**8


class Poison(Hook):
    """Spoils some iterations of one rank.

    Without a fault it sets the gradient scale to what the faults would leave of it.
    """

    def __init__(self, fault, rank):
        self.fault = fault
        self.rank = rank
        self.losses = []
        self.handle = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.fault is None and runner.iter == FAULTY.start:
            scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
            if scaler is not None:
                scaler.update(INIT_SCALE / 2 ** len(FAULTY))
        if runner.iter not in FAULTY or runner.rank != self.rank or self.fault is None:
            return
        model = getattr(runner.model, 'module', runner.model)
        where, value = self.fault

        def spoil(module, args, output):
            if where == 'sample':
                output['inputs'][0, 0, 3, 5] = value
                return output
            return output * value

        layer = model.data_preprocessor if where == 'sample' else model.get_submodule(where)
        self.handle = layer.register_forward_hook(spoil)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self.losses.append(outputs['loss'].item())


def train(rank, norm_cfg, fault, faulty_rank, amp, work_dir):
    """Train a detector in a Runner; return what is left of it on this rank.

    Without a fault the batches that would have been spoilt are left out.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    # Sampling fewer than there are would draw random numbers, and let runs differ by chance.
    detector = build_detector(
        norm_cfg,
        train_cfg__rpn__sampler__num=100000,
        train_cfg__rcnn__sampler__num=100000,
    )
    torch.manual_seed(1 + rank)
    batches = [make_batch([(40, 56), (56, 40)], [2, 3]) for _ in range(5)] * NUM_ITERS
    batches = [b for i, b in enumerate(batches[:NUM_ITERS]) if fault or i not in FAULTY]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=10))
    if amp:
        detector.extract_feat = in_half(detector.extract_feat)
        wrapper = CPUAmpOptimWrapper(
            optimizer=optimizer, clip_grad=dict(max_norm=10), init_scale=INIT_SCALE
        )
    poison = Poison(fault, faulty_rank)
    runner = Runner(
        model=detector,
        work_dir=f'{work_dir}/{rank}',
        train_dataloader=DataLoader(batches, batch_size=1, collate_fn=lambda b: b[0]),
        train_cfg=dict(by_epoch=False, max_iters=len(batches)),
        optim_wrapper=wrapper,
        custom_hooks=[poison, NonFiniteStepHook()],
        default_hooks=dict(
            checkpoint=None, sampler_seed=None, logger=dict(type='LoggerHook', interval=1)
        ),
        launcher='pytorch' if dist.is_initialized() else 'none',
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
            )
        ),
        experiment_name=f'{os.path.basename(work_dir)}',
        log_level='WARNING',
        randomness=dict(seed=0),
    )
    runner.train()
    state = detector.state_dict()
    detector.eval()
    with torch.no_grad():
        inputs = detector.data_preprocessor(batches[0])['inputs']
        features = torch.cat([f.flatten() for f in detector.extract_feat(inputs)])
    return dict(
        state=state,
        losses=poison.losses,
        num_skipped=runner.message_hub.runtime_info.get('num_skipped_steps', 0),
        features=features,
        num_closed=[int(layer.num_batches_condensed) for layer in layers_of(detector)],
    )


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    """Runs without a fault, by whether they are in half precision."""
    folder = tmp_path_factory.mktemp('clean')
    runs = {
        amp: run(2, train, SYNC, None, 1, amp, str(folder / f'clean-{amp}'))
        for amp in (False, True)
    }
    for ranks in runs.values():
        for rank in ranks:
            assert sum(rank['losses'][-10:]) < 0.9 * sum(rank['losses'][:10])
            assert rank['num_skipped'] == sum(rank['num_closed']) == 0
    return runs


def assert_recovered(ranks, clean_ranks):
    """The losses go on as if the spoilt batches had not been there, to the bit."""
    for found, expected in zip(ranks, clean_ranks, strict=True):
        assert found['losses'][: FAULTY.start] == expected['losses'][: FAULTY.start]
        assert found['losses'][FAULTY.stop :] == expected['losses'][FAULTY.start :]
        for name, value in expected['state'].items():
            is_parameter = 'running' not in name and 'num_' not in name
            if is_parameter and not name.endswith(('condensation', 'consecutive_condensed')):
                assert torch.equal(found['state'][name], value), name


def assert_untouched(ranks, clean_ranks):
    """The running statistics are those of a run without these batches, too."""
    for found, expected in zip(ranks, clean_ranks, strict=True):
        for name, value in expected['state'].items():
            if 'running' in name or name.endswith('num_batches_tracked'):
                assert torch.equal(found['state'][name], value), name


def logged(work_dir):
    (log,) = work_dir.glob('0/*/vis_data/scalars.json')
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row['skipped_steps'] for row in rows if 'skipped_steps' in row]


@pytest.mark.parametrize(
    'fault',
    [
        ('sample', math.nan),
        ('sample', math.inf),
        ('backbone.bn1', math.nan),
        ('roi_head.mask_head.convs.0.conv', -math.inf),
    ],
)
def test_one_bad_rank(clean, tmp_path, fault):
    ranks = run(2, train, SYNC, fault, 1, False, str(tmp_path))
    first, second = ranks
    assert first['state'].keys() == second['state'].keys()
    for name, value in first['state'].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second['state'][name]), name
    assert first['num_skipped'] == second['num_skipped'] == len(FAULTY)
    assert logged(tmp_path) == [1, 2, 3]
    # The fault reached the loss.
    assert not all(math.isfinite(loss) for loss in second['losses'])
    # A layer closed its gate where it met the fault, and only there.
    assert set(first['num_closed']) <= {0, len(FAULTY)} and max(first['num_closed'])
    assert torch.isfinite(first['features']).all()
    assert_recovered(ranks, clean[False])
    if fault[0] == 'sample':
        # No layer is before the fault.
        assert_untouched(ranks, clean[False])


def test_overflow_in_half_precision(clean, tmp_path):
    """The largest float16 is 65504; the gradient scaler skips such a step by itself."""
    ranks = run(2, train, SYNC, ('backbone.conv1', 1e6), 1, True, str(tmp_path))
    first, second = ranks
    for name, value in first['state'].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second['state'][name]), name
    assert first['num_skipped'] == second['num_skipped'] == len(FAULTY)
    assert logged(tmp_path) == [1, 2, 3]
    assert torch.isfinite(first['features']).all()
    assert_recovered(ranks, clean[True])


@pytest.mark.parametrize('norm', ['UBN', 'BN'])
def test_only_the_statistics_of_bn_are_lost(tmp_path, norm):
    """One process; the hook keeps the weights of both."""
    norm_cfg = dict(SYNC, type='UBN') if norm == 'UBN' else dict(type='BN')
    found = train(0, norm_cfg, ('sample', math.nan), 0, False, str(tmp_path))
    assert found['num_skipped'] == len(FAULTY)
    weights = [v for k, v in found['state'].items() if 'running' not in k]
    assert all(torch.isfinite(value).all() for value in weights)
    statistics = [v for k, v in found['state'].items() if 'running' in k]
    is_kept = all(torch.isfinite(value).all() for value in statistics)
    assert is_kept == (norm == 'UBN')
    assert torch.isfinite(found['features']).all() == (norm == 'UBN')
    # Nothing shows in training.
    assert all(math.isfinite(loss) for loss in found['losses'][FAULTY.stop :])

"""Tests of AtomicCheckpointHook and of its file backend, in real runs on CPU."""

import os
import resource
import signal
import uuid
from contextlib import contextmanager

import pytest
import torch
from fault_hooks import names_in
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ubn_det import UBN2d
from ubn_det.engine import AtomicCheckpointHook
from ubn_det.reliability import AtomicLocalBackend, check_fit


class Model(BaseModel):
    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 200, 3)
        self.norm = norm or UBN2d(200)

    def forward(self, inputs, mode='loss'):
        y = self.norm(self.conv(inputs))
        return dict(loss=y.square().mean()) if mode == 'loss' else [0]


class Figures(BaseMetric):
    """Gives the figures of a list, one an evaluation."""

    default_prefix = 'test'

    def __init__(self, figures):
        super().__init__()
        self.figures = iter(figures)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return next(self.figures)


def make_runner(work_dir, hook, figures, max_iters=None, **kwargs):
    torch.manual_seed(0)
    model = Model()
    batches = [dict(inputs=torch.randn(2, 3, 6, 6)) for _ in range(4)]
    loader = dict(batch_size=1, collate_fn=lambda items: items[0])
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=DataLoader(batches, **loader),
        val_dataloader=DataLoader(batches[:1], **loader),
        val_evaluator=[Figures(figures)],
        val_cfg=dict(),
        train_cfg=dict(by_epoch=False, max_iters=max_iters or len(figures), val_interval=1),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type=hook, by_epoch=False, **kwargs.pop('keep'))),
        experiment_name=str(uuid.uuid4()),
        **kwargs,
    )


@contextmanager
def full_disk():
    """Let no file grow beyond 30 kB: the system stops a write in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FillsDisk(Figures):
    """The disk is full from the second evaluation on."""

    def compute_metrics(self, results):
        figures = super().compute_metrics(results)
        if figures.pop('full', False):
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )
        return figures


KEEP_ONE = dict(interval=1, max_keep_ckpts=1, save_best='test/score', rule='greater')


@pytest.mark.parametrize('num_keep', [-1, 1, 2, 3])
def test_same_files_as_mmengine(tmp_path, num_keep):
    figures = [dict(score=s) for s in (0.3, 0.5, 0.4, 0.6, 0.6)]
    for hook in (CheckpointHook, AtomicCheckpointHook):
        keep = dict(KEEP_ONE, max_keep_ckpts=num_keep)
        make_runner(tmp_path / hook.__name__, hook, figures, keep=keep).train()
    found, expected = (
        names_in(tmp_path / hook.__name__) for hook in (AtomicCheckpointHook, CheckpointHook)
    )
    assert found == expected and len(found) == (num_keep if num_keep > 0 else 5) + 1
    assert (tmp_path / 'AtomicCheckpointHook/last_checkpoint').read_text().endswith('iter_5.pth')


def test_same_files_as_mmengine_for_several_figures(tmp_path):
    figures = [dict(a=a, b=b) for a, b in ((0.3, 5), (0.5, 4), (0.4, 6), (0.2, 1))]
    keep = dict(KEEP_ONE, save_best=['test/a', 'test/b'])
    for hook in (CheckpointHook, AtomicCheckpointHook):
        make_runner(tmp_path / hook.__name__, hook, figures, keep=keep).train()
    found, expected = (
        names_in(tmp_path / hook.__name__) for hook in (AtomicCheckpointHook, CheckpointHook)
    )
    assert found == expected == ['best_test_a_iter_2.pth', 'best_test_b_iter_3.pth', 'iter_4.pth']


def test_resumed_run_keeps_removing_what_is_outdated(tmp_path):
    figures = [dict(score=s) for s in (0.3, 0.5)]
    make_runner(tmp_path, AtomicCheckpointHook, figures, keep=KEEP_ONE).train()
    assert names_in(tmp_path) == ['best_test_score_iter_2.pth', 'iter_2.pth']
    later = [dict(score=s) for s in (0.4, 0.9)]
    make_runner(
        tmp_path, AtomicCheckpointHook, later, max_iters=4, keep=KEEP_ONE, resume=True
    ).train()
    assert names_in(tmp_path) == ['best_test_score_iter_4.pth', 'iter_4.pth']


@pytest.mark.parametrize('hook', [CheckpointHook, AtomicCheckpointHook])
def test_full_disk(tmp_path, hook):
    """mmengine has removed what it meant to replace; its own hook shows that the fault is real."""
    figures = [dict(score=0.3), dict(score=0.2, full=False)]
    make_runner(tmp_path, hook, figures, keep=KEEP_ONE).train()
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    assert list(before) == ['best_test_score_iter_1.pth', 'iter_2.pth']
    runner = make_runner(
        tmp_path, hook, [dict(score=0.9)], max_iters=3, keep=KEEP_ONE, resume=True
    )
    with full_disk(), pytest.raises(OSError) as raised:
        runner.train()
    after = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    if hook is CheckpointHook:
        assert 'iter_2.pth' not in after
        return
    assert after == before
    assert f'{tmp_path}/iter_3.pth was not written' in str(raised.value)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')


def test_full_disk_leaves_the_best_one(tmp_path):
    figures = [dict(score=0.3), dict(score=0.9)]
    keep = dict(KEEP_ONE, interval=100, save_last=False)
    runner = make_runner(tmp_path, AtomicCheckpointHook, figures, keep=keep)
    runner.val_evaluator.metrics[0].figures = iter([dict(score=0.3), dict(score=0.9, full=True)])
    runner.val_evaluator.metrics[0].__class__ = FillsDisk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match='best_test_score_iter_2.pth was not written'):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ['best_test_score_iter_1.pth']
    torch.load(tmp_path / 'best_test_score_iter_1.pth', weights_only=False)


def test_backend_writes_all_or_nothing(tmp_path):
    backend = get_file_backend(backend_args=dict(backend='atomic_local'))
    assert isinstance(backend, AtomicLocalBackend)
    path = tmp_path / 'new' / 'file'
    backend.put(b'first', path)
    assert path.read_bytes() == b'first'
    with full_disk(), pytest.raises(OSError, match=f'{path} was not written'):
        backend.put(bytes(50_000), path)
    assert path.read_bytes() == b'first'
    assert list(path.parent.iterdir()) == [path]
    backend.put_text('später', path)
    assert path.read_text(encoding='utf-8') == 'später'


def kill_while_writing(path):
    """Write to a file in a process of its own that is killed before the file is whole."""
    if not (child := os.fork()):
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        AtomicLocalBackend().put(b'half', path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize('is_elsewhere', [False, True])
def test_what_a_kill_left_half_written_goes_at_the_next_start(tmp_path, is_elsewhere):
    figures = [dict(score=0.3)]
    keep = dict(KEEP_ONE, **(dict(out_dir=str(tmp_path / 'out')) if is_elsewhere else {}))
    work_dir = tmp_path / 'run'
    out_dir = tmp_path / 'out/run' if is_elsewhere else work_dir
    for name in ('iter_1.pth', 'iter_7.pth', 'best_test_score_iter_7.pth'):
        kill_while_writing(out_dir / name)
    kill_while_writing(work_dir / 'last_checkpoint')
    assert len([*out_dir.iterdir()]) >= 3
    mine = out_dir / 'notes.1.tmp'
    mine.write_text('not of a checkpoint')
    make_runner(work_dir, AtomicCheckpointHook, figures, keep=keep).train()
    # A run leaves a folder of logs and its config as well.
    files = {
        path.name
        for folder in (work_dir, out_dir)
        for path in folder.iterdir()
        if path.is_file() and path.suffix != '.py'
    }
    checkpoints = {'iter_1.pth', 'best_test_score_iter_1.pth', 'last_checkpoint'}
    assert files == {*checkpoints, mine.name}


def test_other_backends_are_left_alone():
    assert AtomicCheckpointHook(out_dir='s3://bucket').backend_args is None
    given = dict(backend='local')
    assert AtomicCheckpointHook(backend_args=given).backend_args == given
    assert AtomicCheckpointHook().backend_args == dict(backend='atomic_local')


def test_bad_purpose_is_refused():
    with pytest.raises(ValueError, match="purpose must be None or one of.*'train'"):
        AtomicCheckpointHook(purpose='train')


def checkpoint_of(model, **changes):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state.update(changes)
    return dict(
        state_dict={k: v for k, v in state.items() if v is not None},
        meta={},
        message_hub={},
        optimizer={},
    )


FITS = [
    # What changes in the checkpoint, and whether it serves to resume and to test.
    ({}, True, True),
    ({'norm.weight': torch.ones(199)}, False, False),
    ({'norm.neighbour_weight': torch.ones(200, 1, 5, 5)}, False, False),
    ({'norm.condensation': torch.ones(1)}, False, False),
    ({'conv.weight': 'text'}, False, False),
    ({'conv.bias': None}, False, False),
    ({'norm.running_var': None}, False, False),
    # Older checkpoints lack it, and it plays no part in testing.
    ({'norm.num_batches_tracked': None}, False, True),
    # Without what BN lacks, UBN is that BN.
    ({'norm.center_weight': None, 'norm.condensation': None}, False, True),
    ({'head.weight': torch.ones(3)}, False, True),
]


@pytest.mark.parametrize(('changes', 'resumes', 'tests'), FITS)
def test_fit(changes, resumes, tests):
    model = Model()
    checkpoint = checkpoint_of(model, **changes)
    for purpose, fits in (('resume', resumes), ('test', tests)):
        if fits:
            check_fit(model, checkpoint, purpose)
        else:
            with pytest.raises(RuntimeError, match=f'cannot {purpose}.*nothing was loaded') as e:
                check_fit(model, checkpoint, purpose)
            assert next(iter(changes)) in str(e.value)


@pytest.mark.parametrize('purpose', ['resume', 'test'])
def test_neighbourhood_that_the_layer_lacks_is_named(purpose):
    checkpoint = checkpoint_of(Model())
    with pytest.raises(RuntimeError, match='norm.neighbour_weight'):
        check_fit(Model(norm=UBN2d(200, affine_kernel=1)), checkpoint, purpose)


def test_rectifiers_that_plain_bn_would_drop_are_named():
    checkpoint = checkpoint_of(Model())
    with pytest.raises(RuntimeError, match='norm.center_weight is in the checkpoint only'):
        check_fit(Model(norm=nn.BatchNorm2d(200)), checkpoint, 'test')


def test_names_of_wrapped_models_fit():
    model = Model()
    checkpoint = checkpoint_of(model)
    checkpoint['state_dict'] = {f'module.{k}': v for k, v in checkpoint['state_dict'].items()}
    check_fit(model, checkpoint, 'resume')


@pytest.mark.parametrize('key', ['meta', 'message_hub', 'optimizer'])
def test_checkpoint_without_the_state_of_the_run_is_not_resumed(key):
    model = Model()
    checkpoint = checkpoint_of(model)
    del checkpoint[key]
    with pytest.raises(RuntimeError, match=f'has no {key}.*load_from'):
        check_fit(model, checkpoint, 'resume')
    check_fit(model, checkpoint, 'test')


def test_nothing_is_copied_from_what_does_not_fit(tmp_path):
    figures = [dict(score=0.3)]
    make_runner(tmp_path, AtomicCheckpointHook, figures, keep=KEEP_ONE).train()
    path = tmp_path / 'iter_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['state_dict']['norm.weight'] = torch.ones(7)
    torch.save(checkpoint, path)
    for purpose, is_refused in (('resume', True), (None, False)):
        runner = make_runner(
            tmp_path / 'next',
            AtomicCheckpointHook,
            figures,
            keep=dict(KEEP_ONE, purpose=purpose),
            load_from=str(path),
        )
        before = {k: v.clone() for k, v in runner.model.state_dict().items()}
        if is_refused:
            with pytest.raises(RuntimeError, match=r'norm.weight is \(7,\) in the checkpoint'):
                runner.load_or_resume()
        else:
            runner.load_or_resume()
        changed = [
            k for k, v in runner.model.state_dict().items() if not torch.equal(v, before[k])
        ]
        assert bool(changed) == (not is_refused)

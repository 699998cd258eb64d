"""Replicas never drift: ranks that train a real detector with SyncUBN stay equal to the bit."""

import distributed
import pytest
import torch
from tiny_detector import Trainer, build_detector, layers_of, make_batch

from ubn_det.layers.ubn import COUNTERS

NUM_ITERATIONS = 200
SOAK_ITERATIONS = 2000

# Gates close and open again.
RULE = dict(condensation_threshold=0.4, warmup=3, patience=20)
AUTO = dict(RULE, condensation_threshold='auto', condensation_z=0.0, condensation_margin=0.0)


@pytest.fixture(scope='module', autouse=True)
def _patience():
    # A job is allowed less than hundreds of iterations take on a busy machine. A collective that
    # one rank never joins is an error as early as elsewhere.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, 'GRACE', 3000)
        yield


@pytest.fixture(scope='module')
def two_replicas():
    return distributed.run(2, train, 'SyncUBN', NUM_ITERATIONS)


def draw_batch(rank, iteration):
    """Draw one or two images of any size, a third of them without objects.

    What mmdet samples in the iteration is drawn from the same generator.
    """
    torch.manual_seed(1000 * iteration + rank)
    shapes = torch.randint(24, 65, (1 + (rank + iteration) % 2, 2)).tolist()
    return make_batch(shapes, torch.randint(3, (len(shapes),)).tolist())


def train(rank, norm, num_iterations, perturbation=None, rule=RULE):
    torch.manual_seed(0)
    detector = build_detector(dict(type=norm, **rule))
    trainer = Trainer(detector, wrap=True)
    if rank == 1 and perturbation == 'weights':
        # Replicas are made equal at the start only.
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    losses, counters = [], []
    try:
        for iteration in range(num_iterations):
            if rank == 1 and perturbation == 'threads':
                # Not always: threads that spin cost a busy machine half a second an iteration.
                torch.set_num_threads(2 if iteration % 8 == 0 else 1)
            logged = trainer.step(draw_batch(rank, iteration))
            losses.append(logged['loss'].detach())
            counters.append(
                [[getattr(m, n).item() for n in COUNTERS] for m in layers_of(detector)]
            )
    finally:
        torch.set_num_threads(1)
    momenta = [s['momentum_buffer'] for s in trainer.optim_wrapper.optimizer.state.values()]
    return dict(
        parameters={name: p.detach() for name, p in detector.named_parameters()},
        buffers=dict(detector.named_buffers()),
        momenta=dict(enumerate(momenta)),
        losses=torch.stack(losses),
        # (iterations, layers, counters)
        counters=torch.tensor(counters),
    )


def differing(first, second):
    """Return the names of the tensors whose bytes differ."""
    assert first.keys() == second.keys()
    return [n for n in first if first[n].numpy().tobytes() != second[n].numpy().tobytes()]


def assert_same_decisions(first, second):
    """Counters agree after every iteration, and everything that they have led to at the end."""
    assert torch.equal(first['counters'], second['counters'])
    assert differing(first['buffers'], second['buffers']) == []


def assert_gates_acted(found):
    """Most gates have closed, and then opened by the score itself."""
    tracked, closed, readmitted, *_ = found['counters'].unbind(2)
    opens = (tracked - readmitted).diff(dim=0) > 0
    reopens = opens & (closed[:-1] > 0)
    assert reopens.any(0).float().mean() > 0.5


def assert_replicas_equal(first, *others):
    assert_gates_acted(first)
    assert all(torch.isfinite(t).all() for t in first['parameters'].values())
    for other in others:
        # Each has trained on images of its own.
        assert not torch.equal(first['losses'], other['losses'])
        assert_same_decisions(first, other)
        assert differing(first['parameters'], other['parameters']) == []
        assert differing(first['momenta'], other['momenta']) == []


def test_two_replicas_stay_equal(two_replicas):
    assert_replicas_equal(*two_replicas)


def test_two_replicas_stay_equal_where_the_threshold_follows_the_scores():
    found = distributed.run(2, train, 'SyncUBN', NUM_ITERATIONS, None, AUTO)
    assert_replicas_equal(*found)
    assert any(t > 0 for n, t in found[0]['buffers'].items() if n.endswith('num_batches_scored'))


def test_four_replicas_stay_equal():
    assert_replicas_equal(*distributed.run(4, train, 'SyncUBN', NUM_ITERATIONS))


@pytest.mark.slow
def test_replicas_stay_equal_in_a_long_training():
    assert_replicas_equal(*distributed.run(4, train, 'SyncUBN', SOAK_ITERATIONS))


@pytest.mark.parametrize('perturbation', ['threads', 'weights'])
def test_decisions_agree_although_ranks_compute_differently(perturbation, two_replicas):
    """All decide from the same gathered bytes, none from what it has computed itself."""
    first, second = distributed.run(2, train, 'SyncUBN', NUM_ITERATIONS, perturbation)
    # Really differently.
    assert not torch.equal(second['losses'], two_replicas[1]['losses'])
    if perturbation == 'weights':
        assert differing(first['parameters'], second['parameters'])
    assert_gates_acted(first)
    assert_same_decisions(first, second)


def test_replicas_of_plain_ubn_drift():
    """The same training tells replicas that drift: here each decides by its own batch."""
    first, second = distributed.run(2, train, 'UBN', NUM_ITERATIONS)
    assert_gates_acted(first)
    # The gradients are averaged all the same.
    assert differing(first['parameters'], second['parameters']) == []
    drifted = differing(first['buffers'], second['buffers'])
    statistics = [name for name in first['buffers'] if 'running_' in name]
    assert set(statistics) <= set(drifted)
    assert not torch.equal(first['counters'], second['counters'])

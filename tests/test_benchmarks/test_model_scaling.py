"""The scaling tool: counts of models known by hand, its fit, its formulas and its page."""

import csv
import math
import sys

import distributed
import pytest
import torch
import torch.distributed as dist
from tiny_config import ROOT, load_tool
from torch import nn

from ubn_det import UBN, SyncUBN

CSV = ROOT / 'docs/scaling.csv'


@pytest.fixture
def tool(monkeypatch):
    return load_tool('benchmarks/model_scaling.py', monkeypatch)


class Shared(nn.Module):
    """Three calls of 4 channels, one of 6, and what must not be counted."""

    def __init__(self):
        super().__init__()
        self.shared = SyncUBN(4)
        self.once = SyncUBN(6)
        self.frozen = SyncUBN(4)
        self.unused = SyncUBN(5)
        self.local = UBN(4)
        self.widen = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        for _ in range(3):
            x = self.shared(x)
        return self.once(self.widen(self.local(self.frozen(x))))


def make_step():
    model = Shared().train()
    model.frozen.eval()
    x = torch.randn(2, 4, 3, 3)
    return model, lambda: model(x).square().sum().backward()


def profile(rank):
    import model_scaling

    return model_scaling.profile_collectives(make_step()[1])


def test_counts_are_those_by_hand_and_of_a_profile(tool):
    model, step = make_step()
    assert tool.count_calls(model, step) == [(4, 3), (6, 1)]
    assert not any(module._forward_pre_hooks for module in model.modules())
    widths = {4: 3, 6: 1}
    # 2 C + 3 and 2 C + 1 numbers forward, 2 C backward, of four bytes each.
    expected = {
        ('SyncUBN', 'all_gather'): (4, 4 * (3 * 11 + 15)),
        ('SyncUBN', 'all_reduce'): (4, 4 * (3 * 8 + 12)),
        ('SyncBN', 'all_gather'): (4, 4 * (3 * 9 + 13)),
        ('SyncBN', 'all_reduce'): (4, 4 * (3 * 8 + 12)),
    }
    assert {key: tool.sent(widths, *key) for key in expected} == expected
    for found, operators in distributed.run(2, profile):
        assert found == {name: expected['SyncUBN', name] for name in ('all_gather', 'all_reduce')}
        assert operators & {'allgather_', '_allgather_base_'}
        assert 'allreduce_' in operators


def synthetic_points(tool, alpha, beta):
    """Return times written from the two formulas."""
    points = []
    for p in (2, 4, 8):
        for n in (500, 4000, 60000, 1000000):
            gather = (p - 1) * (alpha + beta * n)
            reduce = 2 * (p - 1) * (alpha + beta * n / p)
            points += [tool.Point('all_gather', p, n, gather)]
            points += [tool.Point('all_reduce', p, n, reduce)]
    return points


def test_fit_recovers_alpha_and_beta(tool):
    points = synthetic_points(tool, alpha=42.0, beta=0.003)
    fit = tool.fit_ring(points)
    assert fit.alpha == pytest.approx(42.0, rel=1e-9)
    assert fit.beta == pytest.approx(0.003, rel=1e-9)
    assert fit.residual < 1e-9 and abs(fit.worst) < 1e-9
    for point in points:
        assert fit(*point[:3]) == pytest.approx(point.time)


def test_fit_reports_its_residuals(tool):
    points = synthetic_points(tool, alpha=42.0, beta=0.003)
    # One of 24 is measured at twice its time: the model says half of it there.
    points[5] = points[5]._replace(time=2 * points[5].time)
    fit = tool.fit_ring(points)
    errors = [fit(*p[:3]) / p.time - 1 for p in points]
    assert fit.residual == pytest.approx(math.sqrt(sum(e * e for e in errors) / 24))
    assert fit.worst == pytest.approx(errors[5])
    assert -0.55 < fit.worst < -0.4


def test_fit_without_a_slope_is_not_negative(tool):
    # Longer messages that were faster: noise, of which only a latency is left.
    points = [tool.Point('all_gather', 2, n, t) for n, t in ((500, 1.25), (500000, 1.0))]
    fit = tool.fit_ring(points)
    assert fit.beta == 0
    # Least squares of alpha / t - 1 over t = 1.25 and 1.
    assert fit.alpha == pytest.approx((1 / 1.25 + 1) / (1 / 1.25**2 + 1))


# 2 C + 3 and 2 C numbers of 256 channels.
GATHER, REDUCE = 4 * 515, 4 * 512


def test_collectives_by_hand(tool):
    def is_close(found, expected):
        return found == pytest.approx(expected, rel=1e-12)

    # LL is the fastest at these sizes. A node: 7 steps of 0.6 us, a quarter of 235 GB/s.
    in_node = 6.6 + 7 * 0.6 + 7 * GATHER / (235e3 / 4)
    assert is_close(tool.nccl_ring('all_gather', 8, GATHER), in_node)
    # 8 nodes: 7 of 63 steps cross, 2.7 us; the others post, 1 us; a quarter of 12.5 GB/s.
    across = 6.6 + 56 * 1.0 + 7 * 2.7 + 63 * GATHER / (12.5e3 / 4)
    assert is_close(tool.nccl_ring('all_gather', 64, GATHER), across)
    # all_reduce: 14 of 126 steps cross two nodes' borders, 16 by NCCL's count; parts of 1 / 64.
    reduce = 6.6 + (126 - 16) * 1.0 + 16 * 2.7 + 126 * REDUCE / 64 / (12.5e3 / 4)
    assert is_close(tool.nccl_ring('all_reduce', 64, REDUCE), reduce)
    # Tree: a chain of 7 in the node, 3 levels of nodes, up and down.
    tree = 6.8 + 2 * (7 * 0.6 + 3 * 5.0) + REDUCE / (12.5e3 / 2 * 0.92 / 3.8)
    assert is_close(tool.nccl_tree(64, REDUCE), tree)
    assert is_close(tool.nccl_all_reduce(64, REDUCE), tree)
    # In a node the ring of 14 steps is the faster one.
    assert is_close(
        tool.nccl_all_reduce(8, REDUCE), 6.6 + 14 * 0.6 + 14 * REDUCE / 8 / (235e3 / 4)
    )
    # TCP adds 25 us to each step between nodes.
    assert is_close(tool.nccl_ring('all_gather', 64, GATHER, tool.SOCKETS), across + 7 * 25)
    # 8 GPUs gather over 8 nodes and share the port of theirs: 7 steps, all of them crossing. On so
    # little bandwidth LL128, which gives data 0.92 of it, is faster than LL.
    over_nodes = 14.0 + 7 * 4.0 + 7 * GATHER / (12.5e3 / 8 * 0.92)
    assert is_close(tool.hierarchical_all_gather(64, GATHER), in_node + over_nodes)
    assert is_close(tool.hierarchical_all_gather(8, GATHER), in_node)
    # A large message: LL128's 0.92 of the bandwidth beats LL's quarter and Simple's latency.
    large = 14.0 + 56 * 1.9 + 7 * 4.0 + 63 * 16396 / (12.5e3 * 0.92)
    assert is_close(tool.nccl_ring('all_gather', 64, 16396), large)
    huge = 8.4 + 7 * 3.4 + 7 * 1e8 / 235e3
    assert is_close(tool.nccl_ring('all_gather', 8, 1e8), huge)


def test_methods_put_the_collectives_together(tool):
    gather = {p: tool.nccl_ring('all_gather', p, GATHER) for p in (8, 64)}
    reduce = {p: tool.nccl_all_reduce(p, REDUCE) for p in (8, 64)}
    expected = {
        'flat ring': gather[64] + tool.nccl_ring('all_reduce', 64, REDUCE),
        'NCCL': gather[64] + reduce[64],
        'hierarchical': tool.hierarchical_all_gather(64, GATHER) + reduce[64],
        'moments': tool.nccl_all_reduce(64, GATHER) + reduce[64],
        'sub-group': gather[8] + reduce[8],
    }
    assert {m: tool.layer_time(m, 64, 256) for m in tool.METHODS} == pytest.approx(expected)
    # nn.SyncBatchNorm gathers 2 C + 1 numbers: 8 bytes less in each of 63 steps.
    less = tool.layer_time('NCCL', 64, 256) - tool.layer_time('NCCL', 64, 256, norm='SyncBN')
    assert less == pytest.approx(63 * 8 / (12.5e3 / 4))
    widths = {256: 3, 512: 2}
    assert tool.iteration_time(widths, 'NCCL', 64) == pytest.approx(
        3 * tool.layer_time('NCCL', 64, 256) + 2 * tool.layer_time('NCCL', 64, 512)
    )
    # A list of 64 outputs is copied 5 times an iteration, 5 us each.
    assert tool.copies_time(widths, 64) == pytest.approx(5 * 64 * 5)


def test_where_a_sub_group_pays(tool):
    assert tool.first_ranks(lambda ranks: ranks > 100) == 128
    assert tool.first_ranks(lambda ranks: ranks > 4096) is None
    for network in (tool.ETHERNET, tool.SOCKETS):
        widths = {256: 58}
        ranks = tool.pays_from(widths, network)
        costs = [tool.iteration_time(widths, 'NCCL', p, network) for p in (ranks // 2, ranks)]
        assert costs[0] <= 0.05 * 0.265e6 < costs[1]
        assert tool.pays_from(widths, network, True) < ranks or network is tool.SOCKETS
    # The first number of ranks whose all_reduce beats the ring that gathers, by the two formulas.
    assert tool.moments_ranks(256) == '16'


def write_csv(path, tool, in_list=1, profiled=4 * 515):
    """Write rows of a detector with one norm of 256 channels, and of a ring known by hand."""
    rows = [dict(section='gloo', quantity='cores', value=2)]
    for case in tool.DETECTORS:
        for quantity in ('layers', 'calls'):
            what = dict(section='count', case=case, channels=256)
            rows.append(dict(what, quantity=quantity, value=1))
    for name, num_bytes in (('all_gather', profiled), ('all_reduce', 4 * 512)):
        what = dict(section='profile', case=tool.MAIN, method=name, ranks=2)
        rows.append(dict(what, quantity='calls', value=1))
        rows.append(dict(what, quantity='bytes', value=num_bytes))
    rows.append(dict(section='profile', quantity='outputs in a list', value=in_list))
    for point in synthetic_points(tool, alpha=42.0, beta=0.003):
        what = dict(section='gloo', method=point.collective, ranks=point.ranks)
        rows.append(dict(what, bytes=point.num_bytes, quantity='us', value=point.time))
    for section, counts in (('layer', (2, 4, 8)), ('combine', tool.RANKS)):
        for ranks in counts:
            for name, time in (('UBN', 1000), ('SyncUBN', 3000)):
                what = dict(section=section, method=name, ranks=ranks, channels=256)
                rows.append(dict(what, quantity='us', value=time))
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, tool.COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(dict(date='2000-01-01', machine='abacus', **row) for row in rows)


def run_main(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['model_scaling.py', *map(str, arguments)])
    tool.main()


def test_page_comes_from_the_rows(tool, monkeypatch, tmp_path):
    path = tmp_path / 'scaling.csv'
    write_csv(path, tool)
    before = path.read_bytes()
    run_main(tool, monkeypatch, path, '--report')
    page = path.with_suffix('.md').read_text()
    assert path.read_bytes() == before
    assert path.with_suffix('.png').stat().st_size > 0
    assert 'abacus' in page and '2000-01-01' in page
    assert '| all | 42 | 3.00 | 0% |' in page
    # One message a layer and way; the layer takes 2000 us more, of which 2 (42 + 0.003 x bytes).
    assert '| R101, backbone | 1 | 1 | 1 x 256 | 2,060 | 2,048 | 2,052 | 2,048 |' in page
    model = (42 + 0.003 * 2060) + 2 * (42 + 0.003 * 2048 / 2)
    assert f'| 2 | 256 | 1000 | 3000 | 2000 | {model:.0f} |' in page
    assert '1 all_gather of 2,060 bytes (as counted)' in page
    assert 'not as counted' not in page
    # 4,096 rows of 515 numbers; 2 ms more than UBN.
    assert f'| 4,096 | {4096 * 2060 / 2**20:.2f} | {4096 * 16396 / 2**20:.2f} | 2.00 |' in page
    # One layer, 64 copies of 5 us.
    assert f'64: 0.3 ({64 * 5 / 0.265e6:.1%})' in page
    assert 'model_scaling.py docs/scaling.csv' in page and 'no GPU was measured' in page


def test_run_writes_what_was_measured(tool, monkeypatch, tmp_path):
    path = tmp_path / 'new/scaling.csv'
    write_csv(tmp_path / 'rows.csv', tool)
    measured = [dict(row, low=row['value']) for row in tool.read_rows(tmp_path / 'rows.csv')]
    rounds = []
    monkeypatch.setattr(tool, 'measure', lambda number: rounds.append(number) or iter(measured))
    run_main(tool, monkeypatch, path, '--rounds', 3)
    assert rounds == [3]
    rows = tool.read_rows(path)
    for row, expected in zip(rows, measured, strict=True):
        for name in ('section', 'ranks', 'channels', 'bytes', 'quantity', 'low', 'value'):
            assert row[name] == expected[name]
    assert path.with_suffix('.md').read_text() == tool.make_page(rows, 'scaling.png')

    def fail(number):
        yield measured[0]
        raise RuntimeError('half way')

    monkeypatch.setattr(tool, 'measure', fail)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match='half way'):
        run_main(tool, monkeypatch, path)
    assert path.read_bytes() == before


def stopwatch(calls, rounds, device):
    """Call everything as often as there are rounds, and say that the n-th took n milliseconds."""
    for call in calls.values():
        for _ in range(rounds):
            call()
    return {key: [float(n)] * rounds for n, key in enumerate(calls, start=1)}


def time_ranks(rank):
    import model_scaling

    model_scaling.interleave_ranks = stopwatch
    return model_scaling.time_rank(2)


def test_everything_is_timed(tool, monkeypatch):
    for collectives, layers in distributed.run(2, time_ranks):
        names = [(n, v) for v in tool.GLOO_VALUES for n in ('all_gather', 'all_reduce')]
        # In microseconds, a sample of 8 calls.
        assert collectives == {n: [1000 * i / 8] * 2 for i, n in enumerate(names, start=1)}
        names = [(n, c) for c in tool.LAYER_CHANNELS for n in ('UBN', 'SyncUBN')]
        assert layers == {n: [1000.0 * i] * 2 for i, n in enumerate(names, start=1)}


def test_combining_is_timed_by_number_of_rows(tool, monkeypatch):
    world_sizes = []

    def look(calls, rounds, device):
        world_sizes.append(dist.get_world_size())
        return stopwatch(calls, rounds, device)

    monkeypatch.setattr(tool, 'interleave', look)
    rows = list(tool.combine_suite(1))
    assert world_sizes == [8, 64, 512, 4096]
    assert [(r['method'], r['ranks'], r['low'], r['value']) for r in rows] == [
        (name, ranks, 1000.0 * n, 1000.0 * n)
        for ranks in world_sizes
        for n, name in enumerate(('UBN', 'SyncUBN'), start=1)
    ]
    assert not dist.is_initialized()


def test_page_says_what_the_rows_say(tool, tmp_path):
    path = tmp_path / 'scaling.csv'
    write_csv(path, tool, in_list=0, profiled=999)
    page = tool.make_page(tool.read_rows(path), 'scaling.png')
    assert '1 all_gather of 999 bytes (**not as counted, (1, 2060)**)' in page
    assert 'gathered into one tensor' in page and 'small kernels' not in page


def test_committed_counts_are_those_by_hand(tool):
    rows = tool.read_rows(CSV)
    assert 'not as counted' not in CSV.with_suffix('.md').read_text()
    # Of ResNet-50, the stages of 4, 6 and 3 blocks: two norms of the inner width and one
    # of four times that a block, and one more at the shortcut. FPN and heads: 16 of 256.
    stages = {128: 4, 256: 6, 512: 3}
    expected = {}
    for inner, blocks in stages.items():
        expected[inner] = expected.get(inner, 0) + 2 * blocks
        expected[4 * inner] = expected.get(4 * inner, 0) + blocks + 1
    assert tool.count_widths(rows, 'R50, backbone') == expected
    expected[256] += 16
    assert tool.count_widths(rows, 'R50, all norms') == expected
    # ResNet-101 has 23 blocks instead of 6 in the stage of inner width 256.
    expected[256] += 2 * 17
    expected[1024] += 17
    assert tool.count_widths(rows, 'R101, all norms') == expected


@pytest.mark.parametrize(
    'arguments, message',
    [(('--rounds', 0), '--rounds must be'), (('--report',), 'a.csv: no such file')],
)
def test_bad_arguments(tool, monkeypatch, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match='2'):
        run_main(tool, monkeypatch, tmp_path / 'a.csv', *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'a.csv').exists()

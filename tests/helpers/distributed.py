"""Runs a function on several processes that form a gloo group.

The processes are started at the first use and serve all later ones, since each start imports torch
anew. Each use forms a group of its own, so that a broken one harms no other.
"""

import atexit
import itertools
import math
import multiprocessing.connection
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# In seconds. A collective that one rank never joins becomes an error after this time.
TIMEOUT = 60
# What the parent allows on top: for the start of the processes, and until it ends one that hangs
# without a collective.
GRACE = 120


class RankError(Exception):
    """A rank raised an exception or died; the message has its traceback."""


def run(world_size, function, *args):
    """Return the results of ``function(rank, *args)`` on ``world_size`` ranks, in their order.

    Args:
        world_size (int): Number of processes; ``torch.distributed`` is initialised with gloo in
            each, on CPU.
        function (Callable): Defined at the top of a module.
        *args: Anything that can be pickled; tensors are copied.

    Raises:
        RankError: A rank raised an exception; the first to do so comes first in the message.
    """
    while len(_workers) < world_size:
        _workers.append(_Worker(len(_workers)))
    # A file of its own for every rendezvous; no port to be taken by somebody else.
    store = str(_directory() / f'store{next(_numbers)}')
    for worker in _workers[:world_size]:
        worker.send((world_size, store, function, args))

    results, failures, is_broken = {}, [], False
    pending = {worker.connection: worker for worker in _workers[:world_size]}
    deadline = time.monotonic() + TIMEOUT + GRACE
    while pending:
        ready = multiprocessing.connection.wait(pending, max(0, deadline - time.monotonic()))
        if not ready:
            failures.append(f'no answer from ranks {[w.rank for w in pending.values()]}')
            is_broken = True
            break
        for connection in ready:
            worker = pending.pop(connection)
            try:
                succeeded, value, worker_is_broken = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                succeeded, value, worker_is_broken = False, 'nothing: it died', True
            is_broken |= worker_is_broken
            if succeeded:
                results[worker.rank] = value
            else:
                failures.append(f'rank {worker.rank} raised {value}')
    if is_broken:
        _stop()
    if failures:
        raise RankError('\n'.join(failures))
    return [results[rank] for rank in range(world_size)]


class Collectives:
    """Records the collectives of this process, whatever function of torch started them.

    Attributes:
        log (list[tuple[str, int]]): gloo's name of each, such as 'all_reduce', and the number of
            values that this rank put in.
    """

    def __init__(self):
        self.log = []

    def __enter__(self):
        self._profile = torch.autograd.profiler.profile(use_kineto=False, record_shapes=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        for event in self._profile.function_events:
            backend, _, name = event.name.partition(':')
            if backend == 'gloo':
                self.log.append((name, sum(math.prod(s) for s in event.input_shapes)))


class _Worker:
    """One process, as the parent sees it."""

    def __init__(self, rank):
        # Not forked: a fork of a process with threads may hang, and inherits its state.
        context = torch.multiprocessing.get_context('spawn')
        self.rank = rank
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, job):
        # Where the function's module is found may have changed since the process was started.
        self.connection.send_bytes(pickle.dumps(sys.path))
        # Plain pickle: multiprocessing's would share the tensors' memory.
        self.connection.send_bytes(pickle.dumps(job))


def _serve(rank, connection):
    torch.set_num_threads(1)
    while True:
        try:
            sys.path[:] = pickle.loads(connection.recv_bytes())
            job = connection.recv_bytes()
        except EOFError:
            return
        # The former group goes only now, when all of its ranks have finished.
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send_bytes(_answer(rank, job))


def _answer(rank, job):
    """Return, pickled: is it a result, the result or the traceback, is the process broken."""
    is_broken = False
    try:
        world_size, store, function, args = pickle.loads(job)
        # A start that fails leaves torch with a count of groups that is not that of other ranks.
        is_broken = True
        dist.init_process_group(
            'gloo',
            init_method=f'file://{store}',
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        is_broken = False
        # No rank may fail, and leave, while others are still on their way into the group.
        dist.barrier()
        torch.manual_seed(rank)
        return pickle.dumps((True, function(rank, *args), is_broken))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc(), is_broken))
        # Ranks that wait for this one get an error at once instead of after the timeout.
        if dist.is_initialized():
            dist.destroy_process_group()
        return answer


_workers: list[_Worker] = []
_numbers = itertools.count()
_temporary = None


def _directory():
    global _temporary
    if _temporary is None:
        _temporary = tempfile.TemporaryDirectory()
    return Path(_temporary.name)


@atexit.register
def _stop():
    """End all processes; the next use starts new ones."""
    for worker in _workers:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
    _workers.clear()

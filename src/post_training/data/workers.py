"""Work shared among processes whose results come in order: the same for any number of them.

Each worker has a pipe of its own, and a thread here that waits at its other end. A worker that is
killed closes its pipe, whatever it was doing; in a queue that workers share (ProcessPoolExecutor)
one that is killed while it writes leaves half a result and a locked lock, and everybody waits.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from post_training.core.errors import PostTrainingError
from post_training.core.process import dies_with

Item = TypeVar("Item")
State = TypeVar("State")
Output = TypeVar("Output")

# By default: each has a tokenizer in memory, and the one process that cuts and writes for all of
# them has no more to give.
_MOST_WORKERS = 16
# Of each worker; enough that none is idle while the slowest result is waited for.
_ITEMS_AHEAD = 4
_ENDING_S = 5.0  # between the end of a process's pipe and its own


def ordered_map(
    function: Callable[[State, Item], Output],
    state: State,
    items: Iterable[Item],
    *,
    num_workers: int | None = None,
) -> Iterator[Output]:
    """`function(state, item)` of each item, in the items' order, with a bounded number under way.

    function: at the top of a module, so that it can be pickled. state: sent to each worker once.
    num_workers: by default one for each core that this process may use, at most 16. A single item,
    or all of a single worker, is done in this process.
    Errors: what `function` raises, in its turn; PostTrainingError when a worker ends or is killed.
    """
    iterator = iter(items)
    first = list(islice(iterator, 2))
    num_workers = num_workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    if len(first) < 2 or num_workers == 1:
        for item in chain(first, iterator):
            yield function(state, item)
        return
    workers = [_Worker(function, state) for _ in range(num_workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def work(item: Item) -> Output:
        worker = idle.get()
        try:
            return worker.call(item)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_workers)
    try:
        under_way: deque[Future[Output]] = deque()
        for item in chain(first, iterator):
            under_way.append(threads.submit(work, item))
            if len(under_way) >= num_workers * _ITEMS_AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """A worker process, and our end of the pipe to it."""

    def __init__(self, function: Callable[[Any, Any], Any], state: Any):
        # Not forked: this process may hold threads (torch's, gloo's) whose locks a fork would
        # copy; and a fork would hold the other workers' pipes open.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()))
        self._process.start()
        theirs.close()
        # Not an argument of the process: those are written into a pipe whose other end stays open
        # here, so that a process which is killed as it starts would be waited for forever.
        self._task: tuple[Callable[[Any, Any], Any], Any] | None = (function, state)

    def call(self, item: Any) -> Any:
        try:
            if self._task is not None:
                self._connection.send(self._task)
                self._task = None
            self._connection.send(item)
            succeeded, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_ENDING_S)
            code = self._process.exitcode
            if code is not None and code >= 0:  # Its own output says why.
                raise PostTrainingError(f"a worker process ended with exit code {code}") from None
            raise PostTrainingError(
                "a worker process was killed",
                hint="most often the machine ran out of memory: lower num_workers",
            ) from None
        if not succeeded:
            raise result
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, parent: int) -> None:
    dies_with(parent)()
    # A keyboard, a launcher and Slurm send these to all processes of a run. Our parent ends us, and
    # must not take us for one that was killed. Not SIG_IGN, which a program that we start inherits.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    # A worker is one core; the tokenizers library would start a thread for each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    function, state = connection.recv()
    # Else each garbage collection looks through all modules, which takes a twelfth of the time.
    gc.freeze()
    while True:
        item = connection.recv()
        try:
            outcome = True, function(state, item)
        except Exception as error:
            outcome = False, error
        connection.send(outcome)

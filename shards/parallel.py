"""The same work on many items by several processes, in order, never far ahead of the one who takes the results."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

import cv2

from shards.schema import ShardError

_AHEAD = 4  # items a process may be ahead: enough to even out large pictures and small ones

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int) -> Generator[Result, None, None]:
    """`map`, by `jobs` processes; with one, by this process.

    Args:
        function: picklable, as are items and results. What it raises is raised here.
        items: taken as they are needed.
        jobs: number of processes.

    Raises:
        ShardError: a process died.
    """
    if jobs <= 1:
        yield from map(function, items)
        return
    # Not forked from here: a child would inherit locks, of threads and of files, and hold them when this one is killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.finish"])  # imports once what the work needs
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start)
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > jobs * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ShardError("a worker process died, killed for its memory perhaps: try again with fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    cv2.setNumThreads(0)  # there are as many processes as cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    end_with_parent()


def end_with_parent() -> None:
    """Called in a process of multiprocessing's: let it end as soon as its parent has, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Ranks on this machine: processes joined by gloo that wait to be asked, so that worlds of several sizes take turns."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # see `launch.bench.race.preload`


class World:
    """Processes that are each a rank; they end with the block.

    Args:
        size: how many.
        prepare: `prepare(case) -> answer`, called in each of them; importable from there. `answer(what)` answers one
            request.
        case: picklable.
        limit_s: for preparing, and for each request.
    """

    def __init__(self, size: int, prepare: Callable[[Any], Callable[[Any], Any]], case: Any, *, limit_s: float):
        self.size, self._limit_s = size, limit_s
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")  # they meet through a file, so that no port can be taken
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, prepare, case, rank, size, store), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, what: Any) -> list[Any]:
        """Every rank's answer, in rank order.

        Raises:
            RuntimeError: a rank failed, ended or was too slow; it is named.
        """
        for pipe in self._pipes:
            pipe.send(what)
        deadline = time.monotonic() + self._limit_s
        answers = []
        for rank, pipe in enumerate(self._pipes):
            where = f"rank {rank} of {self.size}"
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                raise RuntimeError(f"{where} has not answered in {self._limit_s:.0f} s")
            try:
                answer, problem = pipe.recv()
            except EOFError:
                raise RuntimeError(f"{where} ended") from None
            if problem is not None:
                raise RuntimeError(f"{where} failed:\n{problem}")
            answers.append(answer)
        return answers

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()  # they have nothing to put in order, and one may wait for another
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(pipe: Any, prepare: Callable[[Any], Any], case: Any, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    answer = None
    try:
        while True:
            what = pipe.recv()
            if answer is None:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
                answer = prepare(case)
            pipe.send((answer(what), None))
    except EOFError:
        return
    except BaseException:  # whatever it is, who asked shall know
        pipe.send((None, traceback.format_exc()))

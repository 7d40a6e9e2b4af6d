"""Run a function on several gloo ranks, each a process of its own, and get every rank's answer or traceback."""

import io
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A forkserver that has torch loaded starts a rank in a tenth of the time of a new interpreter.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "tests.helpers.spawn"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 500) -> list[Any]:
    """Call `function(*args)` on every rank and return what each gave, in rank order.

    Args:
        function: module-level, importable.
        world_size: how many gloo ranks; they meet through a file, so that no port can be taken.
        args: picklable.
        timeout_s: after this the ranks still running are killed and the test fails, naming them.
    """
    answers: Any = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(target=_work, args=(function, rank, world_size, store, answers, _pack(args)), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(results) < world_size:
                if not answers.empty():
                    rank, result, problem = answers.get()
                    assert problem is None, f"rank {rank} failed:\n{problem}"
                    results[rank] = _unpack(result)
                    continue
                silent = [rank for rank in range(world_size) if rank not in results]
                dead = [rank for rank in silent if processes[rank].exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died with exit codes {[processes[r].exitcode for r in dead]}"
                assert time.monotonic() < deadline, f"ranks {silent} are still running after {timeout_s} s"
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _work(function: Callable[..., Any], rank: int, world_size: int, store: str, answers: Any, args: bytes) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(*_unpack(args))
        dist.barrier()
        answers.put((rank, _pack(result), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def _pack(value: Any) -> bytes:
    """As bytes: tensors would otherwise travel as shared memory, which dies with the process that made it."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(packed), weights_only=False)  # our own bytes, from our own processes

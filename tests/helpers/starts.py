"""Starts of a tiny run, to be broken: the ranks of `python -m launch.train`, as a launcher makes them, but quickly.

Each rank is forked from a process that has imported torch and the library, gets the variables of a launcher and its
arguments, and is a process like any other from then on.
"""

import json
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.spawn import CONTEXT

# All that a start would import; for DeepSpeed's optimizer that is torch.compile with its thousand modules.
CONTEXT.set_forkserver_preload(
    ["torch", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.flop_counter"]
    + ["skimage.segmentation", "dist_train.trainer", "launch.train", "tests.helpers.spawn"]
)

STEPS, SAVES = 15, 3
"""Steps of the tiny run, and between its checkpoints."""


class TinyRun:
    """A distill run of a second or two: shards in DIR/train, its folder DIR/runs/NAME, log of all starts DIR/NAME.log.

    Args:
        work: a folder made by `prepare`.
        name: of the run.
        settings: `key.sub=value` of all its starts.
    """

    def __init__(self, work: Path, name: str, *settings: str) -> None:
        self.work, self.name, self.settings = work, name, settings
        self.folder, self.log = work / "runs" / name, work / f"{name}.log"

    @staticmethod
    def prepare(work: Path) -> None:
        """Write shards and configuration."""
        write_pairs(make_pairs(work / "pairs", 12, h=40, w=48), work / "train", shard_mib=0.02)
        (work / "run.yaml").write_text(f"""
name: tiny
out: {work}/runs
data: {{train: {work}/train, crop_px: 32, workers: 2}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1], dec_blk_nums: [1]}}
prior: {{name: regions, num_masks: 8, scale: 50, min_area_px: 16}}
loss: {{sgr: {{weight: 0}}}}  # VGG takes seconds at each start
optim: {{steps: {STEPS}, global_batch: 4, lr: 1e-3}}
checkpoint: {{every: {SAVES}}}
track: {{every: 1, gradients_every: 0, samples: true, progress: false}}
""")

    @property
    def command(self) -> list[str]:
        """Arguments of launch.train."""
        return [str(self.work / "run.yaml"), f"name={self.name}", *self.settings]

    def start(self, *settings: str, **options: Any) -> "Start":
        """Start it, or go on."""
        return Start(self, [*self.command, *settings], **options)

    @property
    def step(self) -> int:
        """The newest step that rank 0 has begun, 0 if none."""
        path = self.folder / "samples-rank0.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    @property
    def resumed(self) -> list[int]:
        """From which step each start has gone on, if from any."""
        found = re.findall(rf"resuming {self.name} from \S*/step-(\d+),", self.log.read_text())
        return [int(step) for step in found]

    @property
    def saved(self) -> list[Path]:
        """Its checkpoints, whole or not."""
        return sorted((self.folder / "checkpoints").glob("step-*"))


class Start:
    """One start of a run; leaving the block kills what is left of it.

    Args:
        run: the run.
        arguments: of launch.train.
        world: number of ranks.
        sabotage: called in each rank before it begins; importable.
        env: more variables of the ranks.
    """

    def __init__(
        self,
        run: TinyRun,
        arguments: list[str],
        *,
        world: int = 2,
        sabotage: Callable[[], None] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self._log = run.log
        self._offset = run.log.stat().st_size if run.log.exists() else 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._ranks = []
        for rank in range(world):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            told |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
            process = CONTEXT.Process(target=_rank, args=(run.log, arguments, told, sabotage))
            process.start()
            self._ranks.append(process)

    def __enter__(self) -> "Start":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def said(self) -> str:
        """What the ranks have printed; if others start meanwhile, they too."""
        with self._log.open() as file:
            file.seek(self._offset)
            return file.read()

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [process.pid for process in self._ranks if process.pid is not None]

    def until(self, happened: Callable[[], Any], what: str, *, timeout_s: float = 300) -> None:
        """Wait, looking often, for something that happens while all ranks live."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            codes = [process.exitcode for process in self._ranks]
            assert codes == [None] * len(codes), f"ended with {codes} before {what}:\n{self.said[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s:\n{self.said[-4000:]}"
            time.sleep(0.001)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks; to all, if none is named."""
        for rank in ranks or range(len(self._ranks)):
            os.kill(self.pids[rank], number)

    def kill(self, *ranks: int) -> None:
        """kill -9 these ranks; all, if none is named. Their workers end themselves."""
        victims = [self._ranks[rank] for rank in ranks or range(len(self._ranks))]
        for process in victims:
            process.kill()
        for process in victims:
            process.join()

    def wait(self, *ranks: int, timeout_s: float = 400) -> list[int]:
        """Exit codes of these ranks, or of all; of those killed it is the signal's number, negative."""
        deadline = time.monotonic() + timeout_s
        waited = [self._ranks[rank] for rank in ranks or range(len(self._ranks))]
        for process in waited:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in waited]
        assert None not in codes, f"ranks have not ended in {timeout_s} s ({codes}):\n{self.said[-4000:]}"
        return [code for code in codes if code is not None]


def _rank(log: Path, arguments: list[str], env: dict[str, str], sabotage: Callable[[], None] | None) -> None:
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in any new interpreter
    import torch

    from launch.train import main

    torch.set_num_threads(1)
    sys.argv = ["launch/train.py", *arguments]
    if sabotage is not None:
        sabotage()
    sys.exit(main())

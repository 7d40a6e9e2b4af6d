"""Timing that can be believed: cases in turns, each in a process of its own, and a limit for every one.

What else the machine does meets all the cases of a round alike, so a ratio taken within a round is steadier than the
times it is made of. A process of its own gives each case its own peak of memory, and can be ended in mid-computation.
"""

import argparse
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.room import give_back_freed_memory

MIB = 2**20


def add_race_options(parser: argparse.ArgumentParser, *, limit_s: float, first_limit_s: float) -> None:
    """Where and how long to race, and where to put what was measured."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each case (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, for each case")
    parser.add_argument(
        "--limit", type=float, default=limit_s, metavar="SECONDS", help=f"for one turn (default: {limit_s:.0f})"
    )
    parser.add_argument(
        "--first-limit",
        type=float,
        default=first_limit_s,
        metavar="SECONDS",
        help=f"for the first turn, which may compile (default: {first_limit_s:.0f})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every lap to this file")


class Work(NamedTuple):
    """What a case comes down to."""

    lap: Callable[[], Tensor | None]
    """The computation that is timed. What it returns is kept, and asked for once."""
    held_bytes: int
    """Memory held before the lap that belongs to the case, such as weights."""


class Lap(NamedTuple):
    """One timed computation."""

    seconds: float
    peak_mib: float | None
    """CUDA: the allocator's peak. CPU: `held_bytes` and the growth of the resident memory to its peak in this lap;
    None where the system does not tell (Linux does)."""


class Outcome(NamedTuple):
    """What became of a case."""

    first_s: float | None = None
    """Time of the first lap, which is not among `laps`: it compiles, allocates, fills caches."""
    laps: tuple[Lap, ...] = ()
    value: Tensor | None = None
    """What the first lap returned, on the CPU."""
    left_out: str = ""
    """Why there are no laps."""

    @property
    def seconds(self) -> float | None:
        """Median lap."""
        return statistics.median(lap.seconds for lap in self.laps) if self.laps else None

    @property
    def peak_mib(self) -> float | None:
        """Largest peak."""
        return max((lap.peak_mib for lap in self.laps if lap.peak_mib is not None), default=None)

    def gain(self, base: "Outcome") -> float | None:
        """Median over the rounds of the base's time divided by this one's; above 1 this is faster."""
        pairs = zip(base.laps, self.laps, strict=False)  # a case that was ended early has fewer
        return statistics.median([a.seconds / b.seconds for a, b in pairs]) if base.laps and self.laps else None


def race(
    prepare: Callable[[Any], Work],
    cases: dict[str, Any],
    *,
    device: str,
    threads: int,
    rounds: int,
    limit_s: float,
    first_limit_s: float,
) -> dict[str, Outcome]:
    """Run all cases in turn, `rounds` times after a first one that does not count.

    Args:
        prepare: makes a case into work, in the case's own process; importable from there.
        cases: name -> case.
        threads: of each process.
        limit_s: for one lap; a case that takes longer is ended. No round but the first begins once `limit_s` for each
            case is spent.
        first_limit_s: for preparing and the first lap together.
    """
    outcomes: dict[str, Outcome] = {}
    runners: dict[str, _Runner] = {}
    try:
        for name, case in cases.items():
            runners[name] = _Runner(prepare, case, device, threads)
            try:
                first, value = runners[name].ask("first", first_limit_s)
            except (RuntimeError, TimeoutError) as error:
                outcomes[name] = Outcome(left_out=str(error))
                runners.pop(name).kill()
            else:
                outcomes[name] = Outcome(first.seconds, value=value)
        start = time.monotonic()
        for done in range(rounds):
            if done and time.monotonic() - start > limit_s * len(cases):
                break
            for name in list(runners):
                try:
                    lap = runners[name].ask("lap", limit_s)
                except (RuntimeError, TimeoutError) as error:
                    outcomes[name] = Outcome(left_out=str(error))
                    runners.pop(name).kill()
                else:
                    outcomes[name] = outcomes[name]._replace(laps=(*outcomes[name].laps, lap))
    finally:
        for runner in runners.values():
            runner.end()
    return outcomes


# Forked from a server with nothing but modules in it, a process is as good as new, and there in no time.
_CONTEXT = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Have the server of processes import these; of no effect once a race has begun."""
    _CONTEXT.set_forkserver_preload(list(modules))


class _Runner:
    """A process with one case in it."""

    def __init__(self, prepare: Callable[[Any], Work], case: Any, device: str, threads: int):
        self._pipe, theirs = _CONTEXT.Pipe()
        # Not a daemon, which could have no workers; it ends with the pipe.
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, prepare, case, device, threads))
        self._process.start()
        theirs.close()

    def ask(self, what: str, limit_s: float) -> Any:
        """Answer to a request; RuntimeError if the case fails, TimeoutError if it takes too long."""
        try:
            self._pipe.send(what)
            if not self._pipe.poll(limit_s):
                raise TimeoutError(f"{'the first pass' if what == 'first' else 'a pass'} not done in {limit_s:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"its process ended with code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{type(answer).__name__}: {str(answer).splitlines()[0]}")
        return answer

    def end(self) -> None:
        """Let an idle process go, so that it takes along what it started."""
        self._pipe.close()
        self._process.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        """End a process, and what it started, a compiler for instance."""
        if self._process.is_alive():
            assert self._process.pid is not None
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to lead a group yet
                self._process.kill()
        self._process.join()


def _serve(pipe: Any, prepare: Callable[[Any], Work], case: Any, device: str, threads: int) -> None:
    os.setpgrp()
    torch.set_num_threads(threads)
    work: Work | None = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            work = work or prepare(case)
            lap, value = _timed(work, torch.device(device))
            pipe.send((lap, None if value is None else value.cpu()) if what == "first" else lap)
        except Exception as error:  # whatever it is, the table says it and the other cases go on
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _timed(work: Work, device: torch.device) -> tuple[Lap, Tensor | None]:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the other processes, too, each keeps no more than it needs
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = resident_mib(restart_peak=True)
    start = time.perf_counter()
    value = work.lap()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        return Lap(seconds, torch.cuda.max_memory_allocated(device) / MIB), value
    after = resident_mib()
    peak = None if before is None or after is None else work.held_bytes / MIB + after - before
    return Lap(seconds, peak), value


def resident_mib(*, restart_peak: bool = False) -> float | None:
    """Peak of this process's resident memory since it was last restarted; restarting makes it what is resident now."""
    try:
        if restart_peak:
            give_back_freed_memory()  # it would hide as much of the lap's growth
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # no Linux, or not allowed
        return None
    return int(match[1]) / 1024 if match else None


def describe_machine(*, device: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "load_before": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def progress(text: str) -> None:
    """Say on stderr what is being measured; on a terminal the next text takes its place, an empty one clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)

"""What is known of a run while it goes on: speed, where its time goes, memory, the rank that lags, a sign of life."""

import contextlib
import json
import logging
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from dist_train import ranks
from dist_train.config import RunConfig
from dist_train.spans import ASIDE, OWN, Spans
from shards.files import write_whole

log = logging.getLogger(__name__)

LAGS, PATIENCE = 1.4, 3
"""A rank whose own time is so many times the median, at so many log lines in a row, is named."""
BEAT_S = 5.0
"""Least time between two signs of life."""

PEAK_TFLOPS = {
    "V100": 125, "T4": 65, "A100": 312, "A10G": 70, "A10": 125, "A30": 165, "A40": 150, "L4": 121, "L40S": 362,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
    "RTX 3090": 71, "RTX 4090": 165, "RTX A6000": 155, "RTX 6000 Ada": 364,
}  # fmt: skip
"""Products in half precision on the tensor cores, summed in float32, without sparsity: from the makers' data sheets."""


def known_gpu(gpu: str) -> str | None:
    """The key of `PEAK_TFLOPS` that a GPU's name holds (torch.cuda.get_device_name, or as people write it), or None."""
    words = f" {gpu.replace('-', ' ')} ".lower()
    return max((name for name in PEAK_TFLOPS if f" {name} ".lower() in words), key=len, default=None)


def peak_tflops(gpu: str) -> float | None:
    """What a GPU of this name could do, see `PEAK_TFLOPS`; None: not known."""
    name = known_gpu(gpu)
    return PEAK_TFLOPS[name] if name else None


class Watch:
    """Measures the steps of a run, and writes RUN/heartbeat.json and, if asked to, RUN/trace-rankR.json.gz.

    Args:
        run: the run.
        device: of this rank.
        spans: the clock that the step's parts are marked on; what it has measured so far is forgotten.
        sample_flops: what training on one sample costs the trained nets.
    """

    def __init__(self, run: RunConfig, device: torch.device, spans: Spans, *, sample_flops: float) -> None:
        self._run, self._spans = run, spans
        self._gpu = device if device.type == "cuda" else None
        self._rank_tflop = sample_flops * run.optim.global_batch / ranks.world_size() / 1e12
        self._peak = peak_tflops(torch.cuda.get_device_name(device)) if self._gpu else None
        self._stragglers = Stragglers()
        self._steps, self._loss, self._last_beat_s = 0, float("nan"), float("-inf")
        self._profile: torch.profiler.profile | None = None
        spans.take()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block is optimizer step `step`."""
        window = self._run.track.profile
        if 1 <= window.from_step <= step < window.from_step + window.steps and self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        self._steps += 1
        if self._profile and step == min(window.from_step + window.steps - 1, self._run.optim.steps):
            self._profile.stop()
            path = self._run.dir / f"trace-rank{ranks.rank()}.json.gz"
            try:
                with self._spans("trace"):
                    self._profile.export_chrome_trace(str(path))
                log.info("%s: a trace up to step %d, for chrome://tracing or ui.perfetto.dev", path, step)
            except (OSError, RuntimeError) as error:  # no reason to end a run, least of all on one rank alone
                log.warning("%s could not be written: %s", path, error)
            self._profile = None
        due = step == self._run.optim.steps or time.monotonic() > self._last_beat_s + BEAT_S
        if due and ranks.is_main():
            self._last_beat_s = time.monotonic()
            self._beat(step)

    def lap(self, losses: Mapping[str, float]) -> dict[str, float]:
        """What the steps since the last lap took. All ranks call.

        Args:
            losses: means since then, for the sign of life.

        Returns:
            Of this rank's time, in seconds a step, time/step_s and its parts time/<phase>_s, which add up to it: data
            (waiting for it), student, prior, teacher, features (VGG), losses, backward, communication, update
            (clipping, optimizer, average) and other. Communication is the time that the step stands still for
            DeepSpeed's collectives, waiting for slower ranks included; stage 3 starts some ahead, and waits for those
            in the phase that needs them. time/prior_share, what making masks has of a step, where a prior is asked.
            time/samples_per_s, of all ranks. time/tflops, what the trained nets compute on each rank, and time/mfu, its
            share of what the GPU could do in half precision, where that is known. memory/host_gib (without the loader's
            processes) and memory/gpu_peak_gib, of the rank that has most. With several ranks, see `Stragglers`.
        """
        spent = {phase: phases.seconds / self._steps for phase, phases in self._spans.take().items()}
        self._steps, self._loss = 0, losses.get("total", float("nan"))
        step_s = sum(spent.values())
        values = {"time/step_s": step_s} | {f"time/{phase}_s": spent[phase] for phase in sorted(spent)}
        if "prior" in spent:
            values["time/prior_share"] = spent["prior"] / step_s
        values["time/samples_per_s"] = self._run.optim.global_batch / step_s
        values["time/tflops"] = self._rank_tflop / step_s
        if self._peak:
            values["time/mfu"] = values["time/tflops"] / self._peak
        told = ranks.gather_objects(_Told(socket.gethostname(), {p: spent.get(p, 0.0) for p in OWN}, self._memory()))
        for name in told[0].memory:
            values[f"memory/{name}"] = max(rank.memory[name] for rank in told)
        return values | self._stragglers.note([rank.host for rank in told], [rank.own for rank in told])

    def aside(self) -> dict[str, float]:
        """What took time since the step and shall not count for it: time/validation_s, time/pictures_s,
        time/checkpoint_s, time/trace_s. Empty if nothing did."""
        return {f"time/{phase}_s": spent.seconds for phase, spent in self._spans.take(ASIDE).items()}

    def _memory(self) -> dict[str, float]:
        """In GiB: resident now, and allocated at most since the last call."""
        memory = {"host_gib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30}
        if self._gpu is not None:
            memory["gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._gpu) / 2**30
            torch.cuda.reset_peak_memory_stats(self._gpu)
        return memory

    def _beat(self, step: int) -> None:
        told = {
            "step": step,
            "steps": self._run.optim.steps,
            "loss": self._loss if math.isfinite(self._loss) else None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        with contextlib.suppress(OSError):  # a full disk shall stop the run where something would be lost
            write_whole(self._run.dir / "heartbeat.json", json.dumps(told) + "\n")


class _Told(NamedTuple):
    """What a rank tells the others at a lap."""

    host: str
    own: dict[str, float]
    memory: dict[str, float]


class Stragglers:
    """Finds the rank for which all others wait, lap by lap."""

    def __init__(self) -> None:
        self._slowest, self._laps = -1, 0

    def note(self, hosts: Sequence[str], own: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Compare the ranks; on the main one, a rank that lags in `PATIENCE` laps in a row is named in a warning.

        Args:
            hosts: of each rank.
            own: of each rank, seconds a step in each phase in which it waits for no other.

        Returns:
            time/spread, the slowest rank's own time over the median, and time/slowest_rank; empty for one rank.
        """
        if len(own) == 1:
            return {}
        totals = [sum(phases.values()) for phases in own]
        median = statistics.median_low(totals)
        slowest = max(range(len(own)), key=totals.__getitem__)
        lags = totals[slowest] > LAGS * median
        self._laps = int(lags) + (self._laps if lags and slowest == self._slowest else 0)
        self._slowest = slowest
        if self._laps == PATIENCE and ranks.is_main():
            phase = max(own[slowest], key=lambda name: own[slowest][name] - statistics.median_low(o[name] for o in own))
            log.warning(
                "rank %d on %s keeps the others waiting: %.3g s a step of its own where the median rank has %.3g s, "
                "most of it in %s", slowest, hosts[slowest], totals[slowest], median, phase,
            )  # fmt: skip
        return {"time/spread": totals[slowest] / max(median, 1e-9), "time/slowest_rank": slowest}

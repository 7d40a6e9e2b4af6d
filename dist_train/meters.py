"""What is measured as a run goes on, under the names it is logged by."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dist_train import ranks
from dist_train.config import LossConfig

log = logging.getLogger(__name__)

DEAD, EXPLODING = 1e-3, 10.0
"""Ratios of a term's gradient to the reconstruction's, at the student's output, that deserve a word."""


def named_losses(losses: Mapping[str, float], loss: LossConfig) -> dict[str, float]:
    """Names as they are logged.

    Args:
        losses: means of what a task's forward gives.
        loss: the weights.

    Returns:
        `loss/<term>`, unweighted; `weight/<term>`; `gradient/<term>`, the norm of the weighted term's gradient at the
        student's output, and `gradient_ratio/<term>`, its ratio to the reconstruction's; `prior/<what>`. A ratio that
        tells of a dead or an exploding term is a warning in the log.
    """
    named: dict[str, float] = {}
    for name, value in losses.items():
        term = name.removeprefix("gradient/")
        if name.startswith("mask"):
            named[f"prior/{name}"] = value
        elif term == name:
            named[f"loss/{name}"] = value
        else:
            named[name] = value
            if term != "student_rec":
                ratio = named[f"gradient_ratio/{term}"] = value / max(losses["gradient/student_rec"], 1e-30)
                if not DEAD < ratio < EXPLODING and ranks.is_main():
                    log.warning(
                        "loss.%s.weight: the term's gradient is %.2g of the reconstruction's, so it %s", term, ratio,
                        "does next to nothing" if ratio <= DEAD else "drowns the others",
                    )  # fmt: skip
    weights = {"spd": loss.spd.weight, "sgr": loss.sgr.weight}
    return named | {f"weight/{term}": weight for term, weight in weights.items() if term in losses}


class Stopwatch:
    """Samples per second, and the shares of the time spent waiting for data and making masks, since the last lap."""

    def __init__(self, global_batch: int, device: torch.device | None = None) -> None:
        self._global_batch = global_batch
        self._on_gpu = device is not None and device.type == "cuda"
        self._begin()

    def _begin(self) -> None:
        self._begun, self._steps, self._data_s = time.perf_counter(), 0, 0.0
        self._stepped = self._begun
        self._prior_s: list[float] = []
        self._prior_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def step(self) -> None:
        """One more optimizer step is done."""
        self._steps += 1
        self._stepped = time.perf_counter()

    def leave_out_since_step(self) -> None:
        """What happened since the last step (logging, validation, saving) shall not count."""
        self._begun += time.perf_counter() - self._stepped

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting."""
        begun = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - begun

    @contextmanager
    def making_masks(self) -> Iterator[None]:
        """Counts the time inside as the prior's.

        On a GPU it is the time of the GPU's queue from here to there, which is read at the lap: nothing waits for it,
        and what the host does while the queue is busy costs nothing.
        """
        if self._on_gpu:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._prior_events.append((begun, ended))
        else:
            begun_s = time.perf_counter()
            yield
            self._prior_s.append(time.perf_counter() - begun_s)

    def lap(self) -> dict[str, float]:
        """`time/samples_per_s`, `time/step_s`, `time/data_share` and, where masks were made, `time/prior_share` since
        the last lap; empty if there was no step."""
        for begun, ended in self._prior_events:
            ended.synchronize()
            self._prior_s.append(begun.elapsed_time(ended) / 1000)
        elapsed, steps, data_s, prior_s = time.perf_counter() - self._begun, self._steps, self._data_s, self._prior_s
        self._begin()
        if not steps:
            return {}
        shares = {"time/data_share": data_s / elapsed}
        if prior_s:
            shares["time/prior_share"] = sum(prior_s) / elapsed
        return {"time/samples_per_s": steps * self._global_batch / elapsed, "time/step_s": elapsed / steps, **shares}

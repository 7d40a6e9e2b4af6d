"""What each run's record says in the end."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_train.track import read_metrics
from launch.ablate.plan import Trial

_SCORE = re.compile(r"val/(?P<protocol>[^/]+)/(?P<metric>psnr|ssim)/(?P<net>input|student|teacher)")


class Score(NamedTuple):
    """The last validation of one run."""

    variant: str
    seed: int
    protocol: str
    values: dict[str, float]
    """`<net>/<metric>`, for net in input, student and, where there is one, teacher; metric psnr (dB) or ssim.
    `fit/psnr`, of runs with `loss.rec: psnr`: mean of the student's training crops over the last quarter of the steps,
    each scored before the step that learns from it."""
    step_s: float
    """Median time of a step."""
    samples: int
    """Seen in training."""


def read_scores(trials: Sequence[Trial]) -> list[Score]:
    """Of the trials that have come to their last step."""
    return [score for trial in trials if (score := _read(trial)) is not None]


def _read(trial: Trial) -> Score | None:
    record = read_metrics(trial.run.dir)
    if not record or record[-1]["step"] != trial.run.optim.steps:
        return None
    last = record[-1]
    found = {name: match for name in last if (match := _SCORE.fullmatch(name))}
    if not found:
        return None
    values = {f"{match['net']}/{match['metric']}": last[name] for name, match in found.items()}
    if trial.run.loss.rec == "psnr" and any("loss/student_rec" in line for line in record):
        values["fit/psnr"] = -_mean_since(record, "loss/student_rec", trial.run.optim.steps * 3 // 4)
    times = [line["time/step_s"] for line in record if "time/step_s" in line]
    protocol = next(iter(found.values()))["protocol"]
    return Score(trial.variant.name, trial.seed, protocol, values, statistics.median(times), int(last["samples_seen"]))


def _mean_since(record: Sequence[Mapping[str, float]], name: str, step: int) -> float:
    """Mean over the steps after `step` of what each line has the mean of since the line before."""
    lines = [line for line in record if name in line]
    starts = [0, *(int(line["step"]) for line in lines)]
    spans = [(line["step"] - start, line[name]) for line, start in zip(lines, starts, strict=False) if start >= step]
    spans = spans or [(1, lines[-1][name])]
    return sum(steps * value for steps, value in spans) / sum(steps for steps, _ in spans)

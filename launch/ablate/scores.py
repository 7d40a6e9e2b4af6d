"""What each run's record says in the end."""

import re
import statistics
from collections.abc import Sequence
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
    """`<net>/<metric>`, for net in input, student and, where there is one, teacher; metric psnr (dB) or ssim."""
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
    times = [line["time/step_s"] for line in record if "time/step_s" in line]
    protocol = next(iter(found.values()))["protocol"]
    return Score(trial.variant.name, trial.seed, protocol, values, statistics.median(times), int(last["samples_seen"]))

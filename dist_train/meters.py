"""Losses: their means between two lines of the log, and the names they have there."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train import ranks
from dist_train.config import LossConfig

log = logging.getLogger(__name__)

DEAD, EXPLODING = 1e-3, 10.0
"""Ratios of a term's gradient to the reconstruction's, at the student's output, that deserve a word."""


class RunningMeans:
    """Means of named values since they were last drained, over micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Take the scalars of one micro-batch in."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """The means; begins anew. All ranks call."""
        means = {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}
        self._sums, self._counts = {}, {}
        return ranks.mean_dict(means) if means else {}

    def state(self) -> list[dict[str, tuple[float, float]]]:
        """Sum and count of each name, rank by rank, for a checkpoint: a stop between two lines of the log shall change
        neither. All ranks call."""
        return ranks.gather_objects({name: (float(total), self._counts[name]) for name, total in self._sums.items()})

    def load(self, state: list[dict[str, tuple[float, float]]], *, passes: float) -> None:
        """Go on from `state`: with this rank's own part, or with the mean of all if there were more or fewer ranks.

        Args:
            state: what `state` gave.
            passes: micro-batches a step now, over those a step then, so that each step weighs the same.
        """
        parts = [state[ranks.rank()]] if len(state) == ranks.world_size() else state
        for name in parts[0]:
            totals, counts = zip(*(part[name] for part in parts), strict=True)
            self._sums[name] = torch.tensor(sum(totals) / len(parts) * passes)
            self._counts[name] = sum(counts) / len(parts) * passes


def named_losses(losses: Mapping[str, float], loss: LossConfig) -> dict[str, float]:
    """Names as they are logged.

    Args:
        losses: means of what a task's forward gives.
        loss: the weights.

    Returns:
        `loss/<term>`, unweighted; `weight/<term>`; `gradient/<term>`, the norm of the weighted term's gradient at the
        student's output, and `gradient_ratio/<term>`, its ratio to the reconstruction's; `lead/<what>` of the teacher;
        `prior/<what>`. A ratio that tells of a dead or an exploding term is a warning in the log.
    """
    named: dict[str, float] = {}
    for name, value in losses.items():
        term = name.removeprefix("gradient/")
        if name.startswith("mask"):
            named[f"prior/{name}"] = value
        elif name.startswith("lead/"):
            named[name] = value
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

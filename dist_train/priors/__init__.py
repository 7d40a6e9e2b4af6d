"""Frozen sources of semantics: masks of a picture (regions, sam), features of a picture (vgg)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dist_train.config import PriorConfig, RunConfig
from dist_train.priors.masks import Prior
from dist_train.priors.regions import RegionsPrior
from dist_train.priors.sam import load_sam_prior
from dist_train.priors.vgg import Features, load_features

PRIORS: dict[str, Callable[[Any, torch.device], Prior]] = {
    "regions": lambda config, device: RegionsPrior(config),
    "sam": load_sam_prior,
}


class Priors(NamedTuple):
    """What a task is given beside its batch; None where the run has no use for it."""

    masks: Prior | None = None
    features: Features | None = None

    def describe(self) -> dict[str, Any]:
        """What they are, for the run record."""
        return {name: prior.describe() for name, prior in self._asdict().items() if prior is not None}


def build_prior(config: PriorConfig, device: torch.device) -> Prior:
    """The source of masks that the configuration names.

    Raises:
        ValueError: weights are missing, or of another net.
        OSError: a download failed.
    """
    return PRIORS[config.name](config, device)


def build_priors(run: RunConfig, device: torch.device) -> Priors:
    """All that a run needs, and no more."""
    return Priors(
        masks=build_prior(run.prior, device) if run.task == "distill" else None,
        features=load_features(run.features, device) if run.uses_sgr else None,
    )

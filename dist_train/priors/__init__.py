"""Frozen sources of semantics: masks of a picture (regions, sam, psp; cached, stored, remote; none), and features."""

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dist_train import ranks
from dist_train.config import CachedConfig, PriorConfig, RemoteConfig, RunConfig, StoredConfig
from dist_train.priors.cached import CachedPrior, EpochAt, Pictures
from dist_train.priors.mask_files import MaskFiles
from dist_train.priors.masks import Prior
from dist_train.priors.none import NoPrior
from dist_train.priors.psp import load_psp_prior
from dist_train.priors.regions import RegionsPrior
from dist_train.priors.remote import load_remote_prior
from dist_train.priors.sam import load_sam_prior
from dist_train.priors.stored import StoredPrior, how_to_store
from dist_train.priors.vgg import Features, load_features
from dist_train.spans import Span, no_span
from shards.schema import Masks

PRIORS: dict[str, Callable[[Any, torch.device], Prior]] = {
    "regions": lambda config, device: RegionsPrior(config),
    "sam": load_sam_prior,
    "psp": load_psp_prior,
    "cached": lambda config, device: build_inner(config, device),
    "stored": lambda config, device: StoredPrior(config),
    "remote": load_remote_prior,
    "none": lambda config, device: NoPrior(),
}


class Priors(NamedTuple):
    """What a task is given beside its batch; None where the run has no use for it."""

    masks: Prior | None = None
    features: Features | None = None
    span: Span = no_span
    """Held around the parts of a forward pass, by whoever wants to know what they cost."""

    def describe(self) -> dict[str, Any]:
        """What they are, for the run record."""
        parts = {"masks": self.masks, "features": self.features}
        return {name: part.describe() for name, part in parts.items() if part is not None}


class Part(Protocol):
    """One data set of those that pictures come from: `dist_train.data.reader.ShardReader`."""

    @property
    def folder(self) -> Path | str:
        """Where it lies: a folder here, or a URL."""

    @property
    def masks_note(self) -> Masks | None:
        """Where the masks in it come from, if there are any."""


class DataSet(Pictures, Protocol):
    """What is asked of the pictures: `dist_train.data.mixture.Pairs`."""

    @property
    def parts(self) -> Sequence[Part]:
        """The data sets it is made of."""

    @property
    def masks_note(self) -> Masks | None:
        """Where the masks in it come from, if there are any in all parts."""


def build_prior(config: PriorConfig, device: torch.device) -> Prior:
    """The source of masks that the configuration names, for pictures from outside a training run.

    Raises:
        ValueError: weights are missing, or of another net.
        OSError: a download failed.
    """
    return PRIORS[config.name](config, device)


def prior_for(config: PriorConfig | None, note: Masks | None, device: torch.device, *, where: object) -> Prior:
    """The source of masks of pictures outside a training run: as the run that `config` is of had them there.

    Args:
        config: None: there was no run; then the masks beside the pictures, however many.
        note: of the masks beside the pictures, if there are any.
        device: of this rank.
        where: the pictures lie, for errors.

    Raises:
        ValueError, OSError: as `build_prior`; or there are no masks beside the pictures, and those are wanted.
    """
    if (config is None or config.name == "stored") and note is None:
        raise ValueError(
            f"{where} holds no masks beside its pictures, which this net wants; {how_to_store(where)}; or name what "
            "makes them now: --prior regions (or sam, psp)"
        )
    if config is None:
        return StoredPrior(StoredConfig(num_masks=255), note)
    if config.name == "remote":  # servers are not waited for
        return build_prior(config.of, device)
    if config.name == "cached":
        of = config.of.model_copy(update={"num_masks": config.num_masks})
        return build_inner(config.model_copy(update={"of": of}), device)
    return build_prior(config, device)


def build_priors(
    run: RunConfig,
    device: torch.device,
    *,
    train: DataSet,
    val: DataSet | None,
    checkpoints: Callable[[], Iterable[int]],
    epoch_at: EpochAt | None = None,
) -> Priors:
    """All that a run needs, and no more.

    Args:
        run: the run.
        device: of this rank.
        train, val: its pictures.
        checkpoints: steps of the run's checkpoints on the disk, at the moment of the call.
        epoch_at: see `CachedPrior`.

    Raises:
        ValueError, OSError: as `build_prior`; or the shards have no masks and the prior is `stored`.
    """
    return Priors(
        masks=_prior_of(run, device, train, val, checkpoints, epoch_at) if run.task != "plain" else None,
        features=load_features(run.features, device) if run.uses_sgr else None,
    )


def _prior_of(
    run: RunConfig,
    device: torch.device,
    train: DataSet,
    val: DataSet | None,
    checkpoints: Callable[[], Iterable[int]],
    epoch_at: EpochAt | None,
) -> Prior:
    config = run.prior
    if config.name == "stored":
        looked_at = {"data.train": train}
        if val and (run.eval.teacher or run.track.pictures_every or run.task == "conditioned"):
            looked_at["data.val"] = val  # for the student itself, eval.teacher or the panels of track.pictures_every
        for setting, part in ((setting, part) for setting, data in looked_at.items() for part in data.parts):
            if part.masks_note is None:
                raise ValueError(
                    f"prior.name=stored, but {setting}={part.folder} holds no masks; {how_to_store(part.folder)}: "
                    f"then set {setting} to that"
                )
        return StoredPrior(config, train.masks_note)
    if config.name == "cached":
        folder = run.dir / "masks"
        # Where nothing can be gone on from, what lies there is of a course that was given up.
        ranks.on_main(lambda: None if list(checkpoints()) else shutil.rmtree(folder, ignore_errors=True))
        return CachedPrior(
            build_inner(config, device),
            config,
            pictures=train,
            files=MaskFiles(folder, memory_mib=config.memory_mib),
            global_batch=run.optim.global_batch,
            checkpoints=checkpoints,
            epoch_at=epoch_at,
            sharded=run.engine.zero_stage == 3,
        )
    return build_prior(config, device)


def build_inner(config: CachedConfig | RemoteConfig, device: torch.device) -> Prior:
    """The prior that `prior.of` names; as `build_prior`."""
    try:
        return build_prior(config.of, device)
    except ValueError as error:  # which tells how to set prior.checkpoint
        setting = rf"(?<![\w./=-])prior\.(?=({'|'.join(type(config.of).model_fields)})\b)"  # and not a path
        raise ValueError(re.sub(setting, "prior.of.", str(error))) from None

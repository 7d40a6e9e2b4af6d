"""Where pairs come from and what is made of them."""

import itertools
from typing import Literal

from pydantic import model_validator

from dist_train.config.fields import Count, CountOrZero, Fraction, Positive, Section


class PatchChange(Section):
    """Larger crops from some step on."""

    from_step: Count
    """Optimizer steps done before the first with such crops."""
    crop_px: Count


class MixupConfig(Section):
    """MixUp, as in Uformer's recipe for SIDD: lam * (lq, gt) + (1 - lam) * (lq, gt) of another sample."""

    alpha: Positive = 1.2
    """lam is drawn from Beta(alpha, alpha)."""
    from_step: CountOrZero = 0
    """Optimizer steps done before the first mixed one; Uformer mixes after 5 epochs."""


class RainmixConfig(Section):
    """RainMix, as in EfficientDerain's v4 recipe: further streaks on each rainy picture, or on the clean one."""

    clean: Fraction = 4 / 11
    """Probability that they fall on the clean picture instead of the rainy one."""
    streaks: str | None = None
    """Folder of pictures of bright streaks on black, none smaller than the crops; published: Garg and Nayar's, which
    are not shipped. None: streaks as `python -m shards synth rain_light` draws them. Its pictures are part of the
    stream of samples: leave them alone while a run lasts."""


class DataConfig(Section):
    """Where pairs come from and what is cut from them."""

    train: str
    """Folder of shards (made by `python -m shards write`) to train on."""
    val: str | None = None
    """Folder of shards to validate on; none: no validation."""
    crop_px: Count = 128
    """Side of the square training crop."""
    progressive: tuple[PatchChange, ...] = ()
    """Larger crops as training goes on (Restormer's progressive patches, without its shrinking batches)."""
    flips: Literal["none", "horizontal", "all"] = "all"
    """Augmentation: nothing, left-right, or all eight flips and quarter turns."""
    mixup: MixupConfig | None = None
    """Mix pairs of samples; `{}` with the published numbers."""
    rainmix: RainmixConfig | None = None
    """Rain on the degraded pictures; `{}` with the published numbers."""
    workers: CountOrZero = 1
    """Reading processes per rank; 0 reads in the training process."""
    max_bad_samples: CountOrZero = 0
    """Unreadable samples (each replaced by a stand-in and reported) that a run may meet before all ranks stop."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        steps = [0, *(change.from_step for change in self.progressive)]
        crops_px = [self.crop_px, *(change.crop_px for change in self.progressive)]
        for name, values in (("from_step", steps), ("crop_px", crops_px)):
            if any(now <= before for before, now in itertools.pairwise(values)):
                raise ValueError(
                    f"progressive goes {name} {' -> '.join(map(str, values))}; each must be above the last"
                )
        return self

    def crop_px_at(self, step: int) -> int:
        """Side of the crops when `step` optimizer steps are done."""
        return max([self.crop_px, *(change.crop_px for change in self.progressive if change.from_step <= step)])

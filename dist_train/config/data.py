"""Where pairs come from and what is made of them."""

import itertools
import math
from fractions import Fraction as Ratio
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dist_train.config.fields import Count, CountOrZero, Fraction, Positive, Section

_LONGEST_BLOCK = 10_000


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


class DataSetConfig(Section):
    """One of several data sets to train on."""

    path: str
    """Folder of shards."""
    share: Positive
    """Of the samples, relative to the other sets' shares, kept exactly: with 1 and 3 every fourth is of this set."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Stands before its keys, as NAME/KEY; none: its place in the list, from 0."""


def _path_or_sets(value: Any) -> str:
    return "tuple[path]" if isinstance(value, str) else "tuple[sets]"  # which errors leave out


class DataConfig(Section):
    """Where pairs come from and what is cut from them."""

    train: Annotated[
        Annotated[str, Tag("tuple[path]")] | Annotated[tuple[DataSetConfig, ...], Tag("tuple[sets]")],
        Discriminator(_path_or_sets),
    ]
    """Folder of shards (made by `python -m shards write`) to train on; or several, each {path: DIR, share: NUMBER}."""
    val: str | None = None
    """Folder of shards to validate on; none: no validation."""
    cache_dir: str | None = None
    """Folder for shards that are fetched from URLs, shared by the ranks of a node, on a disk of that node; none:
    ~/.cache/restill/shards."""
    cache_gib: Positive = 50
    """The most that folder may hold; what was read longest ago goes first."""
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
    order: Literal["full", "windowed"] = "full"
    """full: each epoch is one shuffle of all samples. windowed: shards one after the other, for those that are far away
    and do not all fit on a node; see `dist_train.data.order.Order`."""
    window: Count = 512
    """windowed: samples move on by up to so many places in their lane. A node holds about lanes / nodes x (1 + window /
    samples per shard) shards at a time."""
    lanes: Count | None = None
    """windowed: places of the shards that are read side by side; none: optim.global_batch, so that each node reads
    shards of its own."""
    max_bad_samples: CountOrZero | None = None
    """Unreadable samples (each replaced by a stand-in and reported) that a run may meet before all ranks stop; none:
    one in a thousand. A hundred in a row always stop it."""
    strict: bool = False
    """Stop at the first unreadable sample, before anything is trained on a stand-in."""
    accept_new_data: bool = False
    """Go on although the shards in `train`, or their shares, are others than those of the checkpoint: with a new stream
    of samples, which begins with whole epochs."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        steps = [0, *(change.from_step for change in self.progressive)]
        crops_px = [self.crop_px, *(change.crop_px for change in self.progressive)]
        for name, values in (("from_step", steps), ("crop_px", crops_px)):
            if any(now <= before for before, now in itertools.pairwise(values)):
                raise ValueError(
                    f"progressive goes {name} {' -> '.join(map(str, values))}; each must be above the last"
                )
        if not self.sets:
            raise ValueError("train names no data set; give a folder of shards")
        if len(names := self.names) > len(set(names)):
            raise ValueError(f"train has two sets of one name: {', '.join(names)}; give each another")
        if sum(self.shares) > _LONGEST_BLOCK:
            raise ValueError(
                f"train has shares {', '.join(str(part.share) for part in self.sets)}, which come out even only after "
                f"{sum(self.shares)} samples; round them"
            )
        return self

    @property
    def sets(self) -> tuple[DataSetConfig, ...]:
        """What to train on: one set or several."""
        return (DataSetConfig(path=self.train, share=1),) if isinstance(self.train, str) else self.train

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sets."""
        return tuple(part.name or str(place) for place, part in enumerate(self.sets))

    @property
    def shares(self) -> tuple[int, ...]:
        """The sets' shares as the smallest whole numbers."""
        ratios = [Ratio(str(part.share)) for part in self.sets]
        whole = [int(ratio * math.lcm(*(ratio.denominator for ratio in ratios))) for ratio in ratios]
        return tuple(share // math.gcd(*whole) for share in whole)

    def crop_px_at(self, step: int) -> int:
        """Side of the crops when `step` optimizer steps are done."""
        return max([self.crop_px, *(change.crop_px for change in self.progressive if change.from_step <= step)])

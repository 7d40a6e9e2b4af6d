"""How masks condition a student (SAM-Deblur, Li et al. 2023)."""

from typing import Literal

from pydantic import model_validator

from dist_train.config.fields import Count, Fraction, Positive, Section

Grouping = Literal["grey", "idmap"]
MAP_ONLY = ("map_channels", "mask_dropout", "mask_value")


class ConditioningConfig(Section):
    """What a student sees of the masks beside the picture; the defaults are SAM-Deblur's."""

    method: Literal["cat", "map"] = "map"
    """cat: the groups of masks as one grey picture, a fourth channel. map: mask average pooling, each group's mean of a
    small encoder's features (with mask_dropout: SAM-Deblur)."""
    grouping: Grouping = "grey"
    """How masks that overlap become groups that do not. grey: the official preparation. Each mask adds a grey value of
    its own, and a group is where the sum is the same, 0 included; so an overlap is a group, and two that are far apart
    may be one. The official values go by the generator's order, ours largest first, so that they mean the same for any
    prior. idmap: a pixel is of the smallest mask that covers it."""
    map_channels: Count = 2
    """map: S, channels of the encoder; 2 in every published configuration, while the class's own default is 3."""
    mask_dropout: Fraction = 0.5
    """map: share of a crop's groups that each training step drops; they join what is in no group. Of M groups exactly
    int(share * M). The paper has no number, the official code 0.5; 0 is its MAP without dropout."""
    mask_value: Positive = 1.0
    """map: what a pixel in a group counts for. 1 is the paper's. The official loader divides by 255 what the official
    script has written as 0 and 1, so data prepared with it gave the published nets 1/255 (0.00392156862745098): little
    but the mean of the whole picture is left then."""

    @property
    def num_channels(self) -> int:
        """Channels beside RGB."""
        return self.map_channels if self.method == "map" else 1

    @property
    def drops_masks(self) -> bool:
        """Whether training drops masks."""
        return self.method == "map" and self.mask_dropout > 0

    @model_validator(mode="after")
    def _check(self) -> "ConditioningConfig":
        fields = type(self).model_fields
        changed = [name for name in MAP_ONLY if getattr(self, name) != fields[name].default]
        if self.method == "cat" and changed:
            raise ValueError(f"{changed[0]}={getattr(self, changed[0])} is for method=map; leave it out for method=cat")
        if self.mask_value > 1:
            raise ValueError(f"mask_value={self.mask_value:g} must not be above 1; the paper's is 1")
        return self

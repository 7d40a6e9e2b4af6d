"""What a prior takes and gives: 8-bit pictures in, a fixed number of masks per picture out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dist_train.metrics import to_u8


@dataclass(frozen=True, eq=False)
class MaskSet:
    """The masks of a batch of pictures, on the pictures' device.

    Attributes:
        masks: (B,K,H,W) bool, largest first; "the k-th largest" is what channel k means for every prior.
        valid: (B,K) bool; picture b has `valid[b].sum()` masks. What a mask that is not valid holds counts for nothing.
        notes: numbers for the log, under `prior/`; the same names at each call of one prior.
    """

    masks: Tensor
    valid: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.masks.dtype == self.valid.dtype == torch.bool
        assert self.masks.ndim == 4 and self.masks.shape[:2] == self.valid.shape

    def resize(self, height: int, width: int) -> Tensor:
        """The masks at another size, each value the share of its area that lies inside the mask.

        Averaging keeps a mask smaller than a feature pixel, as a soft one; nearest would lose it. Growing by a whole
        factor this is nearest.

        Returns:
            (B,K,height,width) float32 in [0,1]; zero for masks that are not valid.
        """
        masks = (self.masks & self.valid[:, :, None, None]).float()
        return masks if masks.shape[-2:] == (height, width) else F.interpolate(masks, (height, width), mode="area")

    def idmap(self) -> Tensor:
        """One number per pixel, painted large to small, so that parts lie on top of wholes.

        Returns:
            (B,H,W) int64: k+1 where mask k is the last that covers the pixel, 0 where there is none.
        """
        ids = torch.arange(1, self.masks.shape[1] + 1, device=self.masks.device, dtype=torch.int16)
        ids = ids * self.valid  # (B,K)
        return (self.masks * ids[:, :, None, None]).amax(1).long()

    def pool(self, features: Tensor) -> Tensor:
        """Mean of the features inside each mask, the masks resized to the features.

        Args:
            features: (B,C,h,w); the gradient flows to them.

        Returns:
            (B,K,C), float32 or wider; 0, with gradient 0, for masks that are empty or not valid.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            masks = self.resize(*features.shape[-2:]).to(features.dtype).flatten(2)
            area = masks.sum(2, keepdim=True)
            return masks @ features.flatten(2).mT / torch.where(area > 0, area, 1)

    def coverage(self) -> Tensor:
        """Share of each picture that lies in some mask: (B,) float32 in [0,1]."""
        return (self.masks & self.valid[:, :, None, None]).any(1).float().mean((1, 2))

    def counts(self) -> Tensor:
        """Number of masks of each picture: (B,) int64."""
        return self.valid.sum(1)

    def for_log(self) -> dict[str, Tensor]:
        """Scalars for the log: masks_per_picture, mask_coverage and the prior's own notes."""
        log = {"masks_per_picture": self.counts().float().mean(), "mask_coverage": self.coverage().mean()}
        return log | {name: torch.full_like(log["mask_coverage"], value) for name, value in self.notes.items()}

    def to(self, device: torch.device | str) -> "MaskSet":
        """The same masks on another device."""
        masks, valid = (tensor.to(device, non_blocking=True) for tensor in (self.masks, self.valid))
        return replace(self, masks=masks, valid=valid)


Restore = Callable[[Tensor], Tensor]
"""The student on (1,3,H,W) RGB in [0,1], any H and W, in evaluation and without gradient -> the same shape. Ranks that
share the student's weights among them must call it equally often."""


class Samples(Protocol):
    """What a prior may know of the pictures it is given: `dist_train.data.batch.Batch`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Sample of each."""

    @property
    def positions(self) -> Tensor:
        """(B,) int64 on the CPU: place of each in the stream of samples; -1: from outside of it."""

    @property
    def masks(self) -> tuple[Tensor, ...] | None:
        """(K,H,W) bool of each, K its own, on the pictures' device: what the shards hold."""

    def carry(self, whole: Tensor, row: int) -> Tensor:
        """What is known of a whole picture, (...,H,W), cut, mirrored and turned as the one given was."""


class Prior(Protocol):
    """A frozen source of masks."""

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """Segment pictures; no gradient.

        Args:
            images: (B,3,H,W) RGB, any float dtype; clamped to [0,1] and rounded to 8 bits here.
            batch: the `Batch` they come from, for priors that know its samples; None: pictures from elsewhere.
            restore: the student, for priors that look at whole pictures; None: all are from outside the stream.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, for the run record: name, what (in words), parameters, weights, sha256, dtype."""
        ...


def empty(batch: int, num_masks: int, height: int, width: int, *, device: torch.device | str = "cpu") -> MaskSet:
    """No masks at all: `batch` pictures with `num_masks` invalid ones each."""
    masks = torch.zeros(batch, num_masks, height, width, dtype=torch.bool, device=device)
    return MaskSet(masks, torch.zeros(batch, num_masks, dtype=torch.bool, device=device))


def from_masks(pictures: Sequence[NDArray[np.bool_]], *, num_masks: int) -> MaskSet:
    """Sort by area, drop empty masks, keep the `num_masks` largest, pad with invalid ones.

    Args:
        pictures: per picture (N,H,W) bool, N of its own, H and W the same for all. Equal areas keep their order.
        num_masks: K.

    Returns:
        A MaskSet on the CPU.
    """
    return largest_first([torch.from_numpy(masks) for masks in pictures], num_masks=num_masks)


def largest_first(pictures: Sequence[Tensor], *, num_masks: int) -> MaskSet:
    """`from_masks` for tensors, (N,H,W) bool, all on one device, where the result lies too; nothing waits for it."""
    result = empty(len(pictures), num_masks, *pictures[0].shape[1:], device=pictures[0].device)
    for b, masks in enumerate(pictures):
        areas = masks.view(torch.uint8).sum((1, 2), dtype=torch.int32)  # of bool it takes a CPU 18 times as long
        order = areas.argsort(descending=True, stable=True)[:num_masks]
        result.masks[b, : len(order)] = masks[order]
        result.valid[b, : len(order)] = areas[order] > 0
    return result


def matched_iou(found: Tensor, wanted: Tensor) -> float:
    """How alike two sets of masks of one picture are, whatever their order and number.

    Args:
        found, wanted: (N,H,W) and (M,H,W) bool.

    Returns:
        The mean, over all masks of both, of the IoU with the best partner in the other set; 1 if both are empty.
    """
    if not len(found) or not len(wanted):
        return float(len(found) == len(wanted))
    one, other = found.flatten(1).float(), wanted.flatten(1).float()
    both = one @ other.T
    iou = both / (one.sum(1, keepdim=True) + other.sum(1) - both).clamp(min=1)
    return float(torch.cat([iou.amax(0), iou.amax(1)]).mean())


def finite(images: Tensor) -> Tensor:
    """Which pictures are finite throughout, (B,1) bool: of others no mask is valid."""
    return images.isfinite().flatten(1).all(1, keepdim=True)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Pictures as classical code and SAM expect them.

    Args:
        images: (B,3,H,W) RGB, any float dtype, any device; clamped to [0,1], NaN taken for 0.

    Returns:
        (B,H,W,3) uint8 RGB, rounded to nearest.
    """
    return np.stack([to_u8(image) for image in images.detach().float().nan_to_num().cpu()])

"""What the loader hands to a task."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.data.augment import apply_geometry


class BadSample(NamedTuple):
    """A sample that could not be read, and was replaced by a stand-in."""

    key: str
    position: int
    shard: str
    """Where it lies."""
    reason: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    lq: Tensor
    """(B,3,H,W) float32 RGB in [0,1]: degraded."""
    gt: Tensor
    """(B,3,H,W) float32 RGB in [0,1]: ground truth, the same crop."""
    keys: tuple[str, ...]
    """Sample of each row; with MixUp, the first of the two."""
    positions: Tensor
    """(B,) int64 on the CPU: place in the global stream of samples, over all epochs."""
    geometry: Tensor
    """(B,4) int64 on the CPU: top, left, flip (0 or 1), quarter turns; see `dist_train.data.augment`.

    With MixUp that of the first of the two pictures: masks carried over from a whole picture then outline that one
    alone, though it may weigh less than the other. A prior that looks at the mixed picture itself is not concerned."""
    bad: tuple[BadSample, ...] = ()
    """Each sample that could not be read."""

    masks: tuple[Tensor, ...] | None = None
    """Of each row (K,H,W) bool, K its own, in any order, some perhaps empty: what the shards hold, cut as the row's lq
    (with MixUp, as that of the first). None: they hold none, or the run has no use for them."""

    @classmethod
    def of_images(
        cls, lq: Tensor, gt: Tensor, *, keys: tuple[str, ...] = (), masks: tuple[Tensor, ...] | None = None
    ) -> "Batch":
        """Pictures from outside the stream, (B,3,H,W) each; their positions are -1 and their geometry is zero."""
        num = len(lq)
        geometry = torch.zeros(num, 4, dtype=torch.int64)
        return cls(lq, gt, keys or ("",) * num, torch.full((num,), -1), geometry, masks=masks)

    def carry(self, whole: Tensor, row: int) -> Tensor:
        """What is known of a row's whole picture, (...,H,W), cut, mirrored and turned as the row was."""
        return apply_geometry(whole, self.geometry[row], self.lq.shape[-1])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its pictures on `device`."""
        masks = self.masks and tuple(of_row.to(device) for of_row in self.masks)
        return replace(self, lq=self.lq.to(device), gt=self.gt.to(device), masks=masks)

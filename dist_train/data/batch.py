"""What the loader hands to a task."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    bad: tuple[str, ...] = ()
    """One message for each sample that could not be read and was replaced by a stand-in."""

    @classmethod
    def of_images(cls, lq: Tensor, gt: Tensor, *, keys: tuple[str, ...] = ()) -> "Batch":
        """Pictures from outside the stream, (B,3,H,W) each; their positions are -1 and their geometry is zero."""
        num = len(lq)
        return cls(lq, gt, keys or ("",) * num, torch.full((num,), -1), torch.zeros(num, 4, dtype=torch.int64))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its pictures on `device`."""
        return replace(self, lq=self.lq.to(device), gt=self.gt.to(device))

"""A student that sees the masks of its input: CAT, MAP, SAM-Deblur (Li et al. 2023).

    lq -> prior -> masks;  lq, masks -> student -> student_out

The masks are of the degraded picture. For those of a picture that is restored beforehand, as the official training has
them, `python -m shards masks --of WEIGHTS` stores them and the prior is `stored`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config import LossConfig
from dist_train.data.batch import Batch
from dist_train.data.order import MASK_DROPOUT, draws
from dist_train.losses import reconstruction
from dist_train.nets.conditioned import NUM_GREYS, SeesMasks
from dist_train.nets.stages import Trace
from dist_train.priors import Priors
from dist_train.priors.masks import MaskSet


class ConditionedTask(nn.Module):
    """One restoration net with masks, under its reconstruction loss.

    Args:
        student: see `dist_train.nets.conditioned`.
        loss: of which only `rec` matters.
        seed: of the run; together with a sample's position it says which masks are dropped.
    """

    def __init__(self, student: SeesMasks, loss: LossConfig, *, seed: int):
        super().__init__()
        self.student = student
        self.loss = loss
        self.seed = seed

    def forward(self, batch: Batch, priors: Priors, *, measure: bool = False) -> dict[str, Tensor]:
        """Losses of one micro-batch; in training mode masks are dropped.

        Returns:
            student_rec and total; masks_per_picture, mask_coverage and the prior's own notes, for the log. `measure`
            has no meaning here.
        """
        trace: Trace = {}
        masks = self._masks(batch, priors)
        drops = self.training and self.student.conditioning.drops_masks
        order = self._drop_order(batch, masks) if drops else None
        with priors.span("student"):
            student_out = self.student(batch.lq, masks, trace=trace, drop_order=order)
        with priors.span("losses"), torch.autocast(student_out.device.type, enabled=False):
            student_rec = reconstruction(self.loss.rec, student_out.float(), batch.gt, lq=batch.lq, trace=trace)
        return {"student_rec": student_rec, **masks.for_log(), "total": student_rec}

    def restore(self, batch: Batch, priors: Priors, *, teacher: bool = True) -> dict[str, Tensor]:
        """Pictures to look at: `student_out` (B,3,H,W), not clamped, and `idmap` (B,H,W) int64. There is no teacher."""
        masks = self._masks(batch, priors)
        return {"student_out": self.student(batch.lq, masks).float(), "idmap": masks.idmap()}

    def _masks(self, batch: Batch, priors: Priors) -> MaskSet:
        assert priors.masks is not None
        with priors.span("prior"):
            return priors.masks(batch.lq, batch, restore=_as_it_is)

    def _drop_order(self, batch: Batch, masks: MaskSet) -> Tensor:
        """An order of all groups for each sample, the same for any number of ranks."""
        num = max(NUM_GREYS, masks.masks.shape[1] + 1)
        order = [np.argsort(draws(self.seed, position, MASK_DROPOUT, num)) for position in batch.positions.tolist()]
        return torch.from_numpy(np.stack(order)).to(batch.lq.device)


def _as_it_is(lq: Tensor) -> Tensor:
    """What priors of whole pictures see of one: the degraded picture itself."""
    return lq

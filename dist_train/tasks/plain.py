"""The student alone: what a distilled student is compared with."""

import torch
from torch import Tensor, nn

from dist_train.config import LossConfig
from dist_train.data.batch import Batch
from dist_train.losses import reconstruction
from dist_train.nets.stages import RestorationNet, Trace
from dist_train.priors import Priors


class PlainTask(nn.Module):
    """One restoration net under its reconstruction loss."""

    def __init__(self, student: RestorationNet, loss: LossConfig):
        super().__init__()
        self.student = student
        self.loss = loss

    def forward(self, batch: Batch, priors: Priors, *, measure: bool = False) -> dict[str, Tensor]:
        """Losses of one micro-batch: `student_rec` and `total`. `measure` has no meaning here."""
        trace: Trace = {}
        with priors.span("student"):
            student_out = self.student(batch.lq, trace=trace)
        with priors.span("losses"), torch.autocast(student_out.device.type, enabled=False):
            student_rec = reconstruction(self.loss.rec, student_out.float(), batch.gt, lq=batch.lq, trace=trace)
        return {"student_rec": student_rec, "total": student_rec}

    def restore(self, batch: Batch, priors: Priors, *, teacher: bool = True) -> dict[str, Tensor]:
        """Pictures to look at: `student_out` (B,3,H,W), not clamped. There is no teacher."""
        return {"student_out": self.student(batch.lq).float()}

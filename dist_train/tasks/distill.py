"""Distilling semantic priors: student, prior, teacher and their losses (Eq. 1-8).

    lq -> student -> student_out -> prior -> masks                  Eq. 1, 2
    student_out, masks -> teacher (SPF) -> teacher_out              Eq. 3
    student:  rec + w1 SPD(student_out, teacher_out) + w2 SGR       Eq. 4-8
    teacher:  rec

Both nets are trained, by one backward pass: SPD and SGR stop at the teacher, and the teacher's reconstruction stops at
the student's output, so neither net's loss reaches the other (`loss.detach_cascade: false` lets the latter through).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dist_train.config import LossConfig
from dist_train.data.batch import Batch
from dist_train.losses import reconstruction, sgr, spd, student_total, teacher_lead
from dist_train.nets.fusion import Teacher
from dist_train.nets.stages import RestorationNet, Trace
from dist_train.priors import Priors
from dist_train.priors.masks import MaskSet


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode: no path is dropped, and batch norms neither learn from the picture nor speak to other ranks."""
    in_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


class DistillTask(nn.Module):
    """Student and teacher under one objective.

    The frozen priors are arguments of `forward`, not children: ZeRO-3 would shard a child, and every checkpoint would
    hold a copy of it.
    """

    def __init__(self, student: RestorationNet, teacher: Teacher, loss: LossConfig):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.loss = loss

    def forward(self, batch: Batch, priors: Priors, *, measure: bool = False) -> dict[str, Tensor]:
        """Losses of one micro-batch, not reduced over ranks.

        Args:
            batch: lq and gt, (B,3,H,W).
            priors: `masks` must be there; `features` if SGR is on.
            measure: also give each student term's gradient norm at the student's output.

        Returns:
            student_rec, teacher_rec, spd, sgr: unweighted scalars (spd and sgr only if their weight is not 0);
            total: what to call backward on; lead/psnr, how far the teacher is ahead, in dB, and lead/share, of the
            pictures; masks_per_picture, mask_coverage and the prior's own notes, for the log;
            with `measure`, gradient/student_rec, gradient/spd, gradient/sgr: norms of the *weighted* terms' gradients.
        """
        student_trace: Trace = {}
        teacher_trace: Trace = {}
        student_out, teacher_out, masks = self._cascade(batch, priors, student_trace, teacher_trace)
        # Losses in float32 whatever the nets ran in: differences of two restored pictures are small.
        with priors.span("losses"), torch.autocast(student_out.device.type, enabled=False):
            student_out, teacher_out = student_out.float(), teacher_out.float()
            rec, gt = partial(reconstruction, self.loss.rec), batch.gt
            terms = {
                "student_rec": rec(student_out, gt, lq=batch.lq, trace=student_trace),
                "teacher_rec": rec(teacher_out, gt, lq=student_out.detach(), trace=teacher_trace),
            }
            lead = teacher_lead(student_out, teacher_out, gt)
            if self.loss.spd.weight > 0:
                terms["spd"] = spd(student_out, teacher_out, self.loss.spd, gt=gt)
            if self.loss.sgr.weight > 0:
                assert priors.features is not None
                with priors.span("features"):
                    with torch.no_grad():
                        teacher_features = priors.features(teacher_out)
                    student_features = priors.features(student_out)
                terms["sgr"] = sgr(student_features, teacher_features, masks, self.loss.sgr)
            total = student_total(terms, self.loss) + terms["teacher_rec"]
            if measure:
                terms |= self._gradient_norms(terms, student_out)
        told = {"lead/psnr": lead.mean(), "lead/share": (lead > 0).float().mean()}
        return {**terms, **told, **masks.for_log(), "total": total}

    def restore(self, batch: Batch, priors: Priors, *, teacher: bool = True) -> dict[str, Tensor]:
        """Pictures to look at: `student_out`, and with `teacher` also `teacher_out`, both (B,3,H,W) and not clamped,
        and `idmap` (B,H,W) int64, what the teacher saw, unless the prior is `none`."""
        if not teacher:
            return {"student_out": self.student(batch.lq).float()}
        student_out, teacher_out, masks = self._cascade(batch, priors)
        seen = {"idmap": masks.idmap()} if masks.masks.shape[1] else {}
        return {"student_out": student_out.float(), "teacher_out": teacher_out.float(), **seen}

    def _cascade(
        self, batch: Batch, priors: Priors, student_trace: Trace | None = None, teacher_trace: Trace | None = None
    ) -> tuple[Tensor, Tensor, MaskSet]:
        assert priors.masks is not None
        with priors.span("student"):
            student_out = self.student(batch.lq, trace=student_trace)  # Eq. 1
        with priors.span("prior"):  # Eq. 2: what SAM sees is the restored picture
            masks = priors.masks(student_out.detach().float(), batch, restore=self._restore_whole)
        with priors.span("teacher"):
            image = student_out.detach() if self.loss.detach_cascade else student_out
            return student_out, self.teacher(image, masks, teacher_trace), masks  # Eq. 3

    @torch.no_grad()
    def _restore_whole(self, lq: Tensor) -> Tensor:
        """The student as it is deployed, for priors that look at whole pictures.

        After the student's pass with gradient: under autocast a pass without would leave copies of the weights that no
        gradient reaches, and the next would take them.
        """
        with _evaluating(self.student):
            return self.student(lq).float()

    def _gradient_norms(self, terms: dict[str, Tensor], student_out: Tensor) -> dict[str, Tensor]:
        weights = {"student_rec": 1.0, "spd": self.loss.spd.weight, "sgr": self.loss.sgr.weight}
        norms = {}
        for name in (name for name in weights if name in terms):
            (gradient,) = torch.autograd.grad(terms[name], student_out, retain_graph=True)
            norms[f"gradient/{name}"] = weights[name] * gradient.norm()
        return norms

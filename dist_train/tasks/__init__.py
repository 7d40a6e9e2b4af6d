"""What is trained: nets and losses as one module, `forward(batch, priors) -> losses`."""

from torch import nn

from dist_train.config import RunConfig
from dist_train.nets import build_net, build_teacher
from dist_train.tasks.distill import DistillTask
from dist_train.tasks.plain import PlainTask


def build_task(run: RunConfig) -> nn.Module:
    """The task with new nets. The student is built first, so that every task starts it from the same weights.

    Raises:
        ValueError: the crops are too small for the teacher's fusion units.
    """
    student = build_net(run.student)
    if run.task == "plain":
        return PlainTask(student, run.loss)
    teacher = build_teacher(run)
    crop_px, net = run.data.crop_px, teacher.net
    left, right, _, _ = net.padding(crop_px, crop_px)
    deepest = max(stage.stride for stage in net.stages)
    if left + crop_px + right < 2 * deepest:
        raise ValueError(
            f"data.crop_px={crop_px} leaves one pixel at the teacher's deepest stage (stride {deepest}), which cannot "
            f"be normalised; set data.crop_px to {2 * deepest} or more"
        )
    return DistillTask(student, teacher, run.loss)


def count_parameters(task: nn.Module) -> dict[str, int]:
    """Trained parameters of each part of a new task: `student`, `teacher`, and `teacher.units`, its SPF alone.

    Under ZeRO-3 the engine leaves empty parameters behind, so count before.
    """
    parts = dict(task.named_children())
    if isinstance(task, DistillTask):
        parts["teacher.units"] = task.teacher.units
    return {
        name: sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        for name, part in parts.items()
    }

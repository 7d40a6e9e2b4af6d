"""What is trained: nets and losses as one module, `forward(batch, priors) -> losses`."""

from torch import nn

from dist_train.config import RunConfig
from dist_train.nets import build_net, build_teacher
from dist_train.tasks.distill import DistillTask
from dist_train.tasks.plain import PlainTask


def build_task(run: RunConfig) -> nn.Module:
    """The task with new nets. The student is built first, so that every task starts it from the same weights."""
    student = build_net(run.student)
    if run.task == "plain":
        return PlainTask(student, run.loss)
    return DistillTask(student, build_teacher(run), run.loss)


def count_parameters(run: RunConfig) -> dict[str, int]:
    """Trained parameters of each part of the run's task."""
    parts = build_task(run).named_children()
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts}

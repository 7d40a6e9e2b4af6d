"""What is trained: nets and losses as one module, `forward(batch, priors) -> losses`."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import RunConfig
from dist_train.nets import build_conditioned, build_net, build_teacher
from dist_train.priors.masks import empty
from dist_train.tasks.conditioned import ConditionedTask
from dist_train.tasks.distill import DistillTask
from dist_train.tasks.plain import PlainTask


def build_task(run: RunConfig) -> nn.Module:
    """The task with new nets. The student is built first, so that every task starts it from the same weights.

    Raises:
        ValueError: the crops are too small for the teacher's fusion units.
    """
    if run.conditioning is not None:
        return ConditionedTask(build_conditioned(run.student, run.conditioning), run.loss, seed=run.seed)
    student = build_net(run.student)
    if run.task == "plain":
        return PlainTask(student, run.loss)
    teacher = build_teacher(run)
    crop_px, net = run.data.crop_px, teacher.net
    left, right, _, _ = net.padding(crop_px, crop_px)
    deepest = max(stage.stride for stage in net.stages)
    if len(teacher.units) and left + crop_px + right < 2 * deepest:
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


@torch.no_grad()
def sample_flops(task: nn.Module, run: RunConfig, device: torch.device) -> float:
    """What training on one sample costs student and teacher: FLOPs, two for each multiply-add.

    Of one pass forwards, by PyTorch's count of convolutions, products of matrices and attention; backwards costs twice
    that. What the teacher computes again with engine.recompute_teacher, priors, VGG and losses do not count.

    Args:
        task: new, its weights whole; moved to the device.
        run: for size and number of masks.
        device: where nets run that may run nowhere else.
    """
    training, px = task.training, run.data.crop_px
    task.to(device).eval()
    image = torch.zeros(1, 3, px, px, device=device)
    masks = empty(1, run.prior.num_masks, px, px, device=device)
    with FlopCounterMode(display=False) as counter:
        task.get_submodule("student")(image, *([masks] if isinstance(task, ConditionedTask) else []))
        if isinstance(task, DistillTask):
            task.teacher(image, masks)
    task.train(training)
    return 3.0 * counter.get_total_flops()

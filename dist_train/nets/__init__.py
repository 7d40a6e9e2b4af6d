"""Restoration nets: one file each, built by name."""

from collections.abc import Callable

from dist_train.config import ConditioningConfig, NetConfig, RunConfig
from dist_train.nets.conditioned import ConditionedNafnet, ConditionedNet, SeesMasks
from dist_train.nets.custom import CustomNet
from dist_train.nets.efficientderain import EfficientDerain
from dist_train.nets.fusion import Teacher
from dist_train.nets.nafnet import Nafnet
from dist_train.nets.official import load_official
from dist_train.nets.rcdnet import build_rcdnet
from dist_train.nets.stages import RestorationNet
from dist_train.nets.uformer import Uformer

__all__ = [
    "NETS",
    "RestorationNet",
    "SeesMasks",
    "build_conditioned",
    "build_net",
    "build_student",
    "build_teacher",
    "load_official",
]

NETS: dict[str, Callable[..., RestorationNet]] = {
    "nafnet": Nafnet,
    "rcdnet": build_rcdnet,
    "efficientderain": EfficientDerain,
    "uformer": Uformer,
    "custom": CustomNet,
}


def build_net(config: NetConfig) -> RestorationNet:
    """A new net with random weights.

    Args:
        config: `name` picks the class out of NETS, the other fields are its arguments.
    """
    return NETS[config.name](**config.model_dump(exclude={"name"}))


def build_conditioned(config: NetConfig, conditioning: ConditioningConfig) -> SeesMasks:
    """A new net that restores a picture with its masks; see `dist_train.nets.conditioned`.

    Args:
        config: as for `build_net`.
        conditioning: what it sees of the masks.
    """
    if config.name == "nafnet":
        return ConditionedNafnet(conditioning=conditioning, **config.model_dump(exclude={"name", "extra_channels"}))
    return ConditionedNet(build_net(config), conditioning=conditioning)


def build_student(config: NetConfig, conditioning: ConditioningConfig | None) -> RestorationNet | SeesMasks:
    """A new net of either kind."""
    return build_net(config) if conditioning is None else build_conditioned(config, conditioning)


def build_teacher(run: RunConfig) -> Teacher:
    """The student's kind of net (or `teacher.net`) with SPF units for the prior's number of masks; none: without.

    Raises:
        ValueError: the net names no stages.
    """
    spf = run.teacher.spf
    net = build_net(run.teacher.net or run.student)
    if not net.stages and run.prior.num_masks:
        raise ValueError(
            "a teacher sees the masks through units after its stages, and this net names none; set student.stages (or "
            "teacher.net.stages) to names of its submodules, prior to {name: none}, or task to plain"
        )
    if run.teacher.start == "identity":
        net.start_as_identity()
    return Teacher(
        net,
        num_masks=run.prior.num_masks,
        every=spf.every,
        max_channels=spf.max_channels,
        encoding=spf.encoding,
    )

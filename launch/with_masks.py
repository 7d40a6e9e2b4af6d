"""Masks for nets that want them beside the picture, outside of a training run."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from launch.console import setting

if TYPE_CHECKING:
    import torch

    from dist_train.config import PriorConfig, RunConfig
    from dist_train.data.batch import Batch
    from dist_train.evaluate import Restorer
    from dist_train.nets import SeesMasks
    from dist_train.priors.masks import Prior


def add_prior_options(parser: argparse.ArgumentParser) -> None:
    """The options --prior and --with, for `chosen_prior`."""
    group = parser.add_argument_group("masks, for nets that want them (task=conditioned, MaskNAFNet, SegNAFNet)")
    group.add_argument(
        "--prior",
        choices=["regions", "sam", "psp", "stored"],
        help="what makes the masks (default: what the net was trained with; of an official file those in the shards)",
    )
    group.add_argument(
        "--with", dest="settings", nargs="+", default=[], type=setting, metavar="KEY=VALUE",
        help="settings of --prior, as in a run's section `prior`",
    )  # fmt: skip


def chosen_prior(args: argparse.Namespace, run: "RunConfig | None") -> "PriorConfig | None":
    """What --prior names, else that of the run, if it is known.

    Raises:
        ValueError: settings without --prior, or that it does not have.
    """
    if not args.prior:
        if args.settings:
            raise ValueError("--with goes with --prior NAME, whose settings it gives")
        return run.prior if run else None
    return named_prior(args.prior, args.settings)


def named_prior(name: str, settings: Iterable[tuple[str, Any]]) -> "PriorConfig":
    """What --prior and --with say, checked.

    Raises:
        ValueError: a setting that the prior does not have, or that it wants and lacks.
    """
    from dist_train.config import parse_run

    tree = {"name": "masks", "data": {"train": "-"}, "prior": {"name": name, **dict(settings)}}
    return parse_run(tree, source="--prior").prior


def restorer_with_masks(net: "SeesMasks", prior: "Prior", device: "torch.device") -> "Restorer":
    """What `dist_train.evaluate.evaluate` calls for a net that sees the masks of the degraded picture."""
    net = net.to(device).eval()

    def restore(batch: "Batch") -> "dict[str, torch.Tensor]":
        masks = prior(batch.lq, batch)
        return {"student_out": net(batch.lq, masks), "idmap": masks.idmap()}

    return restore

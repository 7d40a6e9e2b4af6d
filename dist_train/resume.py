"""Going on from a checkpoint: its weights into a new task, and the refusal to go on as something else."""

import logging
from typing import Any

import torch

from dist_train.checkpoint import Checkpoint
from dist_train.config import RunConfig, changed_method, parse_run

log = logging.getLogger(__name__)


def load_model(task: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a new task.

    Raises:
        ValueError: the checkpoint is of other nets; the message names the first differences.
    """
    wanted, found = task.state_dict(), checkpoint.model
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not in this run's nets" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)} and must be {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        raise ValueError(
            f"checkpoint {checkpoint.path} is of other nets than this run: {'; '.join(sorted(problems)[:5])} "
            f"({len(problems)} in all). Use the configuration it was trained with, or another name for the run"
        )
    task.load_state_dict(found)


def check_same_run(resumed: Checkpoint, run: RunConfig, *, fingerprint: str) -> int:
    """Refuse to go on as another method, or with another stream of samples.

    Returns:
        The position at which the stream begins: 0, or where data.accept_new_data took other shards in.

    Raises:
        ValueError: naming each setting that differs, or the data.
    """
    before = parse_run(resumed.state["config"], source=str(resumed.path))
    if changes := changed_method(before, run):
        only_shares = all(change.startswith("data.shares.") for change in changes)
        hint = ", or set data.accept_new_data=true to go on with these data sets" if only_shares else ""
        raise ValueError(
            f"{resumed.path} cannot go on as this run: {'; '.join(changes)}. Set it back, or give the run another "
            f"name{hint}"
        )
    if resumed.state["data"] == fingerprint:
        return resumed.state.get("stream_start", 0)
    where = ", ".join(part.path for part in run.data.sets)
    what = f"{resumed.path} was trained on other shards than data.train={where} holds now (the manifest has changed)"
    if not run.data.accept_new_data:
        raise ValueError(
            f"{what}. Put the old shards back, give the run another name, or set data.accept_new_data=true to go on "
            "with these"
        )
    log.warning("%s; a new stream of samples begins at %d", what, resumed.state["samples_seen"])
    return resumed.state["samples_seen"]


def check_same_priors(resumed: Checkpoint, priors: dict[str, Any], *, new_data: bool = False) -> None:
    """Refuse priors whose weights are others than those of the checkpoint; `priors` is what they say of themselves.

    With `new_data` masks that come with the data may change.

    Raises:
        ValueError: naming both.
    """
    for part, what in resumed.state["env"]["priors"].items():
        if what["sha256"] != priors[part]["sha256"] and not (new_data and what["name"] == "stored"):
            raise ValueError(
                f"this run was trained with {part} of sha256 {what['sha256']} ({what['weights']}), and now finds "
                f"{priors[part]['sha256']}. Give the old ones, or give the run another name"
            )

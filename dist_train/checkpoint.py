"""Checkpoints: atomic, checksummed, one form for every world size and ZeRO stage.

    runs/NAME/checkpoints/
        step-00000100/
            model.safetensors       student.* and teacher.*, float32
            ema.safetensors         moving average of the student, without prefix
            moments.safetensors     exp_avg.* and exp_avg_sq.* of Adam
            state.json              step, samples_seen, scores, configuration, data, commit, versions
            MANIFEST.json           size and sha256 of each file above, written last

Everything is gathered before it is written, so what one world size saved any other can load: at the sizes of
restoration nets this costs less than a second. A save goes into
a temporary folder that is synced, then renamed, so a reader never meets a half one; a checkpoint counts only if its
manifest verifies, and the newest that does is taken. There is no pointer to the latest, which could point wrongly.
No random state is kept because there is none: all draws are pure functions of seed, step and
position.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train import ranks
from shards.files import sync
from shards.schema import sha256_of

log = logging.getLogger(__name__)

FORMAT = "restill-checkpoint-1"
_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        path: its folder.
        state: content of state.json.
        model: state dict of the task.
        ema: state dict of the averaged student, or None.
        moments: as `Engine.moments` gives them.
    """

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    moments: dict[str, Any]


def save(
    folder: Path,
    *,
    state: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    moments: dict[str, Any],
    keep: int,
    best_by: str | None = None,
) -> Path:
    """Write a checkpoint; the main rank writes, all ranks call and all learn of a failure.

    Args:
        folder: the run's `checkpoints` folder.
        state: must hold `step`; may hold `scores`, of these very weights.
        model, ema, moments: gathered; see `Checkpoint`.
        keep: how many of the newest stay.
        best_by: name of a score; of all checkpoints so far the one that has most of it stays too.

    Raises:
        OSError: on every rank if the main one could not write (disk full, no permission); older checkpoints are intact.
    """
    target = folder / f"step-{state['step']:08d}"

    def write() -> None:
        try:
            _write(target, state, model, ema, moments)
        except OSError as error:
            shutil.rmtree(_temporary(target), ignore_errors=True)  # it may be what fills the disk
            raise OSError(f"checkpoint {target} was not written: {error}; mend it, then start again") from error
        log.info("saved %s", target)
        _prune(target, keep, best_by)

    ranks.on_main(write)
    return target


def find(path: Path) -> Path | None:
    """The newest checkpoint that verifies.

    Args:
        path: a run's folder, its `checkpoints` folder, or one checkpoint.

    Returns:
        None if there is none at all.

    Raises:
        ValueError: there are some and none verifies, or `path` is a checkpoint and it does not.
    """
    if _NAME.fullmatch(path.name) and path.parent.name == "checkpoints":
        if problem := verify(path):
            raise ValueError(f"checkpoint {path} is damaged: {problem}; choose another")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    problems = []
    for candidate in _all_in(folder)[::-1]:
        problem = verify(candidate)
        if problem is None:
            return candidate
        log.warning("checkpoint %s is passed over: %s", candidate, problem)
        problems.append(problem)
    if problems:
        raise ValueError(
            f"none of the {len(problems)} checkpoints in {folder} can be used, the newest because {problems[0]}. Put a "
            "whole one there, or move the folder away to start anew"
        )
    return None


def find_agreed(path: Path) -> Path | None:
    """`find` on the main rank, told to all, so that no two ranks resume from different steps."""
    return ranks.on_main(lambda: find(path))


def steps_on_disk(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, whole or not."""
    return [int(path.name.removeprefix("step-")) for path in _all_in(run_dir / "checkpoints")]


def _all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable MANIFEST.json ({error})"
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        return (
            f"its format is {found!r}, and this code reads {FORMAT!r}: go on with the code that wrote it, or export "
            "its student there and name that in init.student"
        )
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        try:
            found = sha256_of(file)
        except OSError as error:  # of a bad disk, for example
            return f"{name} cannot be read ({error})"
        if found != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint that `find` has verified."""
    state = json.loads((path / "state.json").read_text())
    ema_file = path / "ema.safetensors"
    moments: dict[str, Any] = {"step": state["adam_step"], "scaler": state["scaler"]}
    for name, tensor in load_file(path / "moments.safetensors").items():
        key, parameter = name.split(".", 1)
        moments.setdefault(key, {})[parameter] = tensor
    return Checkpoint(
        path=path,
        state=state,
        model=load_file(path / "model.safetensors"),
        ema=load_file(ema_file) if ema_file.exists() else None,
        moments=moments,
    )


def _write(
    target: Path,
    state: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    moments: dict[str, Any],
) -> None:
    for stale in target.parent.glob(".tmp-*"):
        shutil.rmtree(stale)
    temporary = _temporary(target)
    temporary.mkdir(parents=True)
    tensors = {"model": model, "moments": _flatten(moments)}
    if ema is not None:
        tensors["ema"] = ema
    for name, content in tensors.items():
        save_tensors(temporary / f"{name}.safetensors", content)
    state = state | {"adam_step": moments["step"], "scaler": moments["scaler"]}
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    files = {}
    for file in sorted(temporary.iterdir()):
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    manifest = temporary / "MANIFEST.json"
    manifest.write_text(json.dumps({"format": FORMAT, "step": state["step"], "files": files}, indent=1))
    sync(manifest)
    sync(temporary)
    if target.exists():  # the same step, saved before a restart
        shutil.rmtree(target)
    os.rename(temporary, target)
    sync(target.parent)


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a full disk is an OSError like any other file's."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # wraps the system's error
        raise OSError(f"{path}: {error}") from error


def _flatten(moments: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": tensor
        for key, named in moments.items()
        if isinstance(named, dict) and key != "scaler"
        for name, tensor in named.items()
    }


def _prune(newest: Path, keep: int, best_by: str | None) -> None:
    """Keep `newest`, some before it and the best. Any after it are of an abandoned course: damaged, or the run went
    back."""
    steps = _all_in(newest.parent)
    index = steps.index(newest)
    best = _best(steps[: index + 1], best_by) if best_by else None
    for other in steps[: max(index + 1 - keep, 0)] + steps[index + 1 :]:
        if other != best:
            try:
                shutil.rmtree(other)
            except OSError as error:  # as NFS's, while somebody reads it; what was to be saved is
                log.warning("%s could not be removed: %s", other, error)


def _best(paths: list[Path], score: str) -> Path | None:
    """The checkpoint that has most of a score, of several the oldest; None if none has it."""
    found: list[tuple[float, Path]] = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # it is damaged
            value = json.loads((path / "state.json").read_text()).get("scores", {}).get(score, math.nan)
            found += [] if math.isnan(value) else [(value, path)]
    return max(found, key=lambda item: item[0])[1] if found else None

"""The deployable student: one file of weights, one JSON card beside it that says what they are.

    derain.safetensors      float32, keys of the net's official release, nothing of the teacher
    derain.json             net, configuration, data, commit, scores, sha256 of the weights

Neither writing nor loading it needs SAM, VGG, the teacher, DeepSpeed, wandb or the data.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_train.checkpoint import save_tensors
from dist_train.config import NetConfig, RunConfig, parse_run
from dist_train.nets import build_net
from shards.schema import sha256_of

FORMAT = "restill-student-1"


def export_student(
    checkpoint: Path, out: Path, *, ema: bool | None = None, scores: Mapping[str, float] | None = None
) -> Path:
    """Write the student of a checkpoint as `out` and its card as `out` with suffix .json.

    Both are first written to a temporary folder and loaded back; only if every tensor came back equal do they take
    their names. A crash between the two names leaves a pair that `load_student` refuses by its sha256.

    Args:
        checkpoint: folder of one verified checkpoint (see `dist_train.checkpoint.find`).
        out: a .safetensors file; replaced if it is there.
        ema: whether to take the moving average; None: if the checkpoint has one.
        scores: numbers for the card; the names carry the protocol, for example `val/rgb/psnr/student`.

    Returns:
        `out`.

    Raises:
        ValueError: `out` has another suffix; or as `student_of`.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: an export is a .safetensors file; call it {out.with_suffix('.safetensors')}")
    ema = (checkpoint / "ema.safetensors").exists() if ema is None else ema
    weights = student_of(checkpoint, ema=ema).state_dict()
    state, run = _read_state(checkpoint)

    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        file = part / out.name
        save_tensors(file, weights, metadata={"format": "pt"})  # the metadata transformers and diffusers ask for
        card = {
            "format": FORMAT,
            "net": run.student.model_dump(mode="json"),
            "images": "RGB in [0,1], (B,3,H,W), any H and W; clamp the output",
            "task": run.task,
            "step": state["step"],
            "samples_seen": state["samples_seen"],
            "ema": ema,
            "scores": dict(scores or {}),
            "parameters": sum(tensor.numel() for tensor in weights.values()),
            "sha256": sha256_of(file),
            "data": state["env"]["data"],
            "commit": state["env"]["commit"],
            "config": state["config"],
        }
        file.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        _prove(file, weights)
        for written in (file, file.with_suffix(".json")):
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
            written.replace(out.with_name(written.name))
    finally:
        shutil.rmtree(part)
    return out


def student_of(checkpoint: Path, *, ema: bool | None = None) -> nn.Module:
    """The student of a checkpoint, on the CPU in evaluation mode.

    Args:
        checkpoint, ema: as for `export_student`.

    Raises:
        ValueError: there is no average and `ema` is true.
    """
    averaged = checkpoint / "ema.safetensors"
    if ema and not averaged.exists():
        raise ValueError(f"{checkpoint} keeps no moving average (optim.ema_decay was 0); use the weights as trained")
    if averaged.exists() if ema is None else ema:
        weights = load_file(averaged)
    else:
        model = load_file(checkpoint / "model.safetensors")
        weights = {key.removeprefix("student."): t for key, t in model.items() if key.startswith("student.")}
    net = build_net(_read_state(checkpoint)[1].student)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def load_student(weights: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load an exported student, ready to restore.

    Args:
        weights: the .safetensors file; its card lies beside it.

    Returns:
        The net on the CPU in evaluation mode, no gradient to its parameters; and its card.

    Raises:
        ValueError: there is no such file, no card, a training run instead of an export, a damaged file, or
            weights of another net than the card says.
    """
    run = weights if weights.is_dir() else weights.parent
    if weights.is_dir() or (run / "MANIFEST.json").exists():
        raise ValueError(
            f"{weights} is not an export but a training run's; first: python -m launch.export {run} OUT.safetensors"
        )
    if not weights.is_file():
        near = ", ".join(sorted(path.name for path in weights.parent.glob("*.safetensors")))
        raise ValueError(f"no weights {weights}" + (f"; there are {near}" if near else ""))
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a whole .safetensors file: {error}") from None
    card = _read_card(weights)
    if sha256_of(weights) != card["sha256"]:
        raise ValueError(
            f"{weights} and its card {weights.with_suffix('.json').name} do not belong together; export again"
        )
    try:
        net = build_net(TypeAdapter(NetConfig).validate_python(card["net"]))
        net.load_state_dict(tensors)
    except (ValidationError, RuntimeError) as error:
        raise ValueError(f"{weights} does not fit the net of its card, {card['net']}: {error}") from None
    return net.eval().requires_grad_(False), card


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], RunConfig]:
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    return state, parse_run(state["config"], source=str(path))


def _read_card(weights: Path) -> dict[str, Any]:
    path = weights.with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"{weights} has no card {path.name} beside it; copy both, they are one export")
    try:
        card = json.loads(path.read_text())
        found = card["format"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is not the card of an export") from None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return card


def _prove(file: Path, weights: Mapping[str, Tensor]) -> None:
    reloaded = load_student(file)[0].state_dict()
    assert reloaded.keys() == weights.keys(), "load_student is strict"
    for key, tensor in weights.items():
        if not torch.equal(reloaded[key], tensor):
            raise OSError(f"{file}: {key} read back is not what was written; is the disk sound?")

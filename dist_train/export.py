"""The deployable student: one file of weights, one JSON card beside it that says what they are.

    derain.safetensors      float32, keys of the net's official release, nothing of the teacher
    derain.json             net, configuration, data, commit, scores, sha256 of the weights
    derain.pth              instead of both, for the net's official program; see `dist_train.nets.official`
    derain.onnx, .pt2       instead of both, a graph that needs no code of ours; see `dist_train.graphs`

What loads them is `dist_train.load`. Writing needs no SAM, VGG, teacher, DeepSpeed, wandb or data.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dist_train.checkpoint import save_tensors
from dist_train.config import NetConfig
from dist_train.graphs import form_of, write_graph
from dist_train.load import FORMAT, about_masks, conditioning_of, load_net, read_state, student_of
from dist_train.nets.official import official_layout, unsaid
from shards.files import sync
from shards.schema import sha256_of


def export_student(
    checkpoint: Path,
    out: Path,
    *,
    ema: bool | None = None,
    scores: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write the student of a checkpoint.

    Args:
        checkpoint: folder of one verified checkpoint (see `dist_train.checkpoint.find`).
        out, device: as for `write_export`.
        ema: whether to take the moving average; None: if the checkpoint has one.
        scores: numbers for the card; the names carry the protocol, for example `val/rgb/psnr/student`.

    Returns:
        The card.

    Raises:
        ValueError: as `write_export` or `student_of`.
    """
    ema = (checkpoint / "ema.safetensors").exists() if ema is None else ema
    net = student_of(checkpoint, ema=ema)
    state, run = read_state(checkpoint)
    facts = {
        "task": run.task,
        "step": state["step"],
        "samples_seen": state["samples_seen"],
        "ema": ema,
        "scores": dict(scores or {}),
        "data": state["env"]["data"],
        "commit": state["env"]["commit"],
        "config": state["config"],
        **about_masks(run.conditioning),
    }
    return write_export(net, out, config=run.student, facts=facts, device=device)


def export_again(
    weights: Path, out: Path, *, fields: Mapping[str, Any], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Write the net of a file of weights in another form.

    Args:
        weights, fields: as for `load_net`.
        out, device: as for `write_export`.

    Returns:
        The card, that of `weights` with what is new; of an official file it keeps the name and sha256.

    Raises:
        ValueError: as `load_net` or `write_export`.
    """
    net, card = load_net(weights, fields, masks=True)
    config = TypeAdapter(NetConfig).validate_python(card["net"])
    return write_export(net, out, config=config, facts={"scores": {}} | card, device=device)


def write_export(
    net: nn.Module,
    out: Path,
    *,
    config: NetConfig,
    facts: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write a net as `out` and, beside a .safetensors file, its card with suffix .json.

    All is first written to a temporary folder and loaded back; only if every tensor came back equal, or if a graph
    restores as the net does, does it take its name. A crash between the two names leaves a pair that `load_student`
    refuses by its sha256.

    Args:
        net: the weights.
        out: a .safetensors file, .pth for the layout of the net's official release, or a graph (.onnx, .pt2,
            .aoti.pt2); replaced if it is there.
        config: of the net.
        facts: what else the card says; `conditioning` of a net that wants masks.
        device: what an .aoti.pt2 is compiled for.

    Returns:
        The card.

    Raises:
        ValueError: `out` has another suffix, the net has no official layout, or as `dist_train.graphs.write_graph`.
    """
    weights, conditioning = net.state_dict(), conditioning_of(facts)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    file = part / out.name
    card = {
        "format": FORMAT,
        "net": config.model_dump(mode="json"),
        "images": "RGB in [0,1], (B,3,H,W), any H and W; clamp the output" + (" (and masks)" if conditioning else ""),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        **facts,
    }
    fields: dict[str, Any] = {}
    part.mkdir(parents=True)
    try:
        if out.suffix == ".safetensors":
            save_tensors(file, weights, metadata={"format": "pt"})  # the metadata transformers and diffusers ask for
            card["sha256"] = sha256_of(file)
            file.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        elif out.suffix == ".pth":
            # The old serialisation is what every PyTorch reads, the 0.4 of RCDNet's program too.
            layout = official_layout(config, weights, conditioning)
            torch.save(layout, file, _use_new_zipfile_serialization=False)
            fields = unsaid(config, conditioning)
        elif form_of(out) and conditioning is None:
            card = write_graph(net, file, card=card, device=device)
        else:
            why = "a graph takes a picture alone, and this net wants masks beside it; " if form_of(out) else ""
            raise ValueError(
                f"{out}: {why}an export ends in .safetensors, in .pth for the net's official program, or in .onnx, "
                f".pt2 or .aoti.pt2 for a graph; call it {out.with_suffix('.safetensors')}"
            )
        if not form_of(out):
            _prove(file, weights, fields)
        for written in sorted(part.iterdir()):
            sync(written)
            written.replace(out.with_name(written.name))
    finally:
        shutil.rmtree(part)
    return card


def _prove(file: Path, weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    reloaded = load_net(file, fields, masks=True)[0].state_dict()
    assert reloaded.keys() == weights.keys(), "loading is strict"
    for key, tensor in weights.items():
        if not torch.equal(reloaded[key], tensor):
            raise OSError(f"{file}: {key} read back is not what was written; is the disk sound?")

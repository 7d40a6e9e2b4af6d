"""The deployable student: one file of weights, one JSON card beside it that says what they are.

    derain.safetensors      float32, keys of the net's official release, nothing of the teacher
    derain.json             net, configuration, data, commit, scores, sha256 of the weights
    derain.pth              instead of both, for the net's official program; see `dist_train.nets.official`
    derain.onnx, .pt2       instead of both, a graph that needs no code of ours; see `dist_train.graphs`

The same two files in a folder of the Hugging Face hub are called model.safetensors and config.json. Neither writing
nor loading needs SAM, VGG, the teacher, DeepSpeed, wandb or the data.
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
from dist_train.config import ConditioningConfig, InitConfig, NetConfig, RunConfig, parse_run
from dist_train.graphs import form_of, write_graph
from dist_train.nets import build_student
from dist_train.nets.conditioned import ConditionedNet
from dist_train.nets.official import official_layout, open_official, unsaid
from shards.schema import sha256_of

FORMAT = "restill-student-1"
OFFICIAL_SUFFIXES = (".pth", ".pt")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""An export and its card in a folder of the hub; see `dist_train.hub`."""


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
    state, run = _read_state(checkpoint)
    facts = {
        "task": run.task,
        "step": state["step"],
        "samples_seen": state["samples_seen"],
        "ema": ema,
        "scores": dict(scores or {}),
        "data": state["env"]["data"],
        "commit": state["env"]["commit"],
        "config": state["config"],
        **_about_masks(run.conditioning),
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
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
            written.replace(out.with_name(written.name))
    finally:
        shutil.rmtree(part)
    return card


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
    run = _read_state(checkpoint)[1]
    net = build_student(run.student, run.conditioning)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def load_net(weights: Path, fields: Mapping[str, Any], *, masks: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Load an exported student or a file of an official release, ready to restore.

    Args:
        weights: .safetensors with its card beside it, or an official .pth or .pt.
        fields: settings of the net that an official file cannot say; see `dist_train.nets.official.unsaid`.
        masks: whether the caller has masks, for nets that want them (`wants_masks`).

    Returns:
        As `load_student`. The card of an official file has `net`, `title`, `parameters` and `official`, and
        `conditioning` if it wants masks.

    Raises:
        ValueError: as `load_student` or `dist_train.nets.official.open_official`; or the net wants masks.
    """
    net, card = _open(weights, fields)
    if getattr(net, "wants_masks", False) and not masks:
        raise ValueError(
            f"{weights} holds {card.get('title', 'a conditioned net')}, which wants masks beside the picture; only "
            "launch.evaluate and launch.before_after give them"
        )
    return net, card


def _open(weights: Path, fields: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    if weights.suffix not in OFFICIAL_SUFFIXES:
        if fields:
            raise ValueError(f"{weights} has a card that says all of its net; {', '.join(fields)} is not to be given")
        return load_student(weights)
    net, found = open_official(weights, fields)
    card = {
        "net": found.config.model_dump(mode="json"),
        "title": found.title,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "official": {"file": weights.name, "sha256": sha256_of(weights)},
        **_about_masks(found.conditioning),
    }
    return net.requires_grad_(False), card


def load_student(weights: Path, *, trust_code: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """Load an exported student, ready to restore.

    Args:
        weights: the .safetensors file; its card lies beside it. Or a folder of the hub.
        trust_code: whether the card may name a function to import that makes the net.

    Returns:
        The net on the CPU in evaluation mode, no gradient to its parameters; and its card.

    Raises:
        ValueError: there is no such file, no card, a training run instead of an export, a damaged file, weights of
            another net than the card says, or code that is not trusted.
    """
    if (weights / CONFIG).is_file():
        weights = weights / WEIGHTS
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
        raise ValueError(f"{weights} and its card {_card_path(weights).name} do not belong together; export again")
    if card["net"]["name"] == "custom" and not trust_code:
        raise ValueError(
            f"{weights}: its card names code to import, {card['net'].get('factory')}; if you trust it, say "
            "trust_code=True"
        )
    try:
        net = build_student(TypeAdapter(NetConfig).validate_python(card["net"]), conditioning_of(card))
        net.load_state_dict(tensors)
    except (ValidationError, RuntimeError) as error:
        raise ValueError(f"{weights} does not fit the net of its card, {card['net']}: {error}") from None
    return net.eval().requires_grad_(False), card


def conditioning_of(card: Mapping[str, Any]) -> ConditioningConfig | None:
    """What the net of a card sees of masks; None: it wants none."""
    said = card.get("conditioning")
    return None if said is None else ConditioningConfig.model_validate(said)


def run_of(card: Mapping[str, Any], *, source: object) -> RunConfig | None:
    """The run that a card is of; what was made of an official file has none."""
    return parse_run(card["config"], source=str(source)) if "config" in card else None


def run_of_checkpoint(checkpoint: Path) -> RunConfig:
    """The run that a checkpoint is of."""
    return _read_state(checkpoint)[1]


def _about_masks(conditioning: ConditioningConfig | None) -> dict[str, Any]:
    return {} if conditioning is None else {"conditioning": conditioning.model_dump(mode="json")}


def start_from(task: nn.Module, init: InitConfig) -> None:
    """Give the nets of a new task the weights that `init` names.

    Raises:
        ValueError: as `load_net`; or the file is of another net or size than the run's.
    """
    nets = {"student": getattr(task, "student", None), "teacher": getattr(getattr(task, "teacher", None), "net", None)}
    for part, net in nets.items():
        path = getattr(init, part)
        if path is None:
            continue
        if net is None:
            raise ValueError(f"init.{part}={path}, but the run's task has no {part}")
        loaded, card = load_net(Path(path), {}, masks=True)
        if isinstance(net, ConditionedNet) and not isinstance(loaded, ConditionedNet):
            net = net.net
        try:
            net.load_state_dict(loaded.state_dict())
        except RuntimeError:
            said = card.get("title") or card["net"]
            raise ValueError(f"init.{part}={path} holds {said}; set {part} to that net and size") from None


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], RunConfig]:
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    return state, parse_run(state["config"], source=str(path))


def _card_path(weights: Path) -> Path:
    beside = weights.with_suffix(".json")
    hub = weights.with_name(CONFIG)
    return hub if weights.name == WEIGHTS and hub.is_file() and not beside.is_file() else beside


def _read_card(weights: Path) -> dict[str, Any]:
    path = _card_path(weights)
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


def _prove(file: Path, weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    reloaded = load_net(file, fields, masks=True)[0].state_dict()
    assert reloaded.keys() == weights.keys(), "loading is strict"
    for key, tensor in weights.items():
        if not torch.equal(reloaded[key], tensor):
            raise OSError(f"{file}: {key} read back is not what was written; is the disk sound?")

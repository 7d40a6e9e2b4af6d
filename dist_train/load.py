"""Nets from files: the student of a checkpoint, an export with its card, a file of a net's official release.

    derain.safetensors      float32, keys of the net's official release, nothing of the teacher
    derain.json             its card: net, configuration, data, commit, scores, sha256 of the weights

The same two files in a folder of the Hugging Face hub are called model.safetensors and config.json. Loading needs no
SAM, VGG, teacher, DeepSpeed, wandb or data. What writes them is `dist_train.export`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dist_train.config import ConditioningConfig, InitConfig, NetConfig, RunConfig, parse_run
from dist_train.nets import build_student
from dist_train.nets.conditioned import ConditionedNet
from dist_train.nets.official import open_official
from shards.schema import sha256_of

FORMAT = "restill-student-1"
OFFICIAL_SUFFIXES = (".pth", ".pt")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""An export and its card in a folder of the hub; see `dist_train.hub`."""


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


def student_of(checkpoint: Path, *, ema: bool | None = None) -> nn.Module:
    """The student of a checkpoint, on the CPU in evaluation mode.

    Args:
        checkpoint: folder of one verified checkpoint (see `dist_train.checkpoint.find`).
        ema: whether to take the moving average; None: if the checkpoint has one.

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
    run = read_state(checkpoint)[1]
    net = build_student(run.student, run.conditioning)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


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


def conditioning_of(card: Mapping[str, Any]) -> ConditioningConfig | None:
    """What the net of a card sees of masks; None: it wants none."""
    said = card.get("conditioning")
    return None if said is None else ConditioningConfig.model_validate(said)


def about_masks(conditioning: ConditioningConfig | None) -> dict[str, Any]:
    """What a card says of them, for `conditioning_of`."""
    return {} if conditioning is None else {"conditioning": conditioning.model_dump(mode="json")}


def run_of(card: Mapping[str, Any], *, source: object) -> RunConfig | None:
    """The run that a card is of; what was made of an official file has none."""
    return parse_run(card["config"], source=str(source)) if "config" in card else None


def run_of_checkpoint(checkpoint: Path) -> RunConfig:
    """The run that a checkpoint is of."""
    return read_state(checkpoint)[1]


def read_state(checkpoint: Path) -> tuple[dict[str, Any], RunConfig]:
    """Of a checkpoint: its state (see `dist_train.trainer`) and the run that it is of."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    return state, parse_run(state["config"], source=str(path))


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
        **about_masks(found.conditioning),
    }
    return net.requires_grad_(False), card


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

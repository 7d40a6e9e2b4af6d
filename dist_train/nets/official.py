"""Checkpoint files of the nets' official releases: what they hold, into our nets, and back.

    RCDNet, EfficientDerain     the state dict itself
    NAFNet, SAM-Deblur          {"params": state dict}
    Uformer                     {"epoch", "state_dict": with `module.` before each key, "optimizer"}

Sizes are read from the shapes. What shapes do not show, the caller gives; see `UNSAID`.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dist_train.config import (
    ConditioningConfig,
    EfficientDerainConfig,
    NafnetConfig,
    NetConfig,
    RcdnetConfig,
    UformerConfig,
)
from dist_train.nets.conditioned import SeesMasks
from dist_train.nets.identify import Identified, explain, identify
from dist_train.nets.stages import RestorationNet
from dist_train.priors.weights import looks_like

NAMES = (
    "rcdnet", "rcdnet_simple", "efficientderain", "uformer",
    "nafnet", "nafnetlocal", "masknafnet", "segnafnet", "segnafnetlocal",
)  # fmt: skip
"""What `load_official` loads. local: with TLC, by default for training crops of 256 px; the weights are the same."""

UNSAID: dict[str, tuple[str, ...]] = {
    "nafnet": ("tlc_train_px",),
    "rcdnet": (),
    "efficientderain": ("fit",),
    "uformer": ("img_size", "shift", "square"),
}
"""Fields of a net's configuration that change what it restores and that no official file holds."""

UNSAID_OF_MASKS = ("grouping", "mask_value")
"""The same of the conditioning of a net that wants masks; mask_value is for MAP alone."""

WRAPPERS = ("params_ema", "params", "state_dict", "model")
"""Keys under which files hold the weights; the first that is there counts."""


def load_official(name: str, path: str | Path, **fields: Any) -> RestorationNet | SeesMasks:
    """A net with the weights of an official file, on the CPU in evaluation mode; masknafnet and segnafnet want masks.

    Args:
        name: one of `NAMES`.
        path: the file.
        fields: what the file cannot say, see `UNSAID`; for example img_size=128 for Uformer's official GoPro test.

    Raises:
        ValueError: as `open_official`, or the file is of another net.
    """
    if name not in NAMES:
        raise ValueError(f"no official net is called {name!r}; there are {', '.join(NAMES)}")
    if name.endswith("local"):
        fields = {"tlc_train_px": 256} | fields
    return open_official(Path(path), fields, name=name.removesuffix("local"))[0]


def open_official(
    path: Path, fields: Mapping[str, Any], *, name: str | None = None
) -> tuple[RestorationNet | SeesMasks, Identified]:
    """The net that an official file holds, whichever it is; see `load_official`.

    Args:
        path: the file.
        fields: as for `load_official`.
        name: the net that it must be; None: any.

    Raises:
        ValueError: as `read_official`; the file is of another net; it does not fit; a field is not to be given.
    """
    state = read_official(path)
    try:
        found = identify(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found is None or name not in (None, found.name):
        title = found.title if found else looks_like(state)
        raise ValueError(f"{path} holds no weights of {name or 'a net that is known here'}; it looks like {title}")
    found = _with_fields(found, fields)
    net = build(found)
    _check_fit(net.state_dict(), state, what=f"{path} looks like {found.title}")
    net.load_state_dict(state)
    return net.eval(), found


def read_official(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, without wrapper and `module.`; code in the file is not run.

    Raises:
        ValueError: there is no such file, it is damaged, it holds code, or it holds no state dict.
    """
    if not path.is_file():
        near = ", ".join(sorted(file.name for file in path.parent.glob("*.pt*")))
        raise ValueError(f"no weights {path}" + (f"; there are {near}" if near else ""))
    with path.open("rb") as file:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file, torch raises anything
            code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            why = (
                f"holds Python objects beside tensors ({code[1]}), and reading them would run code; if you trust it, "
                'torch.load it with weights_only=False and torch.save {"params": net.state_dict()} anew'
                if code
                else f"is not a readable PyTorch file, or cut short ({path.stat().st_size:,} bytes); fetch it again, "
                "and see that what comes is no web page"
            )
            raise ValueError(f"{path} {why}") from error
    wrappers = [key for key in WRAPPERS if isinstance(held, dict) and isinstance(held.get(key), dict)]
    state = held[wrappers[0]] if wrappers else held
    if not isinstance(state, dict) or not state or not all(_named_tensor(*item) for item in state.items()):
        found = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(
            f"{path} holds {found or 'nothing'}; wanted are tensors by name, bare or under one of {', '.join(WRAPPERS)}"
        )
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def official_layout(
    config: NetConfig, state: Mapping[str, Tensor], conditioning: ConditioningConfig | None = None
) -> dict[str, Any]:
    """What the official program would `torch.load`.

    Args:
        config: of the net.
        state: its state dict.
        conditioning: of a net that wants masks.

    Raises:
        ValueError: the net has no official program.
    """
    if conditioning is not None and config.name != "nafnet":
        raise ValueError(f"a conditioned {config.name} net has no official layout; export it as .safetensors")
    match config:
        case RcdnetConfig() | EfficientDerainConfig():
            return dict(state)
        case NafnetConfig():
            return {"params": dict(state)}
        case UformerConfig():
            # Its trainer goes on from epoch and optimizer: here from the start, with its own settings.
            num_parameters = sum(not key.endswith("relative_position_index") for key in state)
            group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02, "amsgrad": False}
            return {
                "epoch": 0,
                "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
                "optimizer": {"state": {}, "param_groups": [group | {"params": list(range(num_parameters))}]},
            }
    raise ValueError(f"a {config.name} net has no official layout; export it as .safetensors")


def unsaid(config: NetConfig, conditioning: ConditioningConfig | None) -> dict[str, Any]:
    """What an official file of this net cannot say, and the values that it then has to be given."""
    values = {key: getattr(config, key) for key in UNSAID[config.name]}
    return values | ({key: getattr(conditioning, key) for key in UNSAID_OF_MASKS} if conditioning else {})


def _with_fields(found: Identified, fields: Mapping[str, Any]) -> Identified:
    free = unsaid(found.config, found.conditioning)
    for key in fields:
        if key not in free:
            size = f"; {key}={getattr(found.config, key)} is in it" if key in type(found.config).model_fields else ""
            left = ", ".join(free) or "nothing"
            raise ValueError(f"{key} is not to be given for {found.title}{size}; its file leaves open: {left}")
    of_masks = {key: value for key, value in fields.items() if key in UNSAID_OF_MASKS}
    of_net = {key: value for key, value in fields.items() if key not in of_masks}
    try:
        config = type(found.config).model_validate(found.config.model_dump() | of_net)
        if found.conditioning is None:
            return found._replace(config=config)
        conditioning = ConditioningConfig.model_validate(found.conditioning.model_dump() | of_masks)
        return found._replace(config=config, conditioning=conditioning)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def build(found: Identified) -> RestorationNet | SeesMasks:
    """A new net of this kind."""
    from dist_train.nets import build_student  # not above: that package hands out load_official

    return build_student(found.config, found.conditioning)


def _check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, what: str) -> None:
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    other = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    findings = {"missing": missing, "of unknown name": unknown, "of another shape": sorted(other)}
    problems = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for kind, found in findings.items()
        if found
    ]
    if problems:
        raise ValueError(f"{what}, but of its {len(wanted)} tensors {'; '.join(problems)}")

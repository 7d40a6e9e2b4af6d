"""Our nets against the official ones: every fixture in the folder, whatever net and size it is of.

PARITY_DIR names another folder. A fixture of a net, argument, input or output that is not known here fails.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dist_train.nets import RestorationNet, load_official
from dist_train.nets.conditioned import ConditionedNafnet, Groups, drop_groups
from dist_train.nets.identify import Identified, identify
from dist_train.nets.nafnet import Nafnet
from dist_train.nets.official import build, read_official, unsaid
from tests.helpers.shared import SHARED

pytestmark = pytest.mark.unit

FOLDER = Path(os.environ.get("PARITY_DIR", SHARED / "parity"))


if "PARITY_DIR" in os.environ:
    assert list(FOLDER.glob("*.pt")), f"PARITY_DIR={FOLDER} holds no fixtures (*.pt)"
elif not FOLDER.is_dir():
    pytest.skip(f"{FOLDER} is not here; set PARITY_DIR to the folder of fixtures", allow_module_level=True)


def every(pattern: str) -> list[Any]:
    """The folder's files of this name, but for the values of metrics and losses, which have tests of their own."""
    files = (path for path in sorted(FOLDER.glob(pattern)) if not path.name.startswith("metrics"))
    return [pytest.param(path, id=path.stem) for path in files]


def read(path: Path) -> dict[str, Any]:
    fixture = torch.load(path, weights_only=True)
    assert fixture["format"] == "ir-parity-1", f"{path} has format {fixture['format']!r}"
    return fixture


class Field(NamedTuple):
    """Our name of a constructor's argument."""

    name: str
    convert: Callable[[Any], Any] = lambda value: tuple(value) if isinstance(value, list) else value


class Only(NamedTuple):
    """Values of an argument that our net has built in."""

    values: tuple[Any, ...]


def only(*values: Any) -> Only:
    return Only(values)


ANY = None
"""An argument that leaves the restored picture as it is."""


def single(value: list[int]) -> int:
    (number,) = value
    return number


def sides(train_size: list[int]) -> int | tuple[int, int]:
    height, width = train_size[-2:]
    return height if height == width else (height, width)


NAFNET = {
    "img_channel": only(3),
    "width": Field("width"),
    "middle_blk_num": Field("middle_blk_num"),
    "enc_blk_nums": Field("enc_blk_nums"),
    "dec_blk_nums": Field("dec_blk_nums"),
}
LOCAL = {"train_size": Field("tlc_train_px", sides), "base_size": only(None), "fast_imp": only(False)}
SEGNAFNET = NAFNET | {"seg_channel": Field("map_channels"), "mask_dropout": ANY}
CTOR: dict[str, dict[str, Field | Only | None]] = {
    "rcdnet": {
        "stage": Field("num_stages"), "num_M": Field("num_m"), "num_Z": Field("num_z"), "T": ANY,
    },
    "rcdnet_simple": {
        "S": Field("num_stages"), "T": Field("num_res_blocks"), "num_M": Field("num_m"), "num_Z": Field("num_z"),
    },
    "efficientderain": {
        "color": only(True), "burst_length": only(1), "blind_est": only(True), "sep_conv": only(False),
        "channel_att": only(False), "spatial_att": only(False), "upMode": only("bilinear"), "core_bias": only(False),
        "kernel_size": Field("kernel_px", single), "base_width": Field("base_width"),
    },
    "uformer": {
        "img_size": Field("img_size"), "embed_dim": Field("embed_dim"), "depths": Field("depths"),
        "num_heads": Field("num_heads"), "win_size": Field("win_size"), "mlp_ratio": Field("mlp_ratio"),
        "modulator": Field("modulator"), "shift_flag": Field("shift"),
        "in_chans": only(3), "dd_in": only(3), "qkv_bias": only(True), "qk_scale": only(None),
        "token_projection": only("linear"), "token_mlp": only("leff"), "cross_modulator": only(False),
        "patch_norm": only(True), "use_checkpoint": ANY, "drop_rate": ANY, "attn_drop_rate": ANY,
        "drop_path_rate": ANY, "shift_size_per_block": ANY, "win_size_per_block": ANY,
    },
    "nafnet": NAFNET | {"mask": only(False)},
    "nafnetlocal": NAFNET | LOCAL | {"mask": only(False)},
    "masknafnet": NAFNET | {"mask": only(True)},
    "segnafnet": SEGNAFNET,
    "segnafnetlocal": SEGNAFNET | LOCAL,
}  # fmt: skip
"""Net -> argument of its official constructor -> what it is here."""


def fields_of(ctor: dict[str, Any], net: str) -> dict[str, Any]:
    """Fields of our configuration that a constructor's arguments set."""
    fields = {}
    for key, value in ctor.items():
        assert key in CTOR[net], f"{key}={value!r} of {net} is unknown here"
        match CTOR[net][key]:
            case Field(name, convert):
                fields[name] = convert(value)
            case Only(values):
                assert value in values, f"{net} with {key}={value!r} is not supported; only {values}"
    return fields


def check_sizes(found: Identified, fields: dict[str, Any]) -> None:
    """What was read from the shapes must be what the constructor was given."""
    read_off = {
        key: getattr(found.conditioning if key == "map_channels" else found.config, key, None) for key in fields
    }
    if "mlp_ratio" in fields:  # of which the shapes hold the rounded product
        read_off["mlp_ratio"] = pytest.approx(read_off["mlp_ratio"], abs=1 / found.config.embed_dim)
    assert read_off == fields, f"{found.title}: sizes read from the file"


def watch(module: nn.Module, seen: dict[str, Tensor], name: str, *, output: bool = False) -> None:
    module.register_forward_hook(lambda _, args, out: seen.update({name: out if output else args[0]}))


def rcdnet(net: RestorationNet, ctor: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The official net lives in 0..255."""
    trace: dict[str, list[Tensor]] = {}
    restored = net(x / 255, trace=trace)
    first, *backgrounds = (255 * picture for picture in trace["backgrounds"])
    rains = [255 * picture for picture in trace["rains"]]
    assert torch.equal(backgrounds[-1], 255 * restored)
    return {"B0": first, "ListB": backgrounds, "ListCM": rains, "ListR": rains}


def efficientderain(net: RestorationNet, ctor: dict[str, Any], x: Tensor) -> dict[str, Any]:
    seen: dict[str, Tensor] = {}
    watch(net.outc, seen, "core", output=True)
    watch(net.conv_final, seen, "rates")
    restored = net(x)
    rates = {f"pred_rate{rate + 1}": seen["rates"][:, 3 * rate : 3 * rate + 3] for rate in range(4)}
    return {"pred": restored, "core": seen["core"], **rates}


def plain(net: RestorationNet, ctor: dict[str, Any], x: Tensor) -> dict[str, Any]:
    return {"y": net(x)}


def masknafnet(net: ConditionedNafnet, ctor: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The fixture's fourth channel is of any values, so that no masks give it."""
    return {"y": Nafnet.forward(net, x)}


def segnafnet(
    net: ConditionedNafnet,
    ctor: dict[str, Any],
    x: Tensor,
    masks: list[Tensor],
    dropped_mask_indices: list[Tensor] | None = None,
    seed_before_forward: int | None = None,
) -> dict[str, Any]:
    num = max(map(len, masks))
    ids = torch.stack([(of_picture[:, 0].sign() * number_from_1(of_picture)).sum(0) for of_picture in masks]).long()
    assert all(of_picture.sign().sum(0).max() <= 1 for of_picture in masks), "they do not overlap"
    (value,) = {float(of_picture.max()) for of_picture in masks}
    net.conditioning = net.conditioning.model_copy(update={"mask_value": value})
    groups = Groups(ids, num)
    if dropped_mask_indices is not None:
        order = torch.stack([
            torch.cat([first, torch.tensor([k for k in range(num) if k not in first])])
            for first in dropped_mask_indices
        ])  # fmt: skip
        groups = drop_groups(groups, order=order, share=ctor["mask_dropout"])
        left = [len(picture.unique()) - 1 for picture in groups.ids]
        assert left == [len(m) - len(d) for m, d in zip(masks, dropped_mask_indices, strict=True)]
    seen: dict[str, Tensor] = {}
    watch(net.intro, seen, "image and map")
    return {"y": net.restore_groups(x, groups), "map": list(seen["image and map"][:, 3:])}


def number_from_1(masks: Tensor) -> Tensor:
    return torch.arange(1, len(masks) + 1)[:, None, None]


RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "rcdnet": rcdnet,
    "rcdnet_simple": rcdnet,
    "efficientderain": efficientderain,
    "uformer": plain,
    "nafnet": plain,
    "nafnetlocal": plain,
    "masknafnet": masknafnet,
    "segnafnet": segnafnet,
    "segnafnetlocal": segnafnet,
}


def load(path: Path, fixture: dict[str, Any]) -> RestorationNet:
    """The fixture's checkpoint through a file, as a user would load it, with what only its constructor says."""
    name = fixture["net"].removesuffix("_train")
    fields = fields_of(fixture["ctor"], name)
    torch.save(fixture["checkpoint"], path)
    found = identify(read_official(path))
    free = {key: fields.pop(key) for key in unsaid(found.config, found.conditioning) if key in fields}
    check_sizes(found, fields)
    return load_official(name, path, **free)


@pytest.mark.parametrize("path", every("*.pt"))
def test_equals_the_official_net(path: Path, tmp_path: Path) -> None:
    fixture = read(path)
    net = load(tmp_path / "official.pth", fixture)
    net.train(fixture["net"].endswith("_train") or path.stem.endswith("_train"))
    with torch.no_grad():
        ours = RUN[fixture["net"].removesuffix("_train")](net, fixture["ctor"], **fixture["inputs"])
    for name, official in fixture["outputs"].items():
        pairs = [(ours[name], official)] if isinstance(official, Tensor) else zip(ours[name], official, strict=True)
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape, name
            assert (mine - theirs).abs().max() <= fixture["atol"], name


@pytest.mark.parametrize("path", every("ckpt_*_legacy_*.pth"))
def test_files_of_old_pytorch_load(path: Path, tmp_path: Path) -> None:
    twin = read(path.with_name(path.stem.partition("_legacy_")[2] + ".pt"))
    with path.open("rb") as file:
        assert file.read(2) != b"PK", "this one should not be a zip archive"
    net = load_official(twin["net"], path)
    torch.save(twin["checkpoint"], tmp_path / "twin.pth")
    wanted = read_official(tmp_path / "twin.pth")
    assert net.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("path", every("full_*.json"))
def test_published_size_has_the_official_names(path: Path) -> None:
    facts = json.loads(path.read_text())
    state = {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, shape, dtype in facts["keys"]}
    found = identify(state)
    check_sizes(found, fields_of(facts["ctor"], found.name))
    with torch.device("meta"):
        net = build(found)
    ours = [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in net.state_dict().items()
    ]
    assert ours == facts["keys"]
    assert sum(parameter.numel() for parameter in net.parameters()) == facts["n_params"]

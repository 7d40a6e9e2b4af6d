"""Which net a state dict is of, and how large: read from the names and shapes alone."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

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


class Identified(NamedTuple):
    """What a state dict is the weights of.

    Attributes:
        name: as `dist_train.nets.load_official` takes it.
        config: its sizes; what no shape shows has its default.
        title: in words, for example "NAFNet width 32, GoPro/REDS blocks".
        conditioning: of nets that want masks beside the picture; what no shape shows has its default.
    """

    name: str
    config: NetConfig
    title: str
    conditioning: ConditioningConfig | None = None


def identify(state: Mapping[str, Tensor]) -> Identified | None:
    """Which net a state dict is of, and how large; only names and shapes are looked at.

    Returns:
        None if it is of none of the nets here.

    Raises:
        ValueError: it is of one of them, but what tells a size is missing, or that size cannot be.
    """
    for key, read in _READERS.items():
        if key in state:
            try:
                return read(state)
            except KeyError as error:
                raise ValueError(f"the weights lack {error}, though {key!r} is there") from None
            except (IndexError, TypeError):
                raise ValueError(f"the weights have {key!r}, but not the shapes that go with it") from None
            except ValidationError as error:
                raise ValueError(f"the weights have sizes that do not go together: {explain(error)}") from None
    return None


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with a configuration, in one line."""
    problem = error.errors()[0]
    place = str(problem["loc"][0]) if problem["loc"] else ""  # further parts are of a union's members
    return f"{place}={problem['input']!r}: {problem['msg']}" if place else problem["msg"].removeprefix("Value error, ")


def _rcdnet(state: Mapping[str, Tensor]) -> Identified:
    config = RcdnetConfig(num_stages=len(state["conv"]) + 1, num_m=state["weight0"].shape[1], num_z=len(state["w_z_f"]))
    return Identified("rcdnet", config, f"RCDNet, {config.num_stages} stages, {config.num_z} channels of Z")


def _rcdnet_simple(state: Mapping[str, Tensor]) -> Identified:
    config = RcdnetConfig(
        layout="simple",
        num_stages=len(state["etaB_S"]),
        num_m=state["C0"].shape[1],
        num_z=len(state["C_z"]),
        num_res_blocks=_count(state, "proxNet_B_0.layer."),
    )
    title = f"RCDNet_simple, {config.num_stages} stages of {config.num_res_blocks} blocks, {config.num_z} channels of Z"
    return Identified("rcdnet_simple", config, title)


def _efficientderain(state: Mapping[str, Tensor]) -> Identified:
    config = EfficientDerainConfig(
        kernel_px=math.isqrt(len(state["outc.weight"]) // 3), base_width=len(state["conv1.conv1.0.weight"])
    )
    title = f"EfficientDerain, kernels of {config.kernel_px} px, width {config.base_width}"
    return Identified("efficientderain", config, title)


def _nafnet(state: Mapping[str, Tensor]) -> Identified:
    levels = range(_count(state, "downs."))
    config = NafnetConfig(
        width=state["intro.weight"].shape[0],
        middle_blk_num=_count(state, "middle_blks."),
        enc_blk_nums=tuple(_count(state, f"encoders.{level}.") for level in levels),
        dec_blk_nums=tuple(_count(state, f"decoders.{level}.") for level in levels),
    )
    conditioning = None
    if "pre_seg.weight" in state:
        conditioning = ConditioningConfig(method="map", map_channels=len(state["pre_seg.weight"]))
        name, title = "segnafnet", f"SegNAFNet (MAP of SAM-Deblur, {conditioning.map_channels} channels)"
    elif state["intro.weight"].shape[1] > 3:
        conditioning = ConditioningConfig(method="cat")
        name, title = "masknafnet", "MaskNAFNet (CAT of SAM-Deblur)"
    else:
        name, title = "nafnet", "NAFNet"
    match config.enc_blk_nums, config.middle_blk_num, config.dec_blk_nums:
        case (1, 1, 1, 28), 1, (1, 1, 1, 1):
            blocks = "GoPro/REDS blocks"
        case (2, 2, 4, 8), 12, (2, 2, 2, 2):
            blocks = "SIDD blocks"
        case down, middle, up:
            blocks = f"blocks {down}, {middle}, {up}"
    return Identified(name, config, f"{title} width {config.width}, {blocks}", conditioning)


def _uformer(state: Mapping[str, Tensor]) -> Identified:
    stages = [*(f"encoderlayer_{i}" for i in range(4)), "conv", *(f"decoderlayer_{i}" for i in range(4))]
    tables = [state[f"{stage}.blocks.0.attn.relative_position_bias_table"] for stage in stages]  # ((2w-1)^2, heads)
    sides = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    expand = state["conv.blocks.0.mlp.linear1.0.weight"]
    config = UformerConfig(
        embed_dim=len(state["input_proj.proj.0.weight"]),
        depths=tuple(_count(state, f"{stage}.blocks.") for stage in stages),
        num_heads=tuple(table.shape[1] for table in tables),
        win_size=sides[0],
        mlp_ratio=expand.shape[0] / expand.shape[1],
        modulator="decoderlayer_0.blocks.0.modulator.weight" in state,
    )
    shrunk = [side * 2 ** (4 - abs(4 - index)) for index, side in enumerate(sides) if side < sides[0]]
    if shrunk:  # built for pictures so small that one window held the whole map of these stages
        config = config.model_copy(update={"img_size": max(shrunk)})
    published = {
        "T": UformerConfig(embed_dim=16, depths=(2,) * 9),
        "S": UformerConfig(embed_dim=32, depths=(2,) * 9),
        "B": UformerConfig(),
    }
    for variant, sizes in published.items():
        if config == sizes:
            return Identified("uformer", config, f"Uformer-{variant}")
    title = f"Uformer, width {config.embed_dim}, blocks {config.depths}, windows of {config.win_size} px"
    return Identified("uformer", config, title)


_READERS: dict[str, Callable[[Mapping[str, Tensor]], Identified]] = {
    "w_z_f": _rcdnet,
    "C_z": _rcdnet_simple,
    "conv_final.weight": _efficientderain,
    "intro.weight": _nafnet,
    "input_proj.proj.0.weight": _uformer,
}
"""A name that only this net's weights have -> what reads its sizes."""


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})

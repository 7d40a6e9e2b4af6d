"""How a net is run on pictures: whole or in tiles, once or eight times, in which precision."""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.fast import prepare_for_inference
from dist_train.nets.nafnet import Nafnet
from dist_train.nets.stages import RestorationNet
from dist_train.room import LiveBytes, free_bytes

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE_PX = 2**19
"""So many pixels go through at once without a look at the memory."""
WORKING_SHARE = 0.4
"""Of the free memory, what features may take; the rest is for what kernels need beside them and for other programs."""

Restore = Callable[[Tensor], Tensor]
"""(B,3,H,W) float32 RGB in [0,1], any size -> (B,3,H,W) float32, not clamped, on the same device."""


@dataclass(frozen=True)
class Inference:
    """How pictures go through a net; the defaults run the net as it is, on the whole picture.

    Raises:
        ValueError: a value out of range, or an overlap that leaves tiles no way to go.
    """

    tlc_px: int = 0
    """Side of the training crops for NAFNet's test-time local converter; 0: as the net was loaded."""
    ensemble: bool = False
    """Mean over the eight flips and quarter turns of the picture, each restored and turned back: 8 times the work."""
    tile_px: int = 0
    """Side of tiles, rounded down to what the net's sides are multiples of; 0: the whole picture at once."""
    overlap_px: int = 32
    """What neighbouring tiles share at least. The middle quarter is blended, the rest is context that is not shown:
    a trained NAFNet of three levels, its pooling aside, was off by 4.5/255 with 32 px, by nothing with 64."""
    precision: Precision = "fp32"
    """Of the net's arithmetic, by autocast; weights and the result stay float32."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision {self.precision!r}: there are {', '.join(get_args(Precision))}")
        for name in ("tlc_px", "tile_px", "overlap_px"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is below 0")
        if 0 < self.tile_px <= self.overlap_px:
            raise ValueError(f"tiles of {self.tile_px} px overlap by {self.overlap_px} px; make the overlap smaller")

    @property
    def suffix(self) -> str:
        """What a protocol's name ends in when pictures were restored so, as "+tlc256+x8+tiles512o32+bf16"; else ""."""
        parts = [
            self.tlc_px and f"tlc{self.tlc_px}",
            self.ensemble and "x8",
            self.tile_px and f"tiles{self.tile_px}o{self.overlap_px}",
            self.precision != "fp32" and self.precision,
        ]
        return "".join(f"+{part}" for part in parts if part)


def restorer(net: nn.Module, options: Inference, *, device: torch.device | str) -> Restore:
    """A function that restores pictures with a copy of `net` on `device`.

    In tiles, a picture's own pixels are each tile's context, and tiles lie where the net's grid of windows and strides
    does on the whole picture. So tiles and whole differ only by what a net sees beyond 3/8 of an overlap; a net that
    pools over the whole picture (NAFNet without TLC) pools over the tile instead, and differs by nature.

    Args:
        net: of `dist_train.nets`, as it was loaded; tiles need a `RestorationNet`.
        options: how.
        device: where tiles or pictures are sent; the result comes back to where the picture was.

    Raises:
        ValueError: the net wants masks, TLC for another net than NAFNet, or tiles too small for the net.
    """
    if getattr(net, "wants_masks", False):
        raise ValueError("this net wants masks beside the picture, which are not given here; use launch.evaluate")
    net = _with_tlc(net, options)
    restore = _at_precision(prepare_for_inference(net, device=device), options.precision, torch.device(device))
    if options.tile_px:
        if not isinstance(net, RestorationNet):
            raise TypeError(f"{type(net).__name__} does not say on which grid its tiles lie")
        restore = _tiled(restore, net, tile_px=options.tile_px, overlap_px=options.overlap_px)
    if options.ensemble:
        restore = _ensemble(restore)
    return torch.inference_mode()(restore)


def fitting_restorer(
    net: RestorationNet, options: Inference, *, device: torch.device | str, free: int | None = None
) -> Restore:
    """As `restorer`, with tiles as large as memory lets them be, and only where a picture is larger.

    The first picture, or batch, of more than `WHOLE_PX` decides how large that is, by what is free then.

    Args:
        net, options, device: as for `restorer`; `tile_px` is not read.
        free: bytes that may be taken; None: what is free.
    """
    whole = restorer(net, replace(options, tile_px=0), device=device)
    tiled: dict[int, Restore] = {}

    def restore(lq: Tensor) -> Tensor:
        batch, _, height, width = lq.shape
        if batch * height * width <= WHOLE_PX:
            return whole(lq)
        if batch not in tiled:
            room = WORKING_SHARE * (free_bytes(device) if free is None else free)
            side = math.isqrt(int(room / batch / _bytes_per_px(_with_tlc(net, options), device)))
            tile_px = max(side // net.multiple * net.multiple, 2 * options.overlap_px, 2 * net.multiple)
            log.info("there is room for %d px at once in each direction; larger pictures go in tiles", tile_px)
            tiled[batch] = restorer(net, replace(options, tile_px=tile_px), device=device)
        return tiled[batch](lq)

    return restore


@torch.inference_mode()
def _bytes_per_px(net: RestorationNet, device: torch.device | str) -> float:
    """What a further pixel of a picture adds to the most that lives at once, in float32, in bytes."""

    def peak(net: nn.Module, side: int, device: torch.device | str) -> int:
        lq = torch.zeros(1, 3, side, side, device=device)
        with LiveBytes() as live:
            net(lq)
        return live.peak

    def slope(net: nn.Module, side: int, device: torch.device | str) -> float:
        side = -(-side // net.multiple) * net.multiple
        return (peak(net, 2 * side, device) - peak(net, side, device)) / (3 * side**2)

    # Without data, sides may be so large that TLC's box does not cover all.
    try:
        return slope(copy.deepcopy(net).eval().to("meta"), 1024, "meta")
    except (RuntimeError, NotImplementedError):  # a net from elsewhere that makes tensors of its own somewhere
        return slope(copy.deepcopy(net).eval().to(device), 64, device)


def _with_tlc(net: nn.Module, options: Inference) -> nn.Module:
    if not options.tlc_px:
        return net
    if not isinstance(net, Nafnet):
        raise ValueError(f"TLC is for NAFNet, not for {type(net).__name__}; leave it out")
    net = copy.deepcopy(net)
    net.pool_locally(options.tlc_px)
    return net


def _at_precision(net: nn.Module, precision: Precision, device: torch.device) -> Restore:
    def restore(lq: Tensor) -> Tensor:
        half = AUTOCAST.get(precision)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            restored: Tensor = net(lq.to(device))
        return restored.float().to(lq.device)

    return restore


def _ensemble(restore: Restore) -> Restore:
    def restore_eight(lq: Tensor) -> Tensor:
        total = torch.zeros_like(lq)
        for turns, flip in product(range(4), (False, True)):
            turned = lq.rot90(turns, (2, 3))
            restored = restore(turned.flip(3)).flip(3) if flip else restore(turned)
            total += restored.rot90(-turns, (2, 3))
        return total / 8

    return restore_eight


def _tiled(restore: Restore, net: RestorationNet, *, tile_px: int, overlap_px: int) -> Restore:
    grid = net.multiple
    side = max(tile_px // grid * grid, grid)
    step = (side - overlap_px) // grid * grid
    if step < 1:
        fitting = (-(-overlap_px // grid) + 1) * grid
        raise ValueError(
            f"tiles of {tile_px} px are too small for {type(net).__name__}, whose tiles lie on a grid of {grid} px; "
            f"with an overlap of {overlap_px} px take at least {fitting}"
        )

    def restore_tiles(lq: Tensor) -> Tensor:
        height, width = lq.shape[-2:]
        left, right, top, bottom = padding = net.padding(height, width)
        padded = F.pad(lq, padding, mode=net.pad_mode) if any(padding) else lq
        rows, columns = (_tiles(length, side=side, step=step) for length in padded.shape[-2:])
        out = torch.zeros_like(padded)
        for (y, down), (x, across) in product(rows, columns):
            # Uformer's square has tiles that hold nothing of the picture.
            if y + len(down) <= top or y >= top + height or x + len(across) <= left or x >= left + width:
                continue
            where = (..., slice(y, y + len(down)), slice(x, x + len(across)))
            weight = down[:, None] * across
            out[where] += restore(padded[where]) * weight.to(out.device)
        return out[..., top : top + height, left : left + width]

    return restore_tiles


def _tiles(length: int, *, side: int, step: int) -> list[tuple[int, Tensor]]:
    """Where tiles start along an axis, and what each pixel of a tile counts; over all tiles every pixel counts 1.

    Of an overlap, three eighths at the tile's edge count nothing, and over the middle quarter it goes up linearly.
    """
    if length <= side:
        return [(0, torch.ones(length))]
    starts = [*range(0, length - side, step), length - side]
    ramp = ((torch.arange(side) + 0.5) / (side - step) * 4 - 1.5).clamp(0, 1) if side > step else torch.ones(side)
    weights = []
    for start in starts:
        weight = torch.ones(side)
        if start > 0:
            weight = weight * ramp
        if start < length - side:
            weight = weight * ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
    return [(start, w / total[start : start + side]) for start, w in zip(starts, weights, strict=True)]

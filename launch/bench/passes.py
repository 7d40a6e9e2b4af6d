"""One pass of a net over a picture, whole or in tiles, as work for a race."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.config import NetConfig
from dist_train.nets import RestorationNet, build_net
from dist_train.nets.fast import lay_channels_last, prepare_for_inference
from launch.bench.race import Work

MARGIN_PX = 32
"""Read around each tile; a time needs no more, seams are not looked at here."""


class Case(NamedTuple):
    """One thing that is timed."""

    net: NetConfig
    variant: str
    mode: str
    """forward: in eval mode, without gradients. backward: forward and backward, in training mode."""
    height: int
    width: int
    tile_px: int | None
    """Largest side of the tiles that the picture is cut into; None: in one piece."""
    device: str


# A variant takes a net in eval or training mode on its device. `fast` and its kin are for restoring alone.
VARIANTS: dict[str, Callable[[RestorationNet, str], nn.Module]] = {
    "plain": lambda net, device: net,
    "channels_last": lambda net, device: _channels_last(net),
    "fast": lambda net, device: prepare_for_inference(net, device=device),
    "compile": lambda net, device: torch.compile(net),
    "fast_compile": lambda net, device: prepare_for_inference(net, device=device, compile=True),
}


def _channels_last(net: RestorationNet) -> RestorationNet:
    lay_channels_last(net)
    return net


def prepare(case: Case) -> Work:
    """A case as work: the net with random weights, and a picture of noise, both always the same."""
    torch.manual_seed(0)
    net = build_net(case.net)
    awaken(net)
    net.train(case.mode == "backward").to(case.device)
    held = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    restore = VARIANTS[case.variant](net, case.device)
    lq = torch.rand(1, 3, case.height, case.width).to(case.device)

    def forward() -> Tensor:
        with torch.inference_mode():
            return restore_tiles(restore, lq, case.tile_px)

    def backward() -> None:
        for _, _, window in tile_windows(case.height, case.width, case.tile_px):
            restore(lq[window]).square().mean().backward()
        net.zero_grad(set_to_none=True)  # afterwards, so that the next peak counts the gradients

    return Work(forward if case.mode == "forward" else backward, held)


def awaken(net: nn.Module) -> None:
    """Fill what starts at zero or near it, and let batch norms see a picture: else no branch would count."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the running statistics become those of what is seen
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
        net.train()(torch.rand(2, 3, 64, 64))


Window = tuple[Any, ...]


def tile_windows(height: int, width: int, tile_px: int | None) -> Iterator[tuple[Window, Window, Window]]:
    """Cut a picture into tiles: for each, where it lies in the picture, where in its window, and the window.

    Tiles are as even as can be, with sides of at most `tile_px`. A window is the tile and MARGIN_PX around it, moved
    inwards at the border, so that all are of one size.
    """
    if tile_px is None:
        yield (...,), (...,), (...,)
        return
    rows, columns = (-(-side // -(-side // tile_px)) for side in (height, width))  # px of a tile
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        y = max(min(top - MARGIN_PX, height - rows - 2 * MARGIN_PX), 0)
        x = max(min(left - MARGIN_PX, width - columns - 2 * MARGIN_PX), 0)
        tile = (..., slice(top, top + rows), slice(left, left + columns))
        inside = (..., slice(top - y, top - y + rows), slice(left - x, left - x + columns))
        yield tile, inside, (..., slice(y, y + rows + 2 * MARGIN_PX), slice(x, x + columns + 2 * MARGIN_PX))


def restore_tiles(net: nn.Module, lq: Tensor, tile_px: int | None) -> Tensor:
    """Restore tile by tile, without blending: for times and memory, not for pictures to look at."""
    restored = torch.empty_like(lq)
    for tile, inside, window in tile_windows(lq.shape[-2], lq.shape[-1], tile_px):
        restored[tile] = net(lq[window])[inside]
    return restored

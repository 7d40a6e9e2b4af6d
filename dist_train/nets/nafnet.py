"""NAFNet (Chen et al., "Simple Baselines for Image Restoration", 2022), with its test-time local converter (TLC).

Key-compatible with the official checkpoints. Written from the published description; the residual scales beta and gamma
start at zero, so a new net is close to the identity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.stages import (
    AfterStage,
    Padding,
    RestorationNet,
    Stage,
    Trace,
    channels_last_on_cpu,
    next_multiple,
    zero,
)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a map (B,C,h,w), biased variance, eps 1e-6, computed in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel over its channels."""
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


def simple_gate(x: Tensor) -> Tensor:
    """Product of the two halves of the channels: (B,2C,h,w) -> (B,C,h,w)."""
    first, second = x.chunk(2, dim=1)
    return first * second


def local_mean(x: Tensor, box: tuple[int, int]) -> Tensor:
    """Mean over a box of (rows, columns) around each pixel, replicate-padded at the rim (TLC); global if it covers all.

    Sums come from an integral image in float64, whose cost does not grow with the box (384 px at GoPro's full size).
    """
    h, w = x.shape[-2:]
    if not torch.compiler.is_exporting() and box[0] >= h and box[1] >= w:  # what is exported is for any size
        return x.mean((2, 3), keepdim=True)
    rows, cols = torch.sym_min(box[0], h), torch.sym_min(box[1], w)
    total = F.pad(x.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    sums = total[..., rows:, cols:] - total[..., :-rows, cols:] - total[..., rows:, :-cols] + total[..., :-rows, :-cols]
    top, left = (rows - 1) // 2, (cols - 1) // 2
    mean = (sums / (rows * cols)).to(x.dtype)
    return F.pad(mean, (left, cols - 1 - left, top, rows - 1 - top), mode="replicate")


class NafBlock(nn.Module):
    """A gated depthwise mixer with channel attention, then a gated pointwise mixer; both residual, scaled from zero."""

    pool_box: tuple[int, int] | None = None
    """Rows and columns of the features that are pooled around a pixel (TLC); None: all."""

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        # The official file keeps the pooling at index 0 of this Sequential; only its key, sca.1, matters.
        self.sca = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1 = LayerNorm2d(channels)
        self.norm2 = LayerNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        mixed = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        pooled = local_mean(mixed, self.pool_box) if self.pool_box else mixed.mean((2, 3), keepdim=True)
        x = x + self.beta * self.conv3(mixed * self.sca(pooled))
        return x + self.gamma * self.conv5(simple_gate(self.conv4(self.norm2(x))))


class Nafnet(RestorationNet):
    """A U-shape of NAF blocks with a global residual.

    Args:
        width: channels at full resolution; each level down doubles them.
        middle_blk_num, enc_blk_nums, dec_blk_nums: blocks per stage.
        tlc_train_px: side of the training crops, or height and width. If not 0, each block's global pooling becomes a
            mean over a box 1.5 times as large as its training features, as in the official NAFNetLocal; at that size
            both are the same.
        extra_channels: beside RGB in what goes in, (B,3+extra_channels,H,W); the residual is RGB's.
    """

    def __init__(
        self,
        *,
        width: int,
        middle_blk_num: int,
        enc_blk_nums: tuple[int, ...],
        dec_blk_nums: tuple[int, ...],
        tlc_train_px: int | tuple[int, int] = 0,
        extra_channels: int = 0,
    ):
        super().__init__()
        levels = len(enc_blk_nums)
        self.multiple = 2**levels

        def blocks(count: int, level: int) -> nn.Sequential:
            return nn.Sequential(*(NafBlock(width * 2**level) for _ in range(count)))

        self.intro = nn.Conv2d(3 + extra_channels, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(count, level) for level, count in enumerate(enc_blk_nums))
        self.decoders = nn.ModuleList(blocks(count, levels - 1 - i) for i, count in enumerate(dec_blk_nums))
        self.middle_blks = blocks(middle_blk_num, levels)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width * 2**level, width * 2 ** (level + 1), 1, bias=False), nn.PixelShuffle(2))
            for level in range(levels, 0, -1)
        )
        self.downs = nn.ModuleList(
            nn.Conv2d(width * 2**level, width * 2 ** (level + 1), 2, stride=2) for level in range(levels)
        )
        self.stages = (
            *(Stage(f"encoders.{level}", width * 2**level, 2**level) for level in range(levels)),
            Stage("middle_blks", width * 2**levels, 2**levels),
            *(Stage(f"decoders.{i}", width * 2 ** (levels - 1 - i), 2 ** (levels - 1 - i)) for i in range(levels)),
        )
        if tlc_train_px:
            self.pool_locally(tlc_train_px)

    def pool_locally(self, train_px: int | tuple[int, int]) -> None:
        """Pool as `tlc_train_px` says from here on; no weight changes."""
        for stage in self.stages:
            for block in self.get_submodule(stage.name):
                block.pool_box = self._box(train_px, stage.stride.bit_length() - 1)

    def _box(self, train_px: int | tuple[int, int], level: int) -> tuple[int, int]:
        """Rows and columns of TLC's box: 1.5 times the features of a training crop, padded like any picture."""
        height, width = (train_px, train_px) if isinstance(train_px, int) else train_px
        rows, columns = (
            (side + -side % self.multiple) // 2**level * int(1.5 * side) // side for side in (height, width)
        )
        return rows, columns

    def padding(self, height: int, width: int) -> Padding:
        """Zeros on the right and below, up to a multiple of 2**levels."""
        return (0, next_multiple(width, self.multiple) - width, 0, next_multiple(height, self.multiple) - height)

    def start_as_identity(self) -> None:
        """See `RestorationNet.start_as_identity`: nothing is added to the picture."""
        zero(self.ending)

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`."""
        padded = channels_last_on_cpu(padded)
        x = self.intro(padded)
        skips = []
        index = 0
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = after_stage(index, encoder(x))
            skips.append(x)
            x = down(x)
            index += 1
        x = after_stage(index, self.middle_blks(x))
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            index += 1
            x = after_stage(index, decoder(up(x) + skip))
        return self.ending(x) + padded[:, :3]

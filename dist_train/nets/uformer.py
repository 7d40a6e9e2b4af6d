"""Uformer (Wang et al., "Uformer: A General U-Shaped Transformer for Image Restoration", CVPR 2022).

Key-compatible with the official checkpoints (`dowsample_0` is spelt so there); written from the published description.
Inside, features are maps (B,h,w,C); a stage takes and gives (B,C,h,w), which for memory is the same channels-last map.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.stages import AfterStage, Padding, RestorationNet, Stage, Trace, next_multiple, zero


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B,h,w,C) -> (B * windows, side * side, C), windows row by row; h and w are multiples of side."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c)
    return x.transpose(2, 3).reshape(-1, side * side, c)


def from_windows(windows: Tensor, side: int, *, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: -> (B,height,width,C)."""
    x = windows.reshape(-1, height // side, width // side, side, side, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def shift_mask(height: int, width: int, *, side: int, shift: int, device: torch.device) -> Tensor:
    """Added to the attention in shifted windows: -100 between pixels that were not neighbours before the roll.

    Rolling by -shift brings the first rows to the end; a window there holds what was on two opposite borders.

    Returns:
        (windows, side * side, side * side) float32, 0 or -100.
    """
    # The map is cut at -side too, as in the official code; no window reaches over that cut.
    rows, cols = (torch.arange(n, device=device) >= n - shift for n in (height, width))
    region = to_windows((2 * rows[:, None] + cols)[None, :, :, None], side).squeeze(2)
    return -100.0 * (region[:, :, None] != region[:, None, :]).float()


def relative_position_index(side: int) -> Tensor:
    """(side^2, side^2) int64: which row of the bias table is between two pixels, (di + s - 1)(2s - 1) + dj + s - 1."""
    row, col = (torch.arange(side * side) // side, torch.arange(side * side) % side)
    di, dj = row[:, None] - row, col[:, None] - col
    return (di + side - 1) * (2 * side - 1) + dj + side - 1


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: each sample's branch is zero with this probability, and scaled so that its mean stays."""
    if rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * (keep / (1.0 - rate)).to(x.dtype)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, *, num_heads: int, side: int):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(side))
        self.qkv = nn.ModuleDict(
            {"to_q": nn.Linear(channels, channels), "to_kv": nn.Linear(channels, 2 * channels)},
        )
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias + mask) v, projected.

        Args:
            x: (B * windows, pixels, C).
            mask: (windows, pixels, pixels), added; None: 0.
        """
        n = x.shape[0]
        q = self.qkv["to_q"](x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.qkv["to_kv"](x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is None:
            bias = bias.expand(n, -1, -1, -1)
        else:
            bias = (bias + mask[:, None]).repeat(n // mask.shape[0], 1, 1, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class Modulator(nn.Module):
    """Learned offsets, one for each pixel of a window; N(0,1) at first."""

    def __init__(self, pixels: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(pixels, channels))

    def forward(self, windows: Tensor) -> Tensor:
        """(N,pixels,C) -> (N,pixels,C)."""
        return windows + self.weight


class LeFF(nn.Module):
    """Locally-enhanced feed-forward net: linear, depthwise 3x3, linear, with GELU between."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        # Sequentials of one layer more than is named: the official keys are linear1.0, dwconv.0, linear2.0.
        self.linear1 = nn.Sequential(nn.Linear(channels, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B,h,w,C) -> (B,h,w,C)."""
        hidden = self.dwconv(self.linear1(x).permute(0, 3, 1, 2))
        out: Tensor = self.linear2(hidden.permute(0, 2, 3, 1))
        return out


class LeWinBlock(nn.Module):
    """Window attention, then LeFF; both residual, after a layer norm."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        side: int,
        shift: int,
        mlp_ratio: float,
        modulator: bool,
        drop_rate: float,
    ):
        super().__init__()
        self.side = side
        self.shift = shift
        self.drop_rate = drop_rate
        self.modulator = Modulator(side * side, channels) if modulator else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads=num_heads, side=side)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = LeFF(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B,h,w,C) -> (B,h,w,C); `mask` is that of `shift_mask`, used if this block shifts."""
        rate = self.drop_rate if self.training else 0.0
        x = x + drop_path(self.attend(self.norm1(x), mask), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention in windows of the map rolled by `shift`."""
        height, width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = to_windows(x, self.side)
        if self.modulator is not None:
            windows = self.modulator(windows)
        windows = self.attn(windows, mask if self.shift else None)
        x = from_windows(windows, self.side, height=height, width=width)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class LeWinStage(nn.Module):
    """Blocks at one resolution, every second one with shifted windows."""

    def __init__(self, blocks: list[LeWinBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.side = blocks[0].side
        self.shift = max(block.shift for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        mask = None
        if self.shift:
            height, width = x.shape[-2:]
            mask = shift_mask(height, width, side=self.side, shift=self.shift, device=x.device)
        x = x.permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = block(x, mask)
        return x.permute(0, 3, 1, 2)


def keyed(name: str, *layers: nn.Module) -> nn.Sequential:
    """Layers in a row under the keys `<name>.0`, `<name>.1`, ..."""
    return nn.Sequential(OrderedDict({name: nn.Sequential(*layers)}))


class Uformer(RestorationNet):
    """A U-shape of window transformers with a global residual; see `UformerConfig` for the arguments.

    Stages of the decoder are twice as wide as the encoder's at the same resolution: the skip is concatenated.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        win_size: int,
        mlp_ratio: float,
        modulator: bool,
        shift: bool,
        img_size: int,
        drop_path_rate: float,
        square: bool,
    ):
        super().__init__()
        self.square = square
        e = embed_dim
        self.stages = (
            *(Stage(f"encoderlayer_{level}", e * 2**level, 2**level) for level in range(4)),
            Stage("conv", 16 * e, 16),
            *(Stage(f"decoderlayer_{3 - level}", 2 * e * 2**level, 2**level) for level in (3, 2, 1, 0)),
        )
        # Rising to the bottleneck, there the full rate, then falling.
        rates = [
            *torch.linspace(0, drop_path_rate, sum(depths[:4]), device="cpu").tolist(),
            *[drop_path_rate] * depths[4],
            *torch.linspace(drop_path_rate, 0, sum(depths[5:]), device="cpu").tolist(),
        ]

        def stage(index: int) -> LeWinStage:
            resolution = img_size // self.stages[index].stride
            side = min(win_size, resolution)
            shift_px = side // 2 if shift and resolution > win_size else 0
            first = sum(depths[:index])
            return LeWinStage(
                [
                    LeWinBlock(
                        self.stages[index].channels,
                        num_heads=num_heads[index],
                        side=side,
                        shift=shift_px if i % 2 else 0,
                        mlp_ratio=mlp_ratio,
                        modulator=modulator and index > 4,
                        drop_rate=rates[first + i],
                    )
                    for i in range(depths[index])
                ]
            )

        self.input_proj = keyed("proj", nn.Conv2d(3, e, 3, padding=1), nn.LeakyReLU(0.01))
        self.output_proj = keyed("proj", nn.Conv2d(2 * e, 3, 3, padding=1))
        # Registered in the order of the official state dict.
        for level in range(4):
            self.add_module(f"encoderlayer_{level}", stage(level))
            down = nn.Conv2d(e * 2**level, e * 2 ** (level + 1), 4, stride=2, padding=1)
            self.add_module(f"dowsample_{level}", keyed("conv", down))
        self.conv = stage(4)
        for i in range(4):
            up = nn.ConvTranspose2d(self.stages[4 + i].channels, e * 2 ** (3 - i), 2, stride=2)
            self.add_module(f"upsample_{i}", keyed("deconv", up))
            self.add_module(f"decoderlayer_{i}", stage(5 + i))
        stages = [module for module in self.modules() if isinstance(module, LeWinStage)]
        self.multiple = math.lcm(*(s.stride * m.side for s, m in zip(self.stages, stages, strict=True)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def padding(self, height: int, width: int) -> Padding:
        """Zeros around the centred picture, to a square unless `square` is false; an odd pixel goes right or below."""
        fitting_height, fitting_width = (next_multiple(n, self.multiple) for n in (height, width))
        if self.square:
            fitting_height = fitting_width = next_multiple(torch.sym_max(height, width), self.multiple)
        left, top = (fitting_width - width) // 2, (fitting_height - height) // 2
        return (left, fitting_width - width - left, top, fitting_height - height - top)

    def start_as_identity(self) -> None:
        """See `RestorationNet.start_as_identity`: nothing is added to the picture."""
        zero(self.get_submodule("output_proj.proj.0"))

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`."""
        x = self.input_proj(padded)
        skips = []
        for level in range(4):
            x = after_stage(level, self.get_submodule(f"encoderlayer_{level}")(x))
            skips.append(x)
            x = self.get_submodule(f"dowsample_{level}")(x)
        x = after_stage(4, self.conv(x))
        for i in range(4):
            x = torch.cat([self.get_submodule(f"upsample_{i}")(x), skips.pop()], 1)
            x = after_stage(5 + i, self.get_submodule(f"decoderlayer_{i}")(x))
        restored: Tensor = padded + self.output_proj(x)
        return restored

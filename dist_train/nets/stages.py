"""What every restoration net is: stages by which something is put between its building blocks, and one border.

A net states its stages (one per building block, in the order they run) and calls `after_stage(index, features)` when
one is done, going on with what comes back. Nets of tokens hand over maps and take maps back; nets with an image beside
their features (RCDNet) hand over the features alone. So one fusion unit fits every net, and the net's state dict stays
that of the official release, key by key.

The border is the same for all: RGB in [0,1], (B,3,H,W), any H and W. What a net needs inside (a multiple of 16, a
square, 0..255) it makes inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AfterStage = Callable[[int, Tensor], Tensor]
"""(index of the stage, its features (B,C,h,w)) -> features of the same shape that the next stage gets."""

Trace = dict[str, list[Tensor]]
"""Pictures that an unfolding net makes on its way, (B,3,H,W) each, by name; see `dist_train.losses.rcdnet_loss`."""

Padding = tuple[int, int, int, int]
"""Pixels added on the left, right, top and bottom, as `F.pad` takes them."""


class Stage(NamedTuple):
    """One building block: its features are (B, channels, H/stride, W/stride) of the padded picture."""

    name: str
    channels: int
    stride: int


def pass_on(index: int, features: Tensor) -> Tensor:
    """The `AfterStage` that changes nothing."""
    return features


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """Lay pictures, and so the features made of them, out channels last, where that was measured faster.

    Of the nets that call it, training was 1.24 times as fast on a CPU and restoring 1.2 to 1.4 times (before and after,
    in turns, by `launch.bench.race`). EfficientDerain trains slower so, and CUDA was not tried.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():  # who runs the graph chooses its own layout
        return x
    return x.contiguous(memory_format=torch.channels_last)


def next_multiple(n: int, multiple: int) -> int:
    """The smallest multiple that is at least `n`, written so that torch.export sees that it is one, whatever `n` is."""
    return multiple * ((n + multiple - 1) // multiple)


def zero(layer: nn.Conv2d) -> None:
    """Let a convolution give nothing at first; its weights still learn."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class RestorationNet(nn.Module):
    """Base of the nets: pads, restores, cuts out. A net gives `stages`, `padding` and `restore`."""

    stages: tuple[Stage, ...]
    pad_mode = "constant"
    """How `padding` is filled; of `F.pad`."""
    multiple = 1
    """What sides are multiples of once padded; a part cut out along this grid meets windows and strides as the whole
    does."""

    def padding(self, height: int, width: int) -> Padding:
        """What is added around a picture of this size before it goes through."""
        return (0, 0, 0, 0)

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """Restore pictures whose size fits.

        Args:
            padded: (B,3,H,W) float RGB in [0,1].
            after_stage: to be called after each stage, in the order of `stages`.
            trace: to be filled, by nets that make several pictures; None if nobody asks.

        Returns:
            (B,3,H,W), not clamped.
        """
        raise NotImplementedError

    def start_as_identity(self) -> None:
        """Set the last weights so that pictures come out as they went in, until training changes that.

        Raises:
            ValueError: this net has no such weights.
        """
        raise ValueError(
            "teacher.start=identity is for nets that can begin so: nafnet, uformer and efficientderain; set it to drawn"
        )

    def forward(self, lq: Tensor, after_stage: AfterStage | None = None, trace: Trace | None = None) -> Tensor:
        """Restore a batch of any size.

        Args:
            lq: (B,3,H,W) float RGB in [0,1].
            after_stage: called after each stage.
            trace: filled by nets that make several pictures on their way.

        Returns:
            (B,3,H,W), not clamped.
        """
        height, width = lq.shape[-2:]
        left, right, top, bottom = padding = self.padding(height, width)
        # What is exported pads always: whether this size needs it is a question that a graph for all sizes cannot ask.
        pads = torch.compiler.is_exporting() or any(padding)
        padded = F.pad(lq, padding, mode=self.pad_mode) if pads else lq
        restored = self.restore(padded, after_stage or pass_on, trace)
        return restored[..., top : top + height, left : left + width]

"""The stage protocol: how something is put between the building blocks of a restoration net without touching the net.

A net states its stages (one per building block, in the order they run) and calls `after_stage(index, features)` when
one is done, going on with what comes back. Nets of tokens hand over maps and take maps back; nets with an image beside
their features (RCDNet) hand over the features alone. So one fusion unit fits every net, and the net's state dict stays
that of the official release, key by key.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

AfterStage = Callable[[int, Tensor], Tensor]
"""(index of the stage, its features (B,C,h,w)) -> features of the same shape that the next stage gets."""


class Stage(NamedTuple):
    """One building block: its features are (B, channels, ceil(H/stride), ceil(W/stride)) of the padded picture."""

    name: str
    channels: int
    stride: int

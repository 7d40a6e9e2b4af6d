"""The two resizes around SAM as sums over a few taps per axis: of pictures on their way in, of logits on their way out.

Both are made for one size of picture, on the host and once; used, they read fixed places and cause no synchronisation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_PIL_BITS = 22  # of the fraction in Pillow's 8-bit resize


class Taps(NamedTuple):
    """Resize of one axis from n to m: what comes out at j is the sum over t of `weight[t, j] * x[index[t, j]]`."""

    index: Tensor  # (t,m) int64
    weight: Tensor  # (t,m)

    def to(self, device: torch.device) -> "Taps":
        """The same on another device."""
        return Taps(self.index.to(device), self.weight.to(device))


def resample(x: Tensor, taps: Taps, dim: int) -> Tensor:
    """Resize the axis `dim`, -1 or -2, of x."""
    weight = taps.weight if dim == -1 else taps.weight[:, :, None]
    (first, *rest), (w, *weights) = taps.index, weight
    out = x.index_select(dim, first).mul_(w)
    for index, w in zip(rest, weights, strict=True):
        out.addcmul_(w, x.index_select(dim, index))
    return out


def picture_taps(size: int, new: int) -> Taps:
    """Pillow's 8-bit bilinear resize of one axis, a triangle as wide as a pixel of the larger side; int32 weights.

    `resample_u8` uses them. segment_anything resizes pictures so.
    """
    scale = size / new
    radius = max(scale, 1.0)
    rows = []
    for j in range(new):
        centre = (j + 0.5) * scale
        first, last = max(int(centre - radius + 0.5), 0), min(int(centre + radius + 0.5), size)
        triangle = [max(1.0 - abs((i - centre + 0.5) * (1.0 / radius)), 0.0) for i in range(first, last)]
        total = sum(triangle)
        rows.append((first, [int(0.5 + w / total * 2**_PIL_BITS) for w in triangle]))
    return _taps(rows, size, torch.int32)


def resample_u8(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Pillow's resize of 8-bit pictures, to the bit: columns first, each axis rounded half up to 8 bits.

    Args:
        x: (...,H,W) int32, 0..255.
        rows: of `picture_taps`.
        columns: likewise.
    """
    for taps, dim in ((columns, -1), (rows, -2)):
        x = resample(x, taps, dim)
        x += 2 ** (_PIL_BITS - 1)
        x >>= _PIL_BITS
    return x


def logit_taps(side: int, canvas: int, used: int, new: int) -> Taps:
    """One axis of `Sam.postprocess_masks`: bilinear to the canvas, cut to the part in use, bilinear to the picture.

    From 256 logits over a canvas of 1024 to 256 pixels it is [1, 14, 1] / 16. The canvas is never made.

    Args:
        side: logits along the axis.
        canvas: pixels of SAM's input along the axis.
        used: how many of them the picture takes.
        new: pixels of the picture.
    """
    # What the reference's own operations make of each single logit, weights rounded as they round them.
    grown = F.interpolate(torch.eye(side)[None], canvas, mode="linear")[..., :used]
    response = F.interpolate(grown, new, mode="linear")[0]  # (side,new)
    rows = []
    for column in response.T:
        places = column.nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        rows.append((first, column[first : last + 1].tolist()))
    return _taps(rows, side, torch.float32)


def _taps(rows: Sequence[tuple[int, Sequence[float]]], size: int, dtype: torch.dtype) -> Taps:
    """From (first index, weights) of each output, which may be of different lengths."""
    longest = max(len(weights) for _, weights in rows)
    weight = torch.zeros(longest, len(rows), dtype=dtype)
    for j, (_, weights) in enumerate(rows):
        weight[: len(weights), j] = torch.tensor(weights, dtype=dtype)
    first = torch.tensor([first for first, _ in rows])
    return Taps((first + torch.arange(longest)[:, None]).clamp(max=size - 1), weight)

"""The filters of segment_anything's automatic mode as reductions with fixed shapes; nothing waits for the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Measures(NamedTuple):
    """What the filters need to know of masks.

    Attributes:
        stability: float32 in [0,1], the IoU of the masks at a higher and a lower threshold; NaN where both are empty.
        boxes: (...,4) float32, x and y of the first and of the last pixel; zeros where a mask is empty.
        filled: bool, whether a mask is not empty.
    """

    stability: Tensor
    boxes: Tensor
    filled: Tensor


def measure(logits: Tensor, *, threshold: float, offset: float) -> Measures:
    """Stability score, bounding box and emptiness of the masks `logits > threshold`: (...,H,W) -> (...).

    Args:
        logits: float32, at the size of the picture.
        threshold: of the mask.
        offset: how far the two thresholds of the stability score lie from it.
    """
    sure = (logits > threshold + offset).sum((-2, -1))
    possible = (logits > threshold - offset).sum((-2, -1))
    in_column, in_row = logits.amax(-2) > threshold, logits.amax(-1) > threshold
    (left, right), (top, bottom) = _ends(in_column), _ends(in_row)
    filled = in_row.any(-1)
    boxes = torch.stack([left, top, right, bottom], -1) * filled[..., None]
    return Measures(sure / possible, boxes.float(), filled)


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first and of the last true: (...,n) -> (...), (...)."""
    size = inside.shape[-1]
    index = torch.arange(size, device=inside.device)
    return torch.where(inside, index, size).amin(-1), torch.where(inside, index, -1).amax(-1)


def suppress(boxes: Tensor, valid: Tensor, *, iou_threshold: float, rounds: int) -> Tensor:
    """Greedy non-maximum suppression, as `torchvision.ops.nms` does it, of a batch without a loop over boxes.

    A box is kept if no box that is kept, better than itself, overlaps it by more than the threshold. Applied again and
    again, beginning with all, that sentence settles at least one more link in each chain of overlaps per round, so
    `rounds` must be as long as the longest chain in which each box decides on the next; on pictures it is below 10.
    After an odd number of rounds a longer chain loses boxes, but no two that overlap are ever both kept.

    Args:
        boxes: (B,N,4) float32 x1, y1, x2, y2, the best first.
        valid: (B,N) bool; the others are never kept and suppress nothing.
        iou_threshold: above it the worse of two goes.
        rounds: odd.

    Returns:
        (B,N) bool.
    """
    assert rounds % 2 == 1
    left, top, right, bottom = boxes.unbind(-1)
    area = (right - left) * (bottom - top)
    shared = _shared(left, right).mul_(_shared(top, bottom))  # (B,N,N), 4 MB each of 1024 boxes
    ratio = shared / (area[:, :, None] + area[:, None]).sub_(shared)
    # [better, worse]; in float64, where 4/5 is above 0.8, as there
    overlaps = (ratio.double() > iou_threshold).triu_(1)
    keep = valid
    for _ in range(rounds):
        keep = valid & ~(overlaps & keep[:, :, None]).any(1)
    return keep


def _shared(first: Tensor, last: Tensor) -> Tensor:
    """How far each two of some intervals overlap: (B,N), (B,N) -> (B,N,N)."""
    until = torch.minimum(last[:, :, None], last[:, None])
    return until.sub_(torch.maximum(first[:, :, None], first[:, None])).clamp_(min=0)


def choose(
    scores: Tensor, boxes: Tensor, valid: Tensor, *, iou_threshold: float, candidates: int, rounds: int, num_masks: int
) -> tuple[Tensor, Tensor]:
    """The masks that non-maximum suppression leaves, the best first.

    Args:
        scores: (B,N) by which is better; of equal ones the first is.
        boxes: (B,N,4).
        valid: (B,N) bool, what takes part.
        iou_threshold: see `suppress`.
        candidates: how many of the best take part, which bounds the memory. The result is that of all unless fewer than
            `num_masks` of these are left.
        rounds: see `suppress`.
        num_masks: K; more than that are dropped, the worst first.

    Returns:
        Their indices (B,K) into N, and (B,K) bool, whether there are so many.
    """
    order = scores.masked_fill(~valid, -math.inf).sort(descending=True, stable=True).indices
    order = order[:, : max(candidates, num_masks)]
    keep = suppress(
        boxes.gather(1, order[:, :, None].expand(-1, -1, 4)),
        valid.gather(1, order),
        iou_threshold=iou_threshold,
        rounds=rounds,
    )
    first = (~keep).byte().sort(stable=True).indices[:, :num_masks]
    index, found = order.gather(1, first), keep.gather(1, first)
    missing = num_masks - index.shape[1]
    return F.pad(index, (0, missing)), F.pad(found, (0, missing))

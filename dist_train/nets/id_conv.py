"""A 3x3 convolution over the one-hot maps of a map of ids, as look-ups.

Of K one-hot maps at most one is 1 at a pixel, so each of the nine taps picks one column of its (out,K) weights:

    y(p) = sum over taps t of W_t[:, id(p + t)]

That is nine rows to add per pixel, whatever K is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def one_hot(ids: Tensor, num_ids: int) -> Tensor:
    """The maps that a map of ids stands for: (B,H,W) of 0..num_ids to (B,num_ids,H,W) float32; 0 is in none."""
    return (ids[:, None] == torch.arange(1, num_ids + 1, device=ids.device)[:, None, None]).float()


def conv_ids(ids: Tensor, weight: Tensor) -> Tensor:
    """What `F.conv2d(one_hot(ids, K), weight, padding=1)` gives.

    Args:
        ids: (B,H,W) int64, 0..K; 0 is in no map, as the border is.
        weight: (out,K,3,3); it has a gradient, of first order.

    Returns:
        (B,out,H,W), of the weight's dtype.
    """
    return _ConvIds.apply(ids, weight)


def _taps(ids: Tensor) -> Tensor:
    """(B,H,W) -> (B,H,W,9), the ids around each pixel in the order of a kernel's weights."""
    return F.pad(ids, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)


class _ConvIds(torch.autograd.Function):
    """An embedding bag; its own backward, which sorts nine ids per pixel, takes twice as long as the one here."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_ids = weight.shape[1]
        tables = F.pad(weight.flatten(2).permute(2, 1, 0), (0, 0, 1, 0))  # (9,1+K,out), zeros for id 0
        rows = _taps(ids) + torch.arange(9, device=ids.device) * tables.shape[1]
        out = F.embedding_bag(rows.flatten(0, 2), tables.flatten(0, 1), mode="sum")
        return out.view(*ids.shape, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows = grad.permute(0, 2, 3, 1).contiguous().flatten(0, 2)  # (BHW,out); strided rows take four times as long
        tables = [rows.new_zeros(1 + ctx.num_ids, rows.shape[1]) for _ in range(9)]
        for table, tap in zip(tables, _taps(ids).unbind(3), strict=True):
            table.index_add_(0, tap.flatten(), rows)
        return None, torch.stack(tables)[:, 1:].permute(2, 1, 0).unflatten(2, (3, 3))

"""The attention of SAM's ViT image encoder without its N x N matrices, on segment_anything's own modules."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def use_fused_attention(encoder: Any) -> None:
    """Let a `segment_anything.modeling.ImageEncoderViT` attend by `attend`, in place; its state dict stays as it is."""
    for block in encoder.blocks:
        block.attn.forward = functools.partial(attend, block.attn)


def attend(attention: Any, x: Tensor) -> Tensor:
    """What segment_anything's `Attention` of the image encoder gives, by a fused kernel.

    Its relative positions add `q . R_row[i, i'] + q . R_column[j, j']` to the score of pixels (i, j) and (i', j').
    That is a scalar product too: of q's products with all rows and all columns, and of two ones in a vector of zeros,
    at i' and j'. So the positions are h + w more channels of the queries and keys, and no bias is made; at 64 x 64
    pixels it would have 16.8 million entries a head. Fused kernels want values as wide as keys: they are padded.

    Args:
        attention: the module whose weights are used.
        x: (B,h,w,C).
    """
    _, height, width, _ = x.shape
    queries, keys, values = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).movedim((3, 4), (0, 2))
    queries_2d = queries * attention.scale  # (B,heads,h,w,d)
    if not attention.use_rel_pos:
        found = F.scaled_dot_product_attention(*(y.flatten(2, 3) for y in (queries_2d, keys, values)), scale=1.0)
    else:
        by_row = torch.einsum("bnhwc,hkc->bnhwk", queries, _relative(attention.rel_pos_h, height))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", queries, _relative(attention.rel_pos_w, width))
        rows = torch.eye(height, dtype=keys.dtype, device=x.device)[:, None].expand(-1, width, -1)
        columns = torch.eye(width, dtype=keys.dtype, device=x.device).expand(height, -1, -1)
        ones = torch.cat([rows, columns], -1).expand(*keys.shape[:2], -1, -1, -1)
        found = F.scaled_dot_product_attention(
            torch.cat([queries_2d, by_row, by_column], -1).flatten(2, 3),
            torch.cat([keys, ones], -1).flatten(2, 3),
            F.pad(values, (0, height + width)).flatten(2, 3),
            scale=1.0,
        )
    found = found[..., : values.shape[-1]].unflatten(2, (height, width))
    return attention.proj(found.movedim(1, 3).flatten(3))


def _relative(table: Tensor, size: int) -> Tensor:
    """Entries of a table of distances for each pair of places, (L,d) -> (size,size,d); stretched if L does not fit."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]

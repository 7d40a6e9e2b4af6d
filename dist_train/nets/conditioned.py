"""Nets that take masks beside the picture (SAM-Deblur, Li et al. 2023), key-compatible with the official checkpoints.

CAT needs nothing of its own: it is a `Nafnet` with `extra_channels=1`, the masks in one grey picture. MAP, the paper's
mask average pooling, gives each mask the mean of a small encoder's features, and the rest of the picture theirs:

    a_k = sum(E m_k) / sum(m_k);  rest = 1 - min(sum_k m_k, 1);  MAP = sum_k a_k m_k + a_rest rest
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_train.nets.nafnet import Nafnet
from dist_train.nets.stages import AfterStage, Trace


def mask_average(features: Tensor, masks: Tensor) -> Tensor:
    """Mask average pooling: every pixel gets the mean features of its mask; overlapping masks add up.

    Computed in float32 whatever autocast says, since areas of a picture are summed.

    Args:
        features: (B,S,H,W).
        masks: (B,K,H,W), float or bool; rows of zeros change nothing. The official code's data carry 1 or, through a
            division too many, 1/255, which leaves little but the mean of the whole picture.

    Returns:
        (B,S,H,W) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        regions = masks.float()
        regions = torch.cat([regions, 1 - regions.sum(1, keepdim=True).clamp(0, 1)], 1).flatten(2)
        sums = features.float().flatten(2) @ regions.mT  # (B,S,K+1)
        means = sums / (regions.sum(2)[:, None] + 1e-8)
        return (means @ regions).view(features.shape)


def drop_masks(masks: Tensor, valid: Tensor, *, order: Tensor, fraction: float) -> Tensor:
    """Mask dropout (training): of the M valid masks of a picture exactly int(fraction * M) are zeroed.

    Their pixels then belong to the rest of the picture.

    Args:
        masks: (B,K,H,W).
        valid: (B,K) bool.
        order: (B,K) int64, a permutation of 0..K-1 per picture; the first valid ones in it are dropped.
        fraction: 0.5 in the paper's model, 0 in its MAP without dropout.

    Returns:
        (B,K,H,W), a copy.
    """
    num_dropped = (valid.sum(1, keepdim=True).double() * fraction).long()
    in_order = valid.gather(1, order)
    first = in_order & (in_order.cumsum(1) <= num_dropped)
    dropped = torch.zeros_like(valid).scatter(1, order, first)
    return masks * ~dropped[..., None, None]


class SegNafnet(Nafnet):
    """NAFNet that sees the picture and its MAP; with masks dropped in training it is SAM-Deblur.

    Args:
        extra_channels: S, channels of the MAP; 2 in the published files.
        nafnet: the other arguments of `Nafnet`.
    """

    def __init__(self, *, extra_channels: int, **nafnet: Any):
        super().__init__(extra_channels=extra_channels, **nafnet)
        behind = list(self.named_children())  # in the official files the encoder of the MAP comes first
        for name, _ in behind:
            delattr(self, name)
        self.pre_seg = nn.Conv2d(3, extra_channels, 3, padding=1)
        self.pre_seg_in = nn.Conv2d(extra_channels, extra_channels, 1)
        for name, module in behind:
            setattr(self, name, module)

    def forward(  # type: ignore[override]
        self, lq: Tensor, masks: Tensor, after_stage: AfterStage | None = None, trace: Trace | None = None
    ) -> Tensor:
        """Restore a batch with its masks.

        Args:
            lq: (B,3,H,W) float RGB in [0,1].
            masks: (B,K,H,W), see `mask_average`.
            after_stage, trace: see `RestorationNet.forward`.

        Returns:
            (B,3,H,W), not clamped.
        """
        return super().forward(torch.cat([lq, masks.to(lq.dtype)], 1), after_stage, trace)

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`; the masks, padded alike, follow the picture's three channels."""
        image, masks = padded[:, :3], padded[:, 3:]
        pooled = mask_average(self.pre_seg_in(self.pre_seg(image)), masks)
        return super().restore(torch.cat([image, pooled], 1), after_stage, trace)

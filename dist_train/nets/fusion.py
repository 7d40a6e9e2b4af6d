"""The teacher: a restoration net that sees the masks through semantic priors fusion (SPF) units (paper, Eq. 3, Fig. 3).

The figure leaves details open. What is built: unit i takes the features F_i of stage i and the output of the unit
before it, F_(i-1)^SPF (the first one: the masks, F_0^SPF = P). Both are concatenated; two blocks of 3x3 convolution,
instance norm and GELU follow; then squeeze attention (mean over the picture, FC, GELU, FC, sigmoid) gates each channel.
The net goes on with F_i + W[F_i, F_i^SPF], where W is a 1x1 convolution that starts at zero: the paper concatenates,
the 1x1 brings the channels back to what the next block takes, and starting at zero makes a new teacher equal to its
plain net.

What P is made of the masks is open too: see `encode`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.conditioned import mask_average
from dist_train.nets.id_conv import conv_ids, one_hot
from dist_train.nets.stages import RestorationNet, Trace
from dist_train.priors.masks import MaskSet

Encoding = Literal["stack", "idmap", "pooled"]


def encode(masks: MaskSet, image: Tensor, encoding: Encoding) -> Tensor:
    """F_0^SPF, the prior P as the first unit takes it.

    Args:
        masks: of the pictures, K each.
        image: (B,3,H,W), what the teacher restores.
        encoding: see `SpfConfig`.

    Returns:
        stack: (B,K,H,W), one map per mask. idmap: (B,H,W) int64, 0..K, which stands for K one-hot maps. pooled:
        (B,3,H,W), see `mask_average`; no encoder before it, since SAM-Deblur's is linear: but for the masks' borders
        its means are what the unit's own first convolution can make of the means of the picture.
    """
    if encoding == "idmap":
        return masks.idmap()
    if encoding == "pooled":
        return mask_average(image, masks.masks & masks.valid[:, :, None, None]).to(image.dtype)
    return masks.resize(*image.shape[-2:]).to(image.dtype)


class SqueezeAttention(nn.Module):
    """One gate in (0,1) per channel from the channel means: GAP - FC - GELU - FC - sigmoid."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // 2, 4))
        self.expand = nn.Linear(max(channels // 2, 4), channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,1,1)."""
        gate = torch.sigmoid(self.expand(F.gelu(self.squeeze(x.mean((2, 3))))))
        return gate[:, :, None, None]


class JointConv(nn.Conv2d):
    """The 3x3 convolution over features and prior side by side, as the sum of one over each.

    So nothing is copied, and a prior that needs no gradient, as the masks, is not given one.
    """

    def __init__(self, channels: int, prior_channels: int, out_channels: int):
        # No bias: the norm that follows takes any constant away.
        super().__init__(channels + prior_channels, out_channels, 3, padding=1, bias=False)
        self.parts = (channels, prior_channels)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Features (B,C,h,w) and prior, see `SpfUnit.forward`, to (B,out_channels,h,w)."""
        features, prior = inputs
        of_features, of_prior = self.weight.split(self.parts, 1)
        mixed = F.conv2d(features, of_features, padding=1)
        size = features.shape[-2:]
        if not prior.is_floating_point():
            if prior.shape[-2:] == size and not prior.is_cuda:
                return mixed + conv_ids(prior, of_prior).to(mixed.dtype)
            # Ids cannot be averaged, and at stride 2 a dense convolution already costs four times less. Nor are
            # gathers, and sums of many rows into few, what a GPU is good at.
            prior = one_hot(prior, self.parts[1])
        return mixed + F.conv2d(resize_map(prior, size).to(features.dtype), of_prior, padding=1)


class SpfUnit(nn.Module):
    """Semantic priors fusion after one stage (Eq. 3).

    Args:
        channels: of the stage's features.
        prior_channels: of what comes from the unit before, or of F_0^SPF (see `encode`).
        max_channels: limit on the unit's own width, which is otherwise the stage's.
    """

    def __init__(self, channels: int, prior_channels: int, *, max_channels: int):
        super().__init__()
        self.out_channels = min(channels, max_channels)
        self.mix = nn.Sequential(
            JointConv(channels, prior_channels, self.out_channels),
            nn.InstanceNorm2d(self.out_channels, affine=True),
            nn.GELU(),
            nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1, bias=False),
            nn.InstanceNorm2d(self.out_channels, affine=True),
            nn.GELU(),
        )
        self.attention = SqueezeAttention(self.out_channels)
        self.fuse = nn.Conv2d(channels + self.out_channels, channels, 1)
        nn.init.zeros_(self.fuse.weight)
        assert self.fuse.bias is not None
        nn.init.zeros_(self.fuse.bias)

    def forward(self, features: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: (B,C,h,w) of the stage.
            prior: (B,P,h',w'), resized here to h x w: area-averaged if it shrinks, bilinear if it grows; or
                (B,h',w') int64 of 0..P, which stands for P one-hot maps.

        Returns:
            What the next stage gets, (B,C,h,w), and F_i^SPF, (B,out_channels,h,w).
        """
        mixed = self.mix((features, prior))
        mixed = mixed * self.attention(mixed)
        return features + self.fuse(torch.cat([features, mixed], 1)), mixed


def resize_map(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Resize (B,C,h,w) maps: mean over areas if they shrink, bilinear if they grow, untouched if they fit."""
    height, width = size
    if x.shape[-2:] == (height, width):
        return x
    if height <= x.shape[-2] and width <= x.shape[-1]:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


class Teacher(nn.Module):
    """A restoration net and one SPF unit after every n-th of its stages.

    Args:
        net: any net of `NETS`; its own state dict is untouched.
        num_masks: K of the prior; 0: no units, the plain net.
        every: 1 puts a unit after each stage.
        max_channels: see `SpfUnit`.
        encoding: see `encode`.
    """

    def __init__(
        self, net: RestorationNet, *, num_masks: int, every: int, max_channels: int, encoding: Encoding = "stack"
    ):
        super().__init__()
        self.net = net
        self.encoding = encoding
        stages = net.stages
        self.units = nn.ModuleDict()
        prior_channels = 3 if encoding == "pooled" else num_masks
        for index in range(0, len(stages) if num_masks else 0, every):
            unit = SpfUnit(stages[index].channels, prior_channels, max_channels=max_channels)
            self.units[str(index)] = unit
            prior_channels = unit.out_channels

    def forward(self, image: Tensor, masks: MaskSet, trace: Trace | None = None) -> Tensor:
        """Restore with the masks in view.

        Args:
            image: (B,3,H,W) float RGB in [0,1]; in the cascade, the student's output.
            masks: K must be `num_masks`.
            trace: see `RestorationNet.forward`.

        Returns:
            (B,3,H,W), not clamped.
        """
        if not self.units:
            return self.net(image, None, trace)
        height, width = image.shape[-2:]
        # Padded as the net pads the image, so that the masks lie on its features pixel by pixel.
        prior = F.pad(encode(masks, image, self.encoding), self.net.padding(height, width))

        def after_stage(index: int, features: Tensor) -> Tensor:
            nonlocal prior
            if str(index) not in self.units:
                return features
            features, prior = self.units[str(index)](features, prior)
            return features

        return self.net(image, after_stage, trace)

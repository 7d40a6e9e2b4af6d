"""The teacher: a restoration net that sees the masks through semantic priors fusion (SPF) units (paper, Eq. 3, Fig. 3).

The figure leaves details open. What is built: unit i takes the features F_i of stage i and the output of the unit
before it, F_(i-1)^SPF (the first one: the masks, F_0^SPF = P). Both are concatenated; two blocks of 3x3 convolution,
instance norm and GELU follow; then squeeze attention (mean over the picture, FC, GELU, FC, sigmoid) gates each channel.
The net goes on with F_i + W[F_i, F_i^SPF], where W is a 1x1 convolution that starts at zero: the paper concatenates,
the 1x1 brings the channels back to what the next block takes, and starting at zero makes a new teacher equal to its
plain net.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.stages import RestorationNet, Trace
from dist_train.priors.masks import MaskSet


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


class SpfUnit(nn.Module):
    """Semantic priors fusion after one stage (Eq. 3).

    Args:
        channels: of the stage's features.
        prior_channels: of what comes from the unit before, or the number of masks.
        max_channels: limit on the unit's own width, which is otherwise the stage's.
    """

    def __init__(self, channels: int, prior_channels: int, *, max_channels: int):
        super().__init__()
        self.out_channels = min(channels, max_channels)
        self.mix = nn.Sequential(
            # No biases: the norm that follows takes any constant away.
            nn.Conv2d(channels + prior_channels, self.out_channels, 3, padding=1, bias=False),
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
            prior: (B,P,h',w'), resized here to h x w: area-averaged if it shrinks, bilinear if it grows.

        Returns:
            What the next stage gets, (B,C,h,w), and F_i^SPF, (B,out_channels,h,w).
        """
        prior = resize_map(prior, features.shape[-2:]).to(features.dtype)
        mixed = self.mix(torch.cat([features, prior], 1))
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
        num_masks: K of the prior.
        every: 1 puts a unit after each stage.
        max_channels: see `SpfUnit`.
    """

    def __init__(self, net: RestorationNet, *, num_masks: int, every: int, max_channels: int):
        super().__init__()
        self.net = net
        stages = net.stages
        self.units = nn.ModuleDict()
        prior_channels = num_masks
        for index in range(0, len(stages), every):
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
        height, width = image.shape[-2:]
        # Padded as the net pads the image, so that the masks lie on its features pixel by pixel.
        prior = F.pad(masks.resize(height, width).to(image.dtype), self.net.padding(height, width))  # F_0^SPF = P

        def after_stage(index: int, features: Tensor) -> Tensor:
            nonlocal prior
            if str(index) not in self.units:
                return features
            features, prior = self.units[str(index)](features, prior)
            return features

        return self.net(image, after_stage, trace)

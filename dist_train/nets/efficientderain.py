"""EfficientDerain (Guo et al., "EfficientDeRain", AAAI 2021): a U-shape predicts each pixel's own filters.

Key-compatible with the official checkpoints; written from the published description. The 27 (3 colours x 9 taps) filter
weights of a pixel are applied at four dilations, and a 3x3 convolution fuses the four pictures. There is no residual.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.stages import AfterStage, Padding, RestorationNet, Stage, Trace, next_multiple, zero

DILATIONS = (1, 2, 3, 4)
MULTIPLE = 16
"""Sides are halved four times."""


class ConvTriple(nn.Module):
    """Three 3x3 convolutions, each with a ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h,w)."""
        features: Tensor = self.conv1(x)
        return features


def apply_kernels(image: Tensor, kernels: Tensor, *, dilation: int) -> Tensor:
    """Filter every pixel and colour by its own kernel, zeros beyond the border.

    out[c](y, x) = sum over taps (i, j) of kernels[c, K i + j](y, x) * image[c](y + (i - K//2) r, x + (j - K//2) r)

    One tap at a time on shifted views: no K*K times larger copy of the image is made.

    Args:
        image: (B,C,H,W).
        kernels: (B,C,K*K,H,W), K odd.
        dilation: r, px between taps.

    Returns:
        (B,C,H,W).
    """
    height, width = image.shape[-2:]
    side = round(kernels.shape[2] ** 0.5)
    rim = side // 2 * dilation
    framed = F.pad(image, (rim, rim, rim, rim))
    out = torch.zeros_like(image)
    # unbind, not indexing: its gradient is one stack, where each index would make a zero tensor of the kernels' size.
    for tap, weight in enumerate(kernels.unbind(2)):
        top, left = tap // side * dilation, tap % side * dilation
        out = torch.addcmul(out, weight, framed[..., top : top + height, left : left + width])
    return out


def upsample(x: Tensor) -> Tensor:
    """Twice the sides, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class EfficientDerain(RestorationNet):
    """Predict kernels, apply them at four dilations, fuse.

    Args:
        kernel_px: side of the predicted kernels, odd.
        base_width: channels at full resolution.
        fit: `pad` (replicated, at the right and below) or `resize` (bilinear, there and back) to multiples of 16.
    """

    pad_mode = "replicate"
    multiple = MULTIPLE

    def __init__(self, *, kernel_px: int, base_width: int, fit: str):
        super().__init__()
        w = base_width
        taps = 3 * kernel_px**2
        self.fit = fit
        self.conv1 = ConvTriple(3, w)
        self.conv2 = ConvTriple(w, 2 * w)
        self.conv3 = ConvTriple(2 * w, 4 * w)
        self.conv4 = ConvTriple(4 * w, 8 * w)
        self.conv5 = ConvTriple(8 * w, 8 * w)
        self.conv6 = ConvTriple(8 * w + 8 * w, 8 * w)
        self.conv7 = ConvTriple(4 * w + 8 * w, 4 * w)
        self.conv8 = ConvTriple(2 * w + 4 * w, taps)
        self.outc = nn.Conv2d(taps, taps, 1)
        self.conv_final = nn.Conv2d(3 * len(DILATIONS), 3, 3, padding=1)
        # conv8 is no stage: its channels are the kernels themselves.
        self.stages = (
            Stage("conv1", w, 1),
            Stage("conv2", 2 * w, 2),
            Stage("conv3", 4 * w, 4),
            Stage("conv4", 8 * w, 8),
            Stage("conv5", 8 * w, 16),
            Stage("conv6", 8 * w, 8),
            Stage("conv7", 4 * w, 4),
        )
        # Biases stay as the convolutions draw them: with zeros, 24 layers at this gain would let nothing through.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=0.02)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """See `RestorationNet.start_as_identity`: each kernel is its middle tap, and the fusion a mean."""
        zero(self.outc)
        zero(self.conv_final)
        assert self.outc.bias is not None
        kernels = self.outc.bias.view(3, -1)
        kernels[:, kernels.shape[1] // 2] = 1
        for i in range(len(DILATIONS)):
            self.conv_final.weight[:, 3 * i : 3 * i + 3, 1, 1] = torch.eye(3) / len(DILATIONS)

    def padding(self, height: int, width: int) -> Padding:
        """On the right and below, up to multiples of 16; nothing if the picture is resized."""
        if self.fit == "resize":
            return (0, 0, 0, 0)
        return (0, next_multiple(width, MULTIPLE) - width, 0, next_multiple(height, MULTIPLE) - height)

    def predict_kernels(self, image: Tensor, after_stage: AfterStage) -> Tensor:
        """(B,3,H,W), sides multiples of 16 -> (B,3,K*K,H,W)."""
        x1 = after_stage(0, self.conv1(image))
        x2 = after_stage(1, self.conv2(F.avg_pool2d(x1, 2)))
        x3 = after_stage(2, self.conv3(F.avg_pool2d(x2, 2)))
        x4 = after_stage(3, self.conv4(F.avg_pool2d(x3, 2)))
        x5 = after_stage(4, self.conv5(F.avg_pool2d(x4, 2)))
        x6 = after_stage(5, self.conv6(torch.cat([x4, upsample(x5)], 1)))
        x7 = after_stage(6, self.conv7(torch.cat([x3, upsample(x6)], 1)))
        x8 = self.conv8(torch.cat([x2, upsample(x7)], 1))
        kernels: Tensor = self.outc(upsample(x8))
        return kernels.unflatten(1, (3, -1))

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`; with fit=resize, of any size."""
        height, width = padded.shape[-2:]
        fitting = (next_multiple(height, MULTIPLE), next_multiple(width, MULTIPLE))
        image = padded
        if self.fit == "resize":
            image = F.interpolate(padded, fitting, mode="bilinear", align_corners=False)
        # Under autocast the kernels come in half precision, the image does not.
        kernels = self.predict_kernels(image, after_stage).to(image.dtype)
        filtered = [apply_kernels(image, kernels, dilation=dilation) for dilation in DILATIONS]
        restored: Tensor = self.conv_final(torch.cat(filtered, 1))
        if self.fit == "resize":
            restored = F.interpolate(restored, (height, width), mode="bilinear", align_corners=False)
        return restored

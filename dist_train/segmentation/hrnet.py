"""HRNetV2 (Wang et al., TPAMI 2020, arXiv 1908.07919): timm's backbone under the segmentation head of its paper."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.priors.vgg import IMAGENET_MEAN, IMAGENET_STD

WIDTHS = (18, 30, 32, 40, 44, 48, 64)
"""Of timm's `hrnet_w*`; the paper's Cityscapes nets are W40 and W48."""
MULTIPLE = 32


class HrNet(nn.Module):
    """HRNetV2; its state dict has the keys of HRNet-Semantic-Segmentation's `seg_hrnet`.

    timm's backbone is ImageNet's, where what is fused grows by repeating pixels; for segmentation it grows bilinearly.

    Args:
        backbone: timm's, without a head; taken over.
        channels: of its four branches together.
        classes: how many.
        align_corners: how the official program resizes. True is its default since the branch for PyTorch 1.1, of which
            hrnet_cs_8090_torch11.pth is; False what the older code did.
    """

    def __init__(self, backbone: nn.Module, *, channels: int, classes: int, align_corners: bool = True):
        super().__init__()
        for module in backbone.modules():
            if isinstance(module, nn.Upsample):
                module.mode, module.align_corners = "bilinear", align_corners
        self.backbone = backbone
        self.last_layer = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, classes, 1),
        )  # fmt: skip
        self._align_corners = align_corners

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """With the official keys, which do not set the backbone apart."""
        return {key.removeprefix("backbone."): value for key, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """From the official keys."""
        ours = {key if key.startswith("last_layer.") else f"backbone.{key}": t for key, t in state_dict.items()}
        return super().load_state_dict(ours, *args, **kwargs)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B,3,H,W) RGB in [0,1] -> (B,classes,H,W) logits.

        Sides that are no multiple of 32 are padded by repeating the border, where the official program lets branches
        of odd sizes meet; frames of Cityscapes are multiples.
        """
        height, width = pictures.shape[-2:]
        mean, std = (pictures.new_tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        padded = F.pad((pictures - mean) / std, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")
        branches = self.backbone.forward_features(padded)
        grown = [self._resize(branch, branches[0].shape[-2:]) for branch in branches[1:]]
        logits = self.last_layer(torch.cat([branches[0], *grown], 1))
        return self._resize(logits, padded.shape[-2:])[..., :height, :width]

    def _resize(self, x: Tensor, size_px: torch.Size) -> Tensor:
        return F.interpolate(x, size_px, mode="bilinear", align_corners=self._align_corners)


def build_hrnet(width: int, *, classes: int = 19, align_corners: bool = True) -> HrNet:
    """HRNetV2 of one of `WIDTHS`, with random weights.

    Raises:
        ValueError: no such width, or timm is not installed.
    """
    if width not in WIDTHS:
        raise ValueError(f"no HRNetV2 of width {width}; there are {', '.join(map(str, WIDTHS))}")
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"HRNet needs timm ({error}): pip install 'restill[scores]'") from error
    backbone = timm.create_model(f"hrnet_w{width}", pretrained=False, head="none")
    return HrNet(backbone, channels=15 * width, classes=classes, align_corners=align_corners)


def hrnet_like(state: Mapping[str, Tensor], *, align_corners: bool) -> tuple[HrNet, str]:
    """The net that these weights, with `from_official`'s keys, are of, not filled with them, and its title."""
    # The first branch is as wide as the net is called.
    width = state["transition1.0.0.weight"].shape[0] if "transition1.0.0.weight" in state else 0
    classes = state["last_layer.3.weight"].shape[0] if "last_layer.3.weight" in state else 0
    return build_hrnet(width, classes=classes, align_corners=align_corners), f"HRNetV2-W{width}"


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of HRNet-Semantic-Segmentation without what its trainer put around the net: prefixes, and the loss."""
    for prefix in ("module.", "model."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith("loss.")}

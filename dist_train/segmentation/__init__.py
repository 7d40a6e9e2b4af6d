"""What a segmentation net makes of pictures, and how well: the downstream use that restoring is for."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_train.priors.weights import check_state, load_state, looks_like
from dist_train.segmentation.cityscapes import NUM_CLASSES
from dist_train.segmentation.espnet import espnet_like
from dist_train.segmentation.hrnet import from_official, hrnet_like
from shards.schema import sha256_of

__all__ = ["Segmenter", "load_segmenter", "segment"]


class Segmenter(NamedTuple):
    """A net of Cityscapes' classes, and what it is."""

    net: nn.Module
    """(B,3,H,W) RGB in [0,1], any size -> (B,19 or more,H,W) logits; frozen, in evaluation mode."""
    title: str
    sha256: str
    """Of its file."""


def load_segmenter(weights: Path, device: torch.device | str, *, align_corners: bool = True) -> Segmenter:
    """Load a file of an official release: ESPNet's decoder, or HRNet-Semantic-Segmentation's HRNetV2 without OCR.

    Args:
        weights: .pth file; no code in it is run.
        device: where the net goes.
        align_corners: how HRNet resizes its features; see `dist_train.segmentation.hrnet.HrNet`.

    Raises:
        ValueError: the file is missing, damaged or of another net, or what builds the net is not installed.
    """
    state = load_state(weights, setting="segmenter")
    if "level3_C.conv.weight" in state:
        net, title = espnet_like(state)
    else:
        state = from_official(state)
        if "last_layer.0.weight" not in state:
            raise ValueError(
                f"segmenter={weights}: wanted ESPNet or an HRNetV2 of HRNet-Semantic-Segmentation without OCR, "
                f"found {looks_like(state)}"
            )
        net, title = hrnet_like(state, align_corners=align_corners)
    wanted = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    shapes = {name: value.shape for name, value in wanted.items()}
    check_state(state, shapes, setting=f"segmenter={weights}", what=title)
    num_classes = state["classifier.weight" if title.startswith("ESPNet") else "last_layer.3.weight"].shape[0]
    if num_classes < NUM_CLASSES:
        raise ValueError(f"segmenter={weights}: {title} has {num_classes} classes, Cityscapes {NUM_CLASSES}")
    net.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return Segmenter(net.eval().requires_grad_(False).to(device), title, sha256_of(weights))


@torch.inference_mode()
def segment(net: nn.Module, rgb_u8: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of each pixel.

    Args:
        net: of a `Segmenter`. Classes beyond the 19, such as ESPNet's of what is not labelled, are never chosen.
        rgb_u8: (H,W,3) uint8 RGB, any size.

    Returns:
        (H,W) uint8 in 0 ... 18.
    """
    device = next(net.parameters()).device
    picture = torch.from_numpy(np.ascontiguousarray(rgb_u8)).to(device).permute(2, 0, 1)[None].float() / 255
    logits: Tensor = net(picture)
    return logits[0, :NUM_CLASSES].argmax(0).to(torch.uint8).cpu().numpy()

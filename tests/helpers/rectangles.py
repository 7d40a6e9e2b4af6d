"""Pictures whose masks are known: rectangles of a few pure colours, one mask each."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.priors.masks import MaskSet, largest_first
from shards.codec import encode_png

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)], np.uint8)


def make_rectangles(root: Path, num: int, *, h: int = 40, w: int = 56) -> Path:
    """Folder with lq/r-N.png and gt/r-N.png, both the same: rectangles in all COLOURS that lie over one another."""
    rng = np.random.default_rng(0)
    for side in ("lq", "gt"):
        (root / side).mkdir(parents=True)
    for number in range(num):
        rgb = np.zeros((h, w, 3), np.uint8)
        for colour in rng.permutation(COLOURS):
            top, left = rng.integers(0, h - 12), rng.integers(0, w - 12)
            rgb[top : top + rng.integers(8, 24), left : left + rng.integers(8, 24)] = colour
        for side in ("lq", "gt"):
            (root / side / f"r-{number}.png").write_bytes(encode_png(rgb))
    return root


def colour_masks(rgb: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> (5,H,W) bool: where each colour is."""
    return (rgb == COLOURS[:, None, None]).all(-1)


class ColourPrior:
    """`colour_masks` as a prior that counts its pictures."""

    def __init__(self, num_masks: int = 6) -> None:
        self.num_masks, self.num_calls = num_masks, 0

    def __call__(self, images: Tensor, batch: object = None, *, restore: object = None) -> MaskSet:
        self.num_calls += len(images)
        pictures = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        masks = [torch.from_numpy(colour_masks(rgb)) for rgb in pictures]
        return largest_first(masks, num_masks=self.num_masks)

    def describe(self) -> dict[str, Any]:
        return {"name": "colour", "what": "colours", "parameters": {}, "weights": None, "sha256": None, "dtype": "-"}


def assert_same_masks(found: MaskSet, wanted: MaskSet) -> None:
    """The same masks of each picture, in any order among those of equal area, and largest first."""
    assert found.masks.shape == wanted.masks.shape
    for b in range(len(found.masks)):
        mine, its = (masks.masks[b][masks.valid[b]] for masks in (found, wanted))
        assert sorted(mask.numpy().tobytes() for mask in mine) == sorted(mask.numpy().tobytes() for mask in its)
        areas = mine.sum((1, 2)).tolist()
        assert areas == sorted(areas, reverse=True)
        assert torch.equal(found.valid[b], wanted.valid[b])

"""The automatic mode with weights that were trained: what half precision and the compiler change of its masks."""

from functools import cache

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor

from dist_train.config import SamConfig
from dist_train.priors.automatic import AutomaticMasks
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam import SamPrior
from launch.bench.masking import agreement
from tests.helpers.trained_sam import Scene, scenes, trained_sam

pytest.importorskip("timm", reason="restill[mobilesam] is not installed")
pytestmark = pytest.mark.unit

SETTINGS = {
    "num_masks": 64,
    "points_per_side": 16,
    "pred_iou_thresh": 0.7,  # it is not as sure as the published ones
    "stability_score_thresh": 0.8,
    "dtype": "fp32",
}


@cache
def unseen() -> list[Scene]:
    """On photographs that it was not trained with."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    stream = scenes(photos, seed=99)
    return [next(stream) for _ in range(12)]


def pictures() -> Tensor:
    return torch.from_numpy(np.stack([picture for picture, _ in unseen()])).permute(0, 3, 1, 2) / 255


@cache
def found(**settings: str | bool) -> MaskSet:
    return SamPrior(trained_sam(), SamConfig.model_validate(SETTINGS | settings), weights="trained")(pictures())


def agree(one: MaskSet, other: MaskSet) -> dict[str, float]:
    return agreement(*(some.masks & some.valid[:, :, None, None] for some in (one, other)))


def test_it_has_learnt_to_see():
    masks = found()
    assert masks.counts().min() >= 1 and masks.counts().sum() >= 20
    best = []
    for b, (_, truth) in enumerate(unseen()):
        mine, its = masks.masks[b][masks.valid[b]].flatten(1).double(), torch.from_numpy(truth).flatten(1).double()
        both = mine @ its.T
        best += (both / (mine.sum(1)[:, None] + its.sum(1) - both)).amax(1).tolist()
    assert sum(best) / len(best) > 0.8


def test_masks_are_those_of_segment_anything():
    agreed = agree(found(), found(generator="reference"))
    assert agreed["IoU"] > 0.99 and agreed["pixels"] > 0.99


@pytest.mark.parametrize("generator", ["batched", "reference"])
def test_masks_in_half_precision_are_those_of_segment_anything_in_full(generator):
    agreed = agree(found(generator=generator, dtype="bf16"), found(generator="reference"))
    assert agreed["IoU"] >= 0.97 and agreed["pixels"] >= 0.97


def test_masks_in_fp16_are_those_of_segment_anything_in_full():
    settings = {name: value for name, value in SETTINGS.items() if name != "dtype"}
    masks = AutomaticMasks(trained_sam(), dtype=torch.float16, **settings)(pictures())  # SamPrior wants a GPU for it
    agreed = agree(masks, found(generator="reference"))
    assert agreed["IoU"] >= 0.97 and agreed["pixels"] >= 0.97


def test_masks_of_the_compiled_path_are_those_of_segment_anything():
    agreed = agree(found(compile=True), found(generator="reference"))
    assert agreed["IoU"] >= 0.97 and agreed["pixels"] >= 0.97

import math

import numpy as np
import pytest
import torch

from dist_train.priors.masks import MaskSet, empty, from_masks, to_uint8

pytestmark = pytest.mark.unit


def some_masks(num_masks: int = 5, height: int = 12, width: int = 20) -> MaskSet:
    """Two pictures; the second has three masks, and rubbish in the two that are not valid."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, num_masks, height, width, generator=generator) > torch.linspace(0.3, 0.95, num_masks).view(
        1, -1, 1, 1
    )
    valid = torch.ones(2, num_masks, dtype=torch.bool)
    valid[1, 3:] = False
    return MaskSet(masks, valid)


def test_from_masks_sorts_by_area_drops_empty_cuts_and_pads():
    def rectangle(area: int, at: int) -> np.ndarray:
        mask = np.zeros((6, 8), bool)
        mask.ravel()[at : at + area] = True
        return mask

    first = np.stack([rectangle(3, 0), rectangle(0, 0), rectangle(20, 5), rectangle(3, 10), rectangle(7, 2)])
    second = np.stack([rectangle(9, 0), rectangle(0, 0)])
    none = np.zeros((0, 6, 8), bool)
    found = from_masks([first, second, none], num_masks=3)
    assert found.counts().tolist() == [3, 1, 0]
    assert found.masks.sum((2, 3)).tolist() == [[20, 7, 3], [9, 0, 0], [0, 0, 0]]
    assert found.masks[0, 2, 0, 0]  # of two equal areas the first is kept
    assert found.coverage().tolist() == pytest.approx([25 / 48, 9 / 48, 0])


@pytest.mark.parametrize("size", [(12, 20), (6, 5), (5, 7), (24, 40)])
def test_resize_is_the_share_of_the_area(size):
    masks = some_masks()
    got = masks.resize(*size)
    assert got.dtype == torch.float32
    height, width = masks.masks.shape[-2:]
    for b, k, i, j in np.ndindex(*got.shape):
        top, bottom = math.floor(i * height / size[0]), math.ceil((i + 1) * height / size[0])
        left, right = math.floor(j * width / size[1]), math.ceil((j + 1) * width / size[1])
        share = masks.masks[b, k, top:bottom, left:right].float().mean() * masks.valid[b, k]
        assert got[b, k, i, j] == pytest.approx(share.item())


def test_idmap_paints_large_to_small():
    masks = some_masks()
    want = torch.zeros(2, 12, 20, dtype=torch.int64)
    for b in range(2):
        for k in range(5):
            if masks.valid[b, k]:
                want[b][masks.masks[b, k]] = k + 1
    assert torch.equal(masks.idmap(), want)


@pytest.mark.parametrize("size", [(12, 20), (6, 5)])
def test_pool_is_the_mean_inside_each_mask(size):
    masks = some_masks()
    features = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, small = masks.pool(features), masks.resize(*size).double()
    for b, k in np.ndindex(2, 5):
        weight = small[b, k]
        want = (features[b] * weight).sum((1, 2)) / weight.sum() if masks.valid[b, k] else torch.zeros(4)
        torch.testing.assert_close(got[b, k], want, check_dtype=False)


def test_pool_of_nothing_is_zero_without_nan():
    features = torch.randn(2, 4, 6, 6, requires_grad=True)
    pooled = empty(2, 3, 12, 12).pool(features)
    pooled.square().sum().backward()
    assert pooled.eq(0).all() and features.grad is not None and features.grad.eq(0).all()


def test_pool_is_float32_whatever_the_training_step_runs_in():
    features = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        pooled = some_masks().pool(features)
    assert torch.equal(pooled, some_masks().pool(features))


def test_pictures_are_clamped_and_rounded_and_keep_their_colours():
    images = torch.tensor([-0.3, 0.5, 1.7]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert to_uint8(images).shape == (1, 2, 4, 3)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 128, 255]

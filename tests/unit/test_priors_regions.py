import pytest
import torch

from dist_train.config import RegionsConfig
from dist_train.priors import build_prior

pytestmark = pytest.mark.unit


def test_regions_of_a_flag_are_its_stripes():
    image = torch.zeros(1, 3, 64, 96)
    image[:, 0, :, :30], image[:, 1, :, 30:50], image[:, 2, :, 50:] = 1, 1, 1
    both = torch.cat([image, image.flip(3)]).requires_grad_()
    prior = build_prior(RegionsConfig(sigma=0, num_masks=8), torch.device("cpu"))
    found = prior(both, None)
    assert not found.masks.requires_grad and found.masks.shape == (2, 8, 64, 96)
    assert found.counts().tolist() == [3, 3] and found.coverage().tolist() == [1, 1]
    assert found.masks[0, :3].sum((1, 2)).tolist() == [64 * 46, 64 * 30, 64 * 20]  # largest first
    assert found.masks[0, 0, :, 50:].all()
    assert torch.equal(found.masks[1], found.masks[0].flip(2))  # each picture by itself


def test_of_many_regions_the_largest_are_kept():
    widths = torch.tensor([3, 9, 4, 12, 5, 7, 11, 6])
    stripes = torch.arange(8).remainder(2).float().repeat_interleave(widths)
    image = stripes.expand(1, 3, 16, -1)
    prior = build_prior(RegionsConfig(sigma=0, scale=1, min_area_px=1, num_masks=3), torch.device("cpu"))
    assert prior(image, None).masks.sum((2, 3)).tolist() == [[16 * 12, 16 * 11, 16 * 9]]


@pytest.mark.filterwarnings("error")
def test_a_picture_that_is_not_finite_has_no_masks():
    images = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    images[0, 1, 2, 3], images[2, 0, 0, 0] = torch.nan, torch.inf
    assert build_prior(RegionsConfig(), torch.device("cpu"))(images).valid.any(1).tolist() == [False, True, False]


def test_it_says_that_it_is_not_sam():
    assert "not SAM" in build_prior(RegionsConfig(), torch.device("cpu")).describe()["what"]

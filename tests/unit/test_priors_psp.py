"""Class regions of PSPNet as masks."""

import sys

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import PspConfig, parse_run
from dist_train.priors import build_prior
from dist_train.priors.masks import MaskSet
from dist_train.priors.psp import PspPrior, largest_classes

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class ByRed(nn.Module):
    """Stands in for PSPNet: the class of a pixel is how red it is, in fifths. Keeps what it was shown."""

    def forward(self, pictures: Tensor) -> Tensor:
        self.shown = pictures
        assert pictures.shape[-2] % 8 == pictures.shape[-1] % 8 == 0
        red = pictures[:, 0] * 0.229 + 0.485  # ImageNet's
        return -(red[:, None] * 4 - torch.arange(5)[:, None, None]).abs()


def painted(*, height: int = 21, width: int = 18) -> Tensor:
    """Red in fifths: 0 but for a column of 1/4, two far corners of 2/4 together, and a pixel of 1."""
    image = torch.zeros(1, 3, height, width)
    image[:, 0, :, 5:9] = 0.25
    image[:, 0, :3, :3] = image[:, 0, -3:, -3:] = 0.5
    image[:, 0, 10, 10] = 1.0
    return image


def of_class(image: Tensor, c: int) -> Tensor:
    return (image[0, 0] * 4).round() == c


def test_each_class_is_one_mask_largest_first_and_small_ones_are_none() -> None:
    image = painted()
    prior = PspPrior(ByRed(), PspConfig(weights="x", num_classes=5, num_masks=8, min_area_px=2), weights="by hand")
    with torch.autocast("cpu", torch.bfloat16):  # whatever the step runs in
        found = prior(torch.cat([image + 0.001, torch.full_like(image, float("nan")), image]))
    assert found.masks.shape == (3, 8, 21, 18) and found.counts().tolist() == [3, 0, 3]
    for b in (0, 2):
        for k, c in enumerate((0, 1, 2)):
            assert torch.equal(found.masks[b, k], of_class(image, c))
        assert not found.masks[b, 3:].any()
    assert prior(image * 0 + 0.25).counts() == 1


def test_fewer_masks_than_classes_are_the_largest() -> None:
    found = PspPrior(ByRed(), PspConfig(weights="x", num_classes=5, num_masks=2, min_area_px=0), weights="by hand")
    masks = found(painted())
    assert torch.equal(masks.masks[0], torch.stack([of_class(painted(), c) for c in (0, 1)])) and masks.valid.all()


def test_the_picture_is_normalised_and_rounded_to_8_bits() -> None:
    net, image = ByRed(), torch.rand(1, 3, 16, 8)
    image[0, 0, 0, 0] = 1.7
    PspPrior(net, PspConfig(weights="x", num_classes=5), weights="by hand")(image)
    shown = net.shown * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    shown = (shown + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    torch.testing.assert_close(shown, (image.clamp(0, 1) * 255).round(), rtol=0, atol=1e-4)


def test_no_mask_is_left_out_of_the_classes() -> None:
    classes = torch.randint(0, 7, (2, 9, 9), generator=torch.Generator().manual_seed(0))
    found = largest_classes(classes, PspConfig(weights="x", num_classes=8, num_masks=9, min_area_px=0))
    assert (found.masks.sum(1) == 1).all()
    areas = found.masks.sum((2, 3))
    assert areas.min() == 0  # a class that is not there, and more masks than classes
    assert torch.equal(areas, areas.sort(1, descending=True).values) and torch.equal(found.valid, areas > 0)


def test_weights_by_path_are_loaded_and_wrong_ones_say_so(tmp_path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="the psp prior is an extra")
    torch.manual_seed(5)
    net = smp.PSPNet("resnet18", encoder_weights=None, classes=6).eval()
    path = tmp_path / "psp.pth"
    torch.save(net.state_dict(), path)
    config = PspConfig(weights=str(path), encoder="resnet18", num_classes=6, min_area_px=0)
    before = torch.random.get_rng_state()
    prior = build_prior(config, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    image = torch.rand(2, 3, 32, 40, requires_grad=True)
    found = prior(image, None)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        classes = net(((image * 255).round() / 255 - mean[:, None, None]) / std[:, None, None]).argmax(1)
    assert torch.equal(found.masks, largest_classes(classes, config).masks) and found.counts().min() > 1
    assert prior.describe()["weights"] == str(path) and len(prior.describe()["sha256"]) == 64
    for changed, message in (
        ({"num_classes": 7}, r"num_classes=7.*segmentation_head.0.weight is of shape \(6, 512, 3, 3\), not \(7,"),
        ({"encoder": "resnet34"}, r"prior\.encoder=resnet34.*is missing"),
        ({"encoder": "resnet19"}, r"prior\.encoder=resnet19: PSPNet cannot be built on it"),
        ({"encoder": "tu-nonsense"}, r"prior\.encoder=tu-nonsense: PSPNet cannot be built on it"),
        ({"weights": str(tmp_path / "absent.pth")}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            build_prior(config.model_copy(update=changed), CPU)


def test_random_weights_are_said_aloud_and_the_same_every_time(caplog) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the psp prior is an extra")
    config = PspConfig(weights="random", encoder="resnet18", num_classes=6, min_area_px=0)
    image, found = torch.rand(1, 3, 40, 40), []
    for _ in range(2):
        prior = build_prior(config, CPU)
        found.append(prior(image, None))
    assert isinstance(found[0], MaskSet) and torch.equal(found[0].masks, found[1].masks)
    assert "RANDOM" in prior.describe()["what"] and "RANDOM" in caplog.text and prior.describe()["sha256"] is None


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'restill\[psp\]'"):
        build_prior(PspConfig(weights="random"), CPU)


def test_a_run_names_it_and_must_give_weights() -> None:
    tree = {"name": "a", "data": {"train": "x"}, "prior": {"name": "psp", "weights": "psp.pth", "num_masks": 7}}
    assert parse_run(tree, source="test").prior.num_masks == 7
    with pytest.raises(ValueError, match=r"prior\.weights: must be given"):
        parse_run({**tree, "prior": {"name": "psp"}}, source="test")

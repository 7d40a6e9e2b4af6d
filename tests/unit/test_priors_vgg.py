import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_train.config import VggConfig
from dist_train.priors.vgg import ARCHS, Features, load_features
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def photo(side_px: int = 96) -> torch.Tensor:
    from skimage import data

    return (
        torch.from_numpy(np.ascontiguousarray(data.astronaut()[:side_px, 150 : 150 + side_px])).permute(2, 0, 1)[None]
        / 255
    )


def double(features: Features) -> Features:
    return dataclasses.replace(
        features,
        preprocess=tuple(tensor.double() for tensor in features.preprocess),
        convs=tuple(conv._replace(weight=conv.weight.double(), bias=conv.bias.double()) for conv in features.convs),
    )


def test_keys_are_torchvisions():
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        layers = make_layers(cfgs["E"])
    convs = [f"features.{name}" for name, layer in layers.named_children() if isinstance(layer, nn.Conv2d)]
    assert list(ARCHS["vgg19"].keys.values()) == convs


@pytest.mark.parametrize(("layer", "end"), [("conv1_2", 3), ("relu2_1", 7), ("relu4_1", 21)])
def test_vgg19_is_torchvisions(tmp_path, layer, end):
    from torchvision.models.vgg import cfgs, make_layers
    from torchvision.transforms.functional import normalize

    torch.manual_seed(0)
    layers = make_layers(cfgs["E"])[:end]
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "vgg19.pth")
    features = load_features(VggConfig(weights=str(tmp_path / "vgg19.pth"), layer=layer), CPU)
    with torch.no_grad():
        want = layers(normalize(photo(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(features(photo()), want, rtol=1e-4, atol=1e-5)


def test_vgg19_16x_is_its_own_description():
    path = shared("weights", "vgg19_16x_e5_base.pth")
    state = torch.load(path, weights_only=True)
    x = photo()
    bgr = x.flip(1) * 255 - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    x, rates = bgr, []
    for block, num in enumerate((2, 2, 4, 4, 1), 1):
        x = F.max_pool2d(x, 2, 2) if block > 1 else x
        for i in range(1, num + 1):
            x = nn.ReflectionPad2d(1)(x)
            x = F.relu(F.conv2d(x, state[f"conv{block}{i}.weight"], state[f"conv{block}{i}.bias"]))
            rates.append((x > 0).float().mean().item())
    features = load_features(VggConfig(arch="vgg19_16x", weights=str(path), layer="relu5_1"), CPU)
    torch.testing.assert_close(features(photo()), x, rtol=1e-4, atol=1e-3)
    assert all(0.02 < rate < 0.98 for rate in rates)  # learned filters, fed as they were trained: none dead, none idle
    assert features.describe()["what"] == "VGG-19 with learned weights" and features.describe()["sha256"]


@pytest.mark.parametrize(("arch", "layer"), [("vgg19", "conv2_1"), ("vgg19_16x", "relu2_2")])
def test_the_gradient_reaches_the_picture_and_no_weight(arch, layer):
    features = load_features(VggConfig(arch=arch, weights="random", layer=layer), CPU)
    assert not any(t.requires_grad for conv in features.convs for t in (conv.weight, conv.bias))
    generator = torch.Generator().manual_seed(0)
    # Outside of [0,1] too: what the student gives is not clamped.
    images = (torch.rand(1, 3, 6, 6, generator=generator, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()
    assert torch.autograd.gradcheck(double(features), (images,))


def test_random_weights_are_announced_seeded_and_keep_the_scale(caplog):
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING):
        one, two = (load_features(VggConfig(weights="random", arch="vgg19_16x"), CPU) for _ in range(2))
    assert "RANDOM" in caplog.text and "RANDOM" in one.describe()["what"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one(photo()), two(photo()))
    assert 0.1 < one(photo()).square().mean() < 10


def test_errors_name_the_setting_and_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"features\.layer=relu5_4: vgg19_16x has no such layer.*relu5_1"):
        load_features(VggConfig(arch="vgg19_16x", weights="random", layer="relu5_4"), CPU)
    with pytest.raises(ValueError, match="no published file"):
        load_features(VggConfig(arch="vgg19_16x"), CPU)
    features = load_features(VggConfig(arch="vgg19_16x", weights="random", layer="relu4_4"), CPU)
    assert features(torch.zeros(1, 3, 16, 16)).shape == (1, 128, 2, 2)
    with pytest.raises(ValueError, match="16 px or more, not 15x40"):
        features(torch.zeros(1, 3, 15, 40))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of vgg19_16x.*torchvision's VGG"):
        load_features(VggConfig(arch="vgg19_16x", weights=str(tmp_path / "other.pth")), CPU)

"""EfficientDerain: its kernels against unfold, its borders, its two ways to meet a size that does not fit.

The official nets' outputs and keys are in test_parity.py; what holds for every net, in test_all_nets.py.
"""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_train.config import EfficientDerainConfig
from dist_train.nets import build_net
from dist_train.nets.efficientderain import EfficientDerain, apply_kernels

pytestmark = pytest.mark.unit


def new_net(**fields: Any) -> EfficientDerain:
    """A tiny net with weights large enough that each of its parts shows."""
    torch.manual_seed(0)
    net = build_net(EfficientDerainConfig(base_width=4, **fields)).eval()
    assert isinstance(net, EfficientDerain)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return net


@pytest.mark.parametrize("kernel_px", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 4])
def test_kernels_are_applied_as_by_unfold_gradients_too(kernel_px: int, dilation: int) -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(2, 3, kernel_px**2, 9, 12, dtype=torch.float64, requires_grad=True)
    patches = F.unfold(image, kernel_px, dilation=dilation, padding=kernel_px // 2 * dilation)
    naive = (patches.view_as(kernels) * kernels).sum(2)
    ours = apply_kernels(image, kernels, dilation=dilation)
    torch.testing.assert_close(ours, naive)
    weight = torch.randn_like(naive)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), (image, kernels)),
        torch.autograd.grad((naive * weight).sum(), (image, kernels)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_tap_reaches_as_far_as_its_dilation_and_finds_zeros_beyond_the_border() -> None:
    kernels = torch.zeros(1, 3, 9, 6, 7)
    kernels[:, :, 3 * 0 + 2] = 1  # row -1, column +1
    image = torch.rand(1, 3, 6, 7)
    moved = apply_kernels(image, kernels, dilation=2)
    assert torch.equal(moved[..., 2:, :-2], image[..., :-2, 2:])
    assert moved[..., :2, :].abs().max() == 0 and moved[..., -2:].abs().max() == 0


def test_pad_replicates_at_the_right_and_below() -> None:
    net = new_net()
    lq = np.random.default_rng(0).random((2, 3, 35, 50), dtype=np.float32)
    padded = np.pad(lq, ((0, 0), (0, 0), (0, 13), (0, 14)), mode="edge")
    with torch.no_grad():
        assert torch.equal(net(torch.from_numpy(lq)), net(torch.from_numpy(padded))[..., :35, :50])


def test_resize_is_that_of_opencv() -> None:
    padding, resizing = new_net(), new_net(fit="resize")
    lq = np.random.default_rng(0).random((35, 50, 3), dtype=np.float32)

    def to_tensor(picture: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]

    with torch.no_grad():
        stretched = cv2.resize(lq, (64, 48), interpolation=cv2.INTER_LINEAR)
        restored = padding(to_tensor(stretched))[0].numpy().transpose(1, 2, 0)
        expected = to_tensor(cv2.resize(restored, (50, 35), interpolation=cv2.INTER_LINEAR))
        difference = (resizing(to_tensor(lq)) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max()
        fits = torch.rand(1, 3, 32, 48)
        torch.testing.assert_close(resizing(fits), padding(fits))


def test_a_new_net_lets_gradients_through_to_its_first_layer() -> None:
    torch.manual_seed(0)
    net = build_net(EfficientDerainConfig(base_width=8))
    F.l1_loss(net(torch.rand(1, 3, 32, 32)), torch.rand(1, 3, 32, 32)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_autocast_is_close() -> None:
    net = new_net()
    lq = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = net(lq)
    exact = net(lq)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_weights_start_as_published() -> None:
    conv = build_net(EfficientDerainConfig()).conv5.conv1[2].weight  # xavier normal, gain 0.02
    assert conv.std().item() == pytest.approx(0.02 * (2 / (2 * 512 * 9)) ** 0.5, rel=0.02)

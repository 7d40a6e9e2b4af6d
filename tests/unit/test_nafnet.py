"""NAFNet's stages; that it equals the official network is in test_parity.py."""

import pytest
import torch

from dist_train.config import NafnetConfig
from dist_train.nets import build_net

pytestmark = pytest.mark.unit


def test_stages_say_what_the_features_are() -> None:
    net = build_net(NafnetConfig(width=4, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1)))
    seen = []

    def watch(index: int, features: torch.Tensor) -> torch.Tensor:
        seen.append((net.stages[index].channels, net.stages[index].stride, tuple(features.shape)))
        return features

    lq = torch.rand(1, 3, 18, 21)  # padded to 20 x 24 inside
    assert torch.equal(net(lq, watch), net(lq))
    assert [index for index, _ in enumerate(seen)] == list(range(len(net.stages)))
    for channels, stride, shape in seen:
        assert shape == (1, channels, 20 // stride, 24 // stride)

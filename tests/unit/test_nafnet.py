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


@pytest.mark.parametrize(
    ("train_px", "boxes"),
    [
        (100, [168, 84, 42, 21, 10]),
        (250, [384, 192, 96, 48, 24]),
        ((40, 96), [(72, 144), (36, 72), (18, 36), (9, 18), (4, 9)]),
    ],
)
def test_boxes_of_tlc_are_those_of_a_padded_training_crop(train_px, boxes) -> None:
    config = NafnetConfig(width=4, enc_blk_nums=(1,) * 4, dec_blk_nums=(1,) * 4, tlc_train_px=train_px)
    net = build_net(config)
    found = [net.encoders[level][0].pool_box for level in range(4)] + [net.middle_blks[0].pool_box]
    assert found == [box if isinstance(box, tuple) else (box, box) for box in boxes]

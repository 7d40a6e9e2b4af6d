"""NAFNet against the official networks' outputs, checkpoint layouts and parameter counts."""

import json

import pytest
import torch

from dist_train.config import NafnetConfig
from dist_train.nets import build_net
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["nafnet_w32_2lvl", "nafnet_w8_4lvl", "nafnetlocal_w8_4lvl"])
def test_equals_the_official_network(name: str) -> None:
    fixture = torch.load(shared("parity", f"{name}.pt"), weights_only=True)
    ctor = fixture["ctor"]
    config = NafnetConfig(
        width=ctor["width"],
        middle_blk_num=ctor["middle_blk_num"],
        enc_blk_nums=tuple(ctor["enc_blk_nums"]),
        dec_blk_nums=tuple(ctor["dec_blk_nums"]),
        tlc_train_px=ctor.get("train_size", [0, 0, 0])[2],
    )
    net = build_net(config).eval()
    net.load_state_dict(fixture["checkpoint"]["params"])
    with torch.no_grad():
        out = net(fixture["inputs"]["x"])
    assert (out - fixture["outputs"]["y"]).abs().max().item() <= fixture["atol"]


@pytest.mark.parametrize("name", ["gopro_w32", "gopro_w64", "sidd_w32", "sidd_w64"])
def test_published_configuration_has_the_official_keys(name: str) -> None:
    facts = json.loads(shared("parity", f"full_nafnet_{name}.json").read_text())
    ctor = facts["ctor"]
    with torch.device("meta"):
        net = build_net(
            NafnetConfig(
                width=ctor["width"],
                middle_blk_num=ctor["middle_blk_num"],
                enc_blk_nums=tuple(ctor["enc_blk_nums"]),
                dec_blk_nums=tuple(ctor["dec_blk_nums"]),
            )
        )
    ours = [[key, list(tensor.shape)] for key, tensor in net.state_dict().items()]
    official = [[entry[0], list(entry[1])] for entry in facts["keys"]]
    assert ours == official


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

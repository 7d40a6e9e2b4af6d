"""How pictures go through a net: in tiles, eight times, in half precision, with TLC, as memory allows."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from dist_train import inference
from dist_train.config import NetConfig
from dist_train.inference import Inference, fitting_restorer, restorer
from dist_train.nets import RestorationNet, build_net
from dist_train.room import LiveBytes, free_bytes
from tests.helpers.nets import TINY_NETS

pytestmark = pytest.mark.unit


def tiny(name: str, **fields: object) -> RestorationNet:
    torch.manual_seed(0)
    net = build_net(TypeAdapter(NetConfig).validate_python({**TINY_NETS[name], **fields})).eval()
    for key, parameter in net.named_parameters():
        if key.endswith(("beta", "gamma")):  # zero at first, which would make the net the identity
            nn.init.constant_(parameter, 0.3)
    return net


def picture(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


class Seen(RestorationNet):
    """The identity, or what it is given; notes the sizes that go through."""

    stages = ()

    def __init__(self, change=lambda lq: lq, multiple: int = 1):
        super().__init__()
        self.change, self.multiple, self.sizes = change, multiple, []

    def __deepcopy__(self, memo: object) -> "Seen":
        return self

    def restore(self, padded, after_stage, trace):
        self.sizes.append(tuple(padded.shape))
        return self.change(padded)


@pytest.mark.parametrize("name", ["rcdnet", "rcdnet_simple", "efficientderain", "uformer"])
def test_tiles_restore_as_the_whole_does(name) -> None:
    net, lq = tiny(name), picture(75, 150)
    whole = restorer(net, Inference(), device="cpu")(lq)
    overlap_px = 32 if net.multiple == 1 else 20  # the next multiple, so that tiles lie on the net's grid
    tiled = restorer(net, Inference(tile_px=64, overlap_px=overlap_px), device="cpu")(lq)
    assert (whole - lq).abs().max() > 0.05
    assert (tiled - whole).abs().max() < 1 / 255


def test_tiles_of_nafnet_differ_by_its_pooling_alone() -> None:
    net, lq = tiny("nafnet"), picture(75, 150)
    for block in net.modules():
        if hasattr(block, "sca"):
            nn.init.zeros_(block.sca[1].weight)  # what is pooled counts nothing
            nn.init.ones_(block.sca[1].bias)
    whole = restorer(net, Inference(), device="cpu")(lq)
    tiled = restorer(net, Inference(tile_px=64), device="cpu")(lq)
    assert (whole - lq).abs().max() > 0.05 and (tiled - whole).abs().max() < 1 / 255


def test_tiles_lie_on_the_grid_of_the_net_and_share_what_is_asked() -> None:
    net = Seen(multiple=8)
    net.padding = lambda height, width: (3, 1, 0, 0) if width == 100 else (0, 0, 0, 0)
    lq = picture(40, 100)
    torch.testing.assert_close(restorer(net, Inference(tile_px=44, overlap_px=12), device="cpu")(lq), lq)
    assert set(net.sizes) == {(1, 3, 40, 40)} and len(net.sizes) == 4  # starts 0, 24, 48, 64 of 104
    for length, side, step in [(100, 40, 28), (104, 40, 24), (41, 40, 8), (30, 40, 24), (80, 40, 40)]:
        total = torch.zeros(length)
        for start, weight in inference._tiles(length, side=side, step=step):
            total[start : start + len(weight)] += weight
            assert start == 0 or not weight[: (side - step) * 3 // 8].any()  # at inner edges: seen, not shown
        torch.testing.assert_close(total, torch.ones(length))


def test_eight_ways_are_the_mean_of_the_eight() -> None:
    net = Seen(lambda x: x * torch.linspace(0, 1, x.shape[-1]) ** 2)  # stronger on the right
    lq = picture(5, 7)
    want = torch.zeros_like(lq)
    for turns in range(4):
        for flip in (False, True):
            seen = torch.rot90(lq.flip(-1) if flip else lq, turns, (2, 3))
            back = torch.rot90(net.change(seen), -turns, (2, 3))
            want += (back.flip(-1) if flip else back) / 8
    restore = restorer(net, Inference(ensemble=True), device="cpu")
    torch.testing.assert_close(restore(lq), want)
    torch.testing.assert_close(restore(lq.rot90(1, (2, 3))), want.rot90(1, (2, 3)))


@pytest.mark.parametrize("precision, dtype, limit", [("bf16", torch.bfloat16, 0.02), ("fp16", torch.float16, 0.003)])
def test_half_precision(precision, dtype, limit) -> None:
    net, lq = tiny("efficientderain"), picture(32, 32)
    found = []
    net.conv1.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    whole = restorer(net, Inference(), device="cpu")(lq)
    half = restorer(net, Inference(precision=precision), device="cpu")(lq)
    assert found == [torch.float32, dtype] and half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < limit


def test_tlc_is_that_of_a_net_built_with_it() -> None:
    plain, local, lq = tiny("nafnet"), tiny("nafnet", tlc_train_px=32), picture(80, 96)
    want = restorer(local, Inference(), device="cpu")(lq)
    assert torch.equal(restorer(plain, Inference(tlc_px=32), device="cpu")(lq), want)
    without = restorer(plain, Inference(), device="cpu")(lq)  # the net itself was left as it is
    assert torch.equal(without, plain(lq)) and not torch.allclose(without, want, atol=1e-5)


def test_names_and_refusals() -> None:
    assert Inference().suffix == Inference(overlap_px=8).suffix == ""
    every = Inference(tlc_px=256, ensemble=True, tile_px=512, precision="bf16")
    assert every.suffix == "+tlc256+x8+tiles512o32+bf16"
    for fields, words in [
        ({"precision": "int8"}, "there are fp32, bf16, fp16"),
        ({"tile_px": -1}, "tile_px -1 is below 0"),
        ({"tile_px": 32}, "tiles of 32 px overlap by 32 px"),
    ]:
        with pytest.raises(ValueError, match=words):
            Inference(**fields)
    with pytest.raises(ValueError, match="TLC is for NAFNet, not for Uformer"):
        restorer(tiny("uformer"), Inference(tlc_px=256), device="cpu")
    with pytest.raises(ValueError, match="grid of 32 px; with an overlap of 32 px take at least 64"):
        restorer(tiny("uformer"), Inference(tile_px=40), device="cpu")
    masked = tiny("nafnet")
    masked.wants_masks = True
    with pytest.raises(ValueError, match="wants masks"):
        restorer(masked, Inference(), device="cpu")


def test_what_does_not_fit_goes_in_tiles(monkeypatch) -> None:
    net = Seen(lambda x: x + torch.cat([x] * 8, 1)[:, :3], multiple=4)  # 96 bytes a pixel, and 12 for the sum
    monkeypatch.setattr(inference, "WHOLE_PX", 200)
    restore = fitting_restorer(net, Inference(overlap_px=4), device="cpu", free=int(48**2 * 108 / 0.4) + 1)
    for lq in (picture(10, 20), picture(40, 30), picture(70, 90)):
        net.sizes.clear()
        torch.testing.assert_close(restore(lq), 2 * lq)
        sizes = [size for size in net.sizes if size[-1] < 500]  # without those of the probe
        assert all(max(size) <= 48 for size in sizes)
        assert len(sizes) == (1 if max(lq.shape) < 48 else 4)
    assert 2**20 < free_bytes("cpu") < 2**50


@pytest.mark.parametrize("name", sorted(TINY_NETS))
def test_followed_without_data_as_with_it(name) -> None:
    net = tiny(name)
    side = 2 * net.multiple * (32 // net.multiple or 1)
    lq = picture(side, side)
    found = []
    for device in ("cpu", "meta"):
        with torch.inference_mode(), LiveBytes() as live:
            net.to(device)(lq.to(device))
        found.append(live.peak)
    assert 0.9 * found[0] <= found[1] <= 2 * found[0]  # some operations are taken apart there

"""Official files: what is in them, into our nets and back, and what is said of those that will not do."""

import json
from pathlib import Path

import pytest
import torch

from dist_train.config import NafnetConfig, RcdnetConfig, UformerConfig
from dist_train.nets import build_net, load_official
from dist_train.nets.conditioned import mask_average
from dist_train.nets.identify import identify
from dist_train.nets.official import official_layout, open_official, read_official
from tests.helpers.shared import parity
from tests.helpers.tiny_sam import tiny_sam

pytestmark = pytest.mark.unit

TINY = NafnetConfig(width=4, enc_blk_nums=(1, 1), dec_blk_nums=(2, 0))


@pytest.fixture
def tiny(tmp_path) -> Path:
    """An official file of a small NAFNet."""
    torch.manual_seed(0)
    path = tmp_path / "net.pth"
    torch.save(official_layout(TINY, build_net(TINY).state_dict()), path)
    return path


def refusal(name: str, path: Path, **fields: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_official(name, path, **fields)
    assert str(path) in str(caught.value) or fields
    return str(caught.value)


@pytest.mark.parametrize(
    "fixture",
    ["rcdnet_s4_z13", "rcdnet_simple_s3_t2_z13", "efficientderain_b4_k5", "nafnet_w8_4lvl", "masknafnet_w8",
     "segnafnet_w8_eval", "uformer_t_e4"],
)  # fmt: skip
def test_in_and_out_again(fixture: str, tmp_path: Path) -> None:
    official = torch.load(parity(f"{fixture}.pt"), weights_only=True)["checkpoint"]
    torch.save(official, tmp_path / "official.pth")
    net, found = open_official(tmp_path / "official.pth", {})
    ours = official_layout(found.config, net.state_dict())

    assert not net.training and list(ours) == list(official)
    for key, theirs in official.items():
        if key in ("params", "state_dict"):
            assert list(ours[key]) == list(theirs)
            assert all(torch.equal(ours[key][name], tensor) for name, tensor in theirs.items())
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours[key], theirs)
    assert ours.get("optimizer") == official.get("optimizer")  # as new: no moments, one group of all parameters


@pytest.mark.parametrize(
    ("facts", "name", "title"),
    [
        ("rcdnet", "rcdnet", "RCDNet, 17 stages"),
        ("rcdnet_simple", "rcdnet_simple", "RCDNet_simple, 17 stages of 4 blocks"),
        ("efficientderain", "efficientderain", "EfficientDerain, kernels of 3 px, width 64"),
        ("uformer_t", "uformer", "Uformer-T"),
        ("uformer_s", "uformer", "Uformer-S"),
        ("uformer_b", "uformer", "Uformer-B"),
        ("nafnet_gopro_w64", "nafnet", "NAFNet width 64, GoPro/REDS blocks"),
        ("nafnet_sidd_w32", "nafnet", "NAFNet width 32, SIDD blocks"),
        ("samdeblur_masknafnet_w32", "masknafnet", "MaskNAFNet (CAT of SAM-Deblur) width 32, GoPro/REDS blocks"),
        ("samdeblur_segnafnet_w32", "segnafnet", "SegNAFNet (MAP of SAM-Deblur, 2 channels) width 32, GoPro/REDS"),
    ],
)
def test_published_sizes_have_names(facts: str, name: str, title: str) -> None:
    keys = json.loads(parity(f"full_{facts}.json").read_text())["keys"]
    found = identify({key: torch.empty(shape, device="meta") for key, shape, _ in keys})
    assert found.name == name and found.title.startswith(title)


def test_sizes_of_any_kind_are_read_off() -> None:
    for config in [
        TINY,
        NafnetConfig(width=2, middle_blk_num=0, enc_blk_nums=(), dec_blk_nums=()),
        RcdnetConfig(num_stages=3, num_m=5, num_z=2),
        RcdnetConfig(layout="simple", num_stages=4, num_m=3, num_z=1, num_res_blocks=1),
        RcdnetConfig(layout="simple", num_stages=1, num_m=3, num_z=1, num_res_blocks=2),
        UformerConfig(embed_dim=2, depths=(1,) * 9, num_heads=(1,) * 9, win_size=4, mlp_ratio=1.5, modulator=False),
        # Built for such small pictures, the bottleneck's windows are smaller, and tell it.
        UformerConfig(embed_dim=4, depths=(1,) * 9, win_size=4, img_size=32, modulator=False),
        UformerConfig(embed_dim=4, depths=(1,) * 9, win_size=8, img_size=56, modulator=False),
    ]:
        assert identify(build_net(config).state_dict()).config == config


def test_wrappers_and_prefixes(tiny: Path) -> None:
    state = read_official(tiny)
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    averaged = {key: 2 * tensor for key, tensor in state.items()}
    for held, factor in [
        (state, 1),
        (prefixed, 1),
        ({"epoch": 3, "state_dict": prefixed}, 1),
        ({"model": state, "step": 3}, 1),
        ({"params": state, "params_ema": averaged}, 2),
    ]:
        torch.save(held, tiny)
        net = load_official("nafnet", tiny)
        assert torch.equal(net.get_parameter("intro.weight"), factor * state["intro.weight"])


def test_what_the_file_cannot_say_is_given(tiny: Path) -> None:
    assert open_official(tiny, {"tlc_train_px": 32})[1].config == TINY.model_copy(update={"tlc_train_px": 32})
    pools = [load_official(name, tiny, **f).middle_blks[0].pool_box for name, f in [
        ("nafnet", {}), ("nafnetlocal", {}), ("nafnetlocal", {"tlc_train_px": 32})
    ]]  # fmt: skip
    assert pools == [None, (96, 96), (12, 12)]
    assert "width is not to be given" in (text := refusal("nafnet", tiny, width=8)) and "width=4 is in it" in text
    assert "leaves open: tlc_train_px" in refusal("nafnet", tiny, img_size=128)
    assert "tlc_train_px=True" in refusal("nafnet", tiny, tlc_train_px=True)


def test_files_that_will_not_do(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    state = read_official(tiny)
    path = tmp_path / "other.pth"

    assert "there are net.pth" in refusal("nafnet", path)
    assert "no official net is called 'nafnett'" in refusal("nafnett", path, x=1)
    for content in (whole[: len(whole) // 2], whole[:1], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        assert "not a readable PyTorch file" in refusal("nafnet", path)
    for is_zip in (True, False):
        torch.save(build_net(TINY), path, _use_new_zipfile_serialization=is_zip)
        assert "dist_train.nets.nafnet.Nafnet" in (text := refusal("nafnet", path)) and "run code" in text
    for held, words in [
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3}, "holds epoch; wanted are tensors by name"),
        ({}, "holds nothing"),
        (tiny_sam().state_dict(), "no weights of nafnet; it looks like SAM with an encoder 32 wide"),
        ({f"features.{i}.weight": torch.zeros(1, 1, 3, 3) for i in range(16)}, "torchvision's VGG-19"),
        ({"intro.weight": torch.zeros(3)}, "not the shapes that go with it"),
        ({key: t for key, t in state.items() if key != "middle_blks.0.beta"}, "1 missing (middle_blks.0.beta)"),
        (state | {"a.b": torch.zeros(1)}, "1 of unknown name (a.b)"),
        (state | {"ending.bias": torch.zeros(4)}, "1 of another shape (ending.bias (4,) instead of (3,))"),
        ({"w_z_f": torch.zeros(1), "conv": torch.zeros(1)}, "lack 'weight0', though 'w_z_f' is there"),
    ]:
        torch.save(held, path)
        assert words in refusal("nafnet", path)
    assert "no weights of rcdnet; it looks like NAFNet width 4, blocks (1, 1), 1, (2, 0)" in refusal("rcdnet", tiny)


def test_mask_average_equals_a_loop_over_masks() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 7)
    masks = (torch.rand(2, 5, 6, 7) < 0.2).float() * torch.tensor([1.0, 1 / 255])[:, None, None, None]
    masks[0, 3:] = 0  # fewer masks in the first picture
    official = torch.zeros_like(features)
    for out, feature, of_picture in zip(official, features, (masks[0, :3], masks[1]), strict=True):
        rest = 1 - of_picture.sum(0).clamp(0, 1)
        for mask in (*of_picture, rest):
            out += (feature * mask).sum((1, 2), keepdim=True) / (mask.sum() + 1e-8) * mask
    pooled = mask_average(features, masks)
    torch.testing.assert_close(pooled, official, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_average(features, masks), pooled)


def test_a_file_saved_from_a_gpu_loads(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read_official(tiny)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    for zipped in (True, False):
        torch.save({"params": state}, tiny, _use_new_zipfile_serialization=zipped)
        assert b"cuda:0" in tiny.read_bytes()
        assert all(tensor.device.type == "cpu" for tensor in read_official(tiny).values())

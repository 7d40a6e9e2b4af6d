"""Uformer: windows against pixel-by-pixel attention, the official square, stochastic depth.

The official nets' outputs and keys are in test_parity.py; what holds for every net, in test_all_nets.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_train.config import UformerConfig
from dist_train.nets import build_net
from dist_train.nets.stages import pass_on
from dist_train.nets.uformer import LeWinBlock, Uformer, drop_path, from_windows, shift_mask, to_windows
from tests.helpers.shared import parity

pytestmark = pytest.mark.unit

TINY: dict[str, Any] = {
    "embed_dim": 4, "depths": (2,) * 9, "num_heads": (1, 2, 2, 2, 4, 4, 2, 2, 2), "win_size": 2, "img_size": 32,
}  # fmt: skip


def new_net(**fields: Any) -> Uformer:
    """A tiny net (multiple of 32 px) with weights large enough that each of its parts shows."""
    torch.manual_seed(0)
    net = build_net(UformerConfig(**TINY | fields))
    assert isinstance(net, Uformer)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return net


def per_block(net: Uformer, attribute: str) -> dict[str, int]:
    return {name: getattr(block, attribute) for name, block in net.named_modules() if isinstance(block, LeWinBlock)}


@pytest.mark.parametrize("name", ["t_e4", "b_e4", "b_e4_img128", "s_noshift_e4"])
def test_windows_and_shifts_of_each_block_are_the_official_ones(name: str) -> None:
    ctor = torch.load(parity(f"uformer_{name}.pt"), weights_only=True)["ctor"]
    fields = {key: ctor[key] for key in ("img_size", "embed_dim", "win_size", "depths") if key in ctor}
    with torch.device("meta"):
        config = UformerConfig(**{"depths": (2,) * 9} | fields, shift=ctor.get("shift_flag", True))
        net: Any = build_net(config)
    assert per_block(net, "side") == ctor["win_size_per_block"]
    assert per_block(net, "shift") == ctor["shift_size_per_block"]


def test_a_small_img_size_shrinks_the_deep_windows_and_they_still_fit() -> None:
    net = new_net(win_size=8, img_size=48)  # maps of 48, 24, 12, 6, 3
    sides = per_block(net, "side")
    assert [sides[f"{stage.name}.blocks.0"] for stage in net.stages] == [8, 8, 8, 6, 3, 6, 8, 8, 8]
    lq = torch.rand(1, 3, 50, 20)
    assert net(lq).shape == lq.shape


@pytest.mark.parametrize(
    ("fields", "message"), [({"num_heads": (1, 2, 3, *(1,) * 6)}, "16 channels"), ({"img_size": 8}, "16")]
)
def test_sizes_that_cannot_be_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UformerConfig(**TINY | fields)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_attends_as_pixel_by_pixel(shift: int) -> None:
    side, height, width, heads, channels = 4, 8, 12, 2, 6
    torch.manual_seed(0)
    block = LeWinBlock(channels, num_heads=heads, side=side, shift=shift, mlp_ratio=2, modulator=True, drop_rate=0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    x = torch.randn(1, height, width, channels)
    attn, depth = block.attn, channels // heads

    def window(pixel: tuple[int, int]) -> tuple[int, int]:
        """Which window of the map as it lies; those cut by the border are smaller, nothing wraps around."""
        return (pixel[0] - shift) // side, (pixel[1] - shift) // side

    pixels = [(row, col) for row in range(height) for col in range(width)]
    expected = torch.zeros_like(x)
    for i in pixels:
        near = [j for j in pixels if window(j) == window(i)]

        def tokens(places: list[tuple[int, int]]) -> Tensor:
            offsets = torch.stack(
                [block.modulator.weight[(r - shift) % side * side + (c - shift) % side] for r, c in places]
            )
            return torch.stack([x[0, r, c] for r, c in places]) + offsets

        q = attn.qkv["to_q"](tokens([i]))
        k, v = attn.qkv["to_kv"](tokens(near)).chunk(2, 1)
        at = torch.tensor([(i[0] - r + side - 1) * (2 * side - 1) + i[1] - c + side - 1 for r, c in near])
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            logits = (k[:, part] @ q[0, part]) / depth**0.5 + attn.relative_position_bias_table[at, head]
            expected[0, i[0], i[1], part] = logits.softmax(0) @ v[:, part]
    mask = shift_mask(height, width, side=side, shift=shift, device=x.device)
    torch.testing.assert_close(block.attend(x, mask), attn.proj(expected), atol=1e-5, rtol=1e-5)


def test_windows_come_back() -> None:
    x = torch.rand(2, 8, 12, 3)
    windows = to_windows(x, 4)
    assert torch.equal(windows[1].reshape(4, 4, 3), x[0, :4, 4:8])
    assert torch.equal(from_windows(windows, 4, height=8, width=12), x)


def test_pictures_lie_in_the_middle_of_the_official_square() -> None:
    net = new_net().eval()
    lq = np.random.default_rng(0).random((2, 3, 37, 21), dtype=np.float32)
    square = np.zeros((2, 3, 64, 64), np.float32)
    square[:, :, 13:50, 21:42] = lq  # (64 - 37) // 2, (64 - 21) // 2
    with torch.no_grad():
        restored = net(torch.from_numpy(lq))
        whole = net.restore(torch.from_numpy(square), pass_on, None)
    assert torch.equal(restored, whole[:, :, 13:50, 21:42])
    assert net.padding(64, 64) == (0, 0, 0, 0) and net.padding(32, 64) == (0, 0, 16, 16)


def test_without_the_square_only_what_the_windows_need_is_added() -> None:
    square, free = new_net().eval(), new_net(square=False).eval()
    assert free.padding(37, 20) == (6, 6, 13, 14) and free.padding(32, 64) == (0, 0, 0, 0)
    fits = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(free(fits), square(fits))
        wide = torch.rand(1, 3, 32, 64)
        assert torch.equal(free(wide), free.restore(wide, pass_on, None))
        assert not torch.allclose(free(wide), square(wide))


def test_stochastic_depth() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(20000, 2, 3), 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped == dropped[:, :1, :1]).all()  # a sample is dropped as a whole
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)

    rates = per_block(new_net(drop_path_rate=0.7), "drop_rate").values()
    rising = [0.1 * i for i in range(8)]
    assert list(rates) == pytest.approx([*rising, 0.7, 0.7, *reversed(rising)])

    dropping, steady = new_net(drop_path_rate=0.5), new_net(drop_path_rate=0.0)
    lq = torch.rand(2, 3, 32, 32)

    def trained(net: Uformer, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return net.train()(lq)

    with torch.no_grad():
        assert torch.equal(trained(dropping, 1), trained(dropping, 1))
        assert not torch.equal(trained(dropping, 1), trained(dropping, 2))
        assert torch.equal(trained(steady, 1), steady.eval()(lq))
        assert torch.equal(dropping.eval()(lq), steady.eval()(lq))


def test_autocast_is_close_and_the_bias_tables_learn() -> None:
    net = new_net().train()
    lq = torch.rand(1, 3, 32, 32)
    exact = net.eval()(lq)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(lq)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    rough.float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_weights_start_as_published() -> None:
    block = build_net(UformerConfig(depths=(1,) * 9)).conv.blocks[0]
    assert block.mlp.linear1[0].weight.std().item() == pytest.approx(0.02, rel=0.02)  # truncated normal
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.proj.bias.any()

"""MobileSAM by timm's TinyViT: against the published formulas and names; the published file itself is not at hand."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config import SamConfig
from dist_train.priors import tiny_vit
from dist_train.priors.sam import load_sam_prior
from dist_train.priors.tiny_vit import TinyVitEncoder, build_mobile_sam, published_name
from tests.helpers.tiny_sam import LOOSE, picture

pytestmark = pytest.mark.unit
pytest.importorskip("timm", reason="MobileSAM is an extra")

State = dict[str, Tensor]

TINY: dict[str, Any] = {
    "embed_dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 3, 2, 2), "window_sizes": (7, 3, 4, 2),
}  # fmt: skip


def shake(module: torch.nn.Module) -> None:
    """Statistics, scales and biases as if trained; seeds of its own."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(1 + 0.3 * values.abs())
            else:
                tensor.copy_(values * (0.5 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))
            if name.endswith("attention_biases"):
                tensor.copy_(values)


def published(state: State) -> State:
    """As in MobileSAM's file, with the classifier that its TinyViT still carries."""
    left_over = {"norm_head.weight": (320,), "norm_head.bias": (320,), "head.weight": (1000, 320), "head.bias": (1000,)}
    return {published_name(name): value for name, value in state.items()} | {
        f"image_encoder.{name}": torch.zeros(shape) for name, shape in left_over.items()
    }


def slow_encoder(x: Tensor, state: State) -> Tensor:
    """MobileSAM's encoder from the formulas of TinyViT (Wu et al. 2022), token by token, by the published names."""

    def conv_bn(x: Tensor, name: str, *, stride: int = 1) -> Tensor:
        weight = state[f"{name}.c.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (
            state[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        gap = x - x.mean(-1, keepdim=True)
        return (
            gap / (gap.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]
        )

    def attention(tokens: Tensor, name: str, heads: int, side: int) -> Tensor:
        """(side^2,C): one window. Biases are numbered by (|dy|,|dx|) in the order in which these first occur."""
        places = list(itertools.product(range(side), range(side)))
        offsets: dict[tuple[int, int], int] = {}
        for (y1, x1), (y2, x2) in itertools.product(places, places):
            offsets.setdefault((abs(y1 - y2), abs(x1 - x2)), len(offsets))
        width = tokens.shape[1] // heads
        qkv = linear(norm(tokens, f"{name}.norm"), f"{name}.qkv")
        out = torch.empty_like(tokens)
        for head in range(heads):
            q, k, v = qkv[:, 3 * width * head : 3 * width * (head + 1)].split(width, 1)
            biases = state[f"{name}.attention_biases"][head]
            for i, (y1, x1) in enumerate(places):
                bias = torch.stack([biases[offsets[abs(y1 - y2), abs(x1 - x2)]] for y2, x2 in places])
                out[i, head * width : (head + 1) * width] = (k @ q[i] / math.sqrt(width) + bias).softmax(0) @ v
        return linear(out, f"{name}.proj")

    def block(x: Tensor, name: str, heads: int, side: int) -> Tensor:
        _, channels, height, width = x.shape
        padded = F.pad(x, (0, -width % side, 0, -height % side))
        attended = torch.zeros_like(padded)
        for top, left in itertools.product(range(0, padded.shape[2], side), range(0, padded.shape[3], side)):
            window = padded[0, :, top : top + side, left : left + side]
            found = attention(window.flatten(1).T, f"{name}.attn", heads, side)
            attended[0, :, top : top + side, left : left + side] = found.T.view(channels, side, side)
        x = x + attended[..., :height, :width]
        x = conv_bn(x, f"{name}.local_conv")
        tokens = x[0].flatten(1).T
        hidden = F.gelu(linear(norm(tokens, f"{name}.mlp.norm"), f"{name}.mlp.fc1"))
        return x + linear(hidden, f"{name}.mlp.fc2").T.view_as(x)

    assert len(x) == 1
    x = conv_bn(x, "patch_embed.seq.0", stride=2)
    x = conv_bn(F.gelu(x), "patch_embed.seq.2", stride=2)
    for layer in range(4):
        for i in range(TINY["depths"][layer]):
            name = f"layers.{layer}.blocks.{i}"
            if layer == 0:
                hidden = F.gelu(conv_bn(F.gelu(conv_bn(x, f"{name}.conv1")), f"{name}.conv2"))
                x = F.gelu(x + conv_bn(hidden, f"{name}.conv3"))
            else:
                x = block(x, name, TINY["num_heads"][layer], TINY["window_sizes"][layer])
        if layer < 3:  # 4, 8, 16, and 16 again
            name = f"layers.{layer}.downsample"
            x = F.gelu(conv_bn(x, f"{name}.conv1"))
            x = F.gelu(conv_bn(x, f"{name}.conv2", stride=2 if layer < 2 else 1))
            x = conv_bn(x, f"{name}.conv3")
    for conv in (0, 2):
        x = F.conv2d(x, state[f"neck.{conv}.weight"], padding=conv // 2)
        x = norm(x.movedim(1, -1), f"neck.{conv + 1}", eps=1e-6).movedim(-1, 1)
    return x


def test_the_encoder_is_that_of_the_published_formulas() -> None:
    encoder = TinyVitEncoder(80, **TINY).double()
    shake(encoder)
    encoder.eval()  # as in loading, after the weights have come
    names = {
        name: published_name(f"image_encoder.{name}").removeprefix("image_encoder.") for name in encoder.state_dict()
    }
    state = {names[name]: value for name, value in encoder.state_dict().items()}
    x = torch.randn(1, 3, 80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = slow_encoder(x, state)
        assert wanted.shape == (1, 256, 5, 5)
        torch.testing.assert_close(encoder(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_strips_and_parts_are_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TinyVitEncoder(112, **TINY).double().requires_grad_(False).eval()
    shake(encoder)
    x = torch.randn(2, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = list[int]()
    encoder.trunk["patch_embed"].register_forward_hook(lambda net, given, made: seen.append(made.shape[2]))
    monkeypatch.setattr(tiny_vit, "_STRIP_ROWS", 112)
    with torch.no_grad():
        whole = encoder(x)
        monkeypatch.setattr(tiny_vit, "_STRIP_ROWS", rows)
        monkeypatch.setattr(tiny_vit, "_PART_NUMBERS", 1000)
        torch.testing.assert_close(encoder(x), whole, rtol=0, atol=1e-12 * whole.abs().max().item())
    assert seen[0] == 28 and len(seen) == 1 + -(-28 // rows) and max(seen[1:]) <= rows + 2
    seen.clear()
    encoder(x)  # with gradients there are no strips
    assert seen == [28]


@pytest.mark.parametrize("generator", ["reference", "batched"])
def test_smaller_inputs_are_a_setting(generator: str, tmp_path: Path) -> None:
    from segment_anything import SamAutomaticMaskGenerator

    path, few = tmp_path / "mobile_sam.pt", {**LOOSE, "points_per_side": 2}
    sam = build_mobile_sam(None, input_px=128)
    torch.save(published(sam.state_dict()), path)
    config = SamConfig(
        model="tiny_vit", checkpoint=str(path), input_px=128, generator=generator, dtype="fp32", num_masks=99, **few
    )
    found = load_sam_prior(config, torch.device("cpu"))(torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255)
    records = [r for r in SamAutomaticMaskGenerator(sam, **few).generate(picture()) if r["area"]]
    mine = [mask.numpy() for mask in found.masks[0][found.valid[0]]]
    assert len(mine) == len(records) > 0
    for record in records:  # rounding moves single pixels
        assert max((mask == record["segmentation"]).mean() for mask in mine) > 0.99


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    sam = build_mobile_sam(None)
    state = published(sam.state_dict())
    assert len(state) == 439 and len(sam.state_dict()) == 435
    assert sum(parameter.numel() for parameter in sam.image_encoder.parameters()) == 5_743_892
    # 40,728,226 bytes: the numbers, and about 380 bytes of archive for each tensor.
    archive = 40_728_226 - sum(value.numel() * value.element_size() for value in state.values())
    assert 360 < archive / len(state) < 400
    for name, shape in {
        "patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "patch_embed.seq.2.bn.running_mean": (64,),
        "layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
        "layers.0.downsample.conv1.c.weight": (128, 64, 1, 1),
        "layers.1.blocks.0.attn.attention_biases": (4, 49),
        "layers.2.blocks.5.attn.attention_biases": (5, 196),
        "layers.2.blocks.5.attn.qkv.weight": (480, 160),
        "layers.2.downsample.conv2.c.weight": (320, 1, 3, 3),
        "layers.3.blocks.1.local_conv.c.weight": (320, 1, 3, 3),
        "layers.3.blocks.1.mlp.fc1.weight": (1280, 320),
        "neck.0.weight": (256, 320, 1, 1),
        "neck.3.bias": (256,),
    }.items():
        assert state[f"image_encoder.{name}"].shape == shape, name
    assert not any("trunk" in name or "stages" in name or ".conv." in name or "bias_idxs" in name for name in state)


def test_a_file_goes_in_as_it_is_and_comes_out_the_same() -> None:
    source = build_mobile_sam(None)
    shake(source)
    state = published(source.state_dict())
    before = torch.random.get_rng_state()
    sam = build_mobile_sam(state, input_px=64)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not sam.training and not any(parameter.requires_grad for parameter in sam.parameters())
    back = {published_name(name): value for name, value in sam.state_dict().items()}
    assert back.keys() == {name for name in state if "head.bias" not in name and "head.weight" not in name}
    assert all(torch.equal(value, state[name]) for name, value in back.items())


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"here: not the weights of MobileSAM .*looks like SAM vit_b"):
        build_mobile_sam({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, setting="here", input_px=64)
    state = published(build_mobile_sam(None, input_px=64).state_dict())
    state["image_encoder.layers.2.blocks.0.attn.attention_biases"] = torch.zeros(5, 49)
    with pytest.raises(ValueError, match=r"attention_biases is of shape \(5, 49\), not \(5, 196\)"):
        build_mobile_sam(state, input_px=64)


def test_the_official_generator_takes_it() -> None:
    from segment_anything import SamAutomaticMaskGenerator

    sam = build_mobile_sam(None, input_px=128)
    records = SamAutomaticMaskGenerator(sam, **{**LOOSE, "points_per_side": 2}).generate(picture())
    assert records and records[0]["segmentation"].shape == picture().shape[:2]
    with torch.no_grad():
        pictures = torch.rand(2, 3, 128, 128)
        embeddings = sam.image_encoder(pictures)
        assert embeddings.shape == (2, 256, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            half = sam.image_encoder(pictures).float()
    assert (half - embeddings).norm() / embeddings.norm() < 0.05


def test_one_graph_holds_from_the_first_pass_on() -> None:
    """The cache of timm's attention is full beforehand: no second compilation, no tensor left behind by a graph."""
    encoder = TinyVitEncoder(64, **TINY).requires_grad_(False).eval()
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(encoder, fullgraph=True, backend=keep)
    x = torch.rand(1, 3, 64, 64)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), encoder(x))
    assert len(graphs) == 1

"""MobileSAM (Zhang et al. 2023): SAM's prompt encoder and mask decoder behind a TinyViT of timm, its file as published.

The traps on the way are met here. timm's registry is not asked for the net, since whoever imports MobileSAM's own code
puts another class there under the same name. TinyViT's attention reads its biases by a table of indices that no file
holds, and in evaluation from a cache, which is filled whenever the encoder is put into evaluation: weights loaded
later would not be heeded.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.priors.weights import check_state
from dist_train.room import give_back_freed_memory

_WIDTH = 256  # of the embedding of a picture
# On a CPU, which is faster with what fits its cache; a picture of 1024 px as a whole needs 270 MB.
_STRIP_ROWS = 16
_PART_NUMBERS = 2**18


class TinyVitEncoder(nn.Module):
    """TinyViT-5M whose last stage stays at stride 16, and the neck of SAM's own encoder.

    It has no table of positions, so that any input size that is a multiple of 16 will do.

    Args:
        img_size: side of the input, which segment_anything reads.
        embed_dims: channels of the four stages.
        depths: blocks of each.
        num_heads: heads of each; the first stage, of convolutions, has none.
        window_sizes: side of the windows of each, in pixels of the stage.
        out_chans: channels of the embedding.

    Raises:
        ValueError: timm is missing.
    """

    def __init__(
        self,
        img_size: int,
        *,
        embed_dims: tuple[int, ...] = (64, 128, 160, 320),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (2, 4, 5, 10),
        window_sizes: tuple[int, ...] = (7, 7, 14, 7),
        out_chans: int = _WIDTH,
    ):
        try:
            from timm.models.tiny_vit import TinyVit
        except ImportError as error:
            raise ValueError(f"prior.model=tiny_vit needs timm ({error}): pip install 'restill[mobilesam]'") from error
        from segment_anything.modeling.common import LayerNorm2d

        super().__init__()
        self.img_size = img_size
        net = TinyVit(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, window_sizes=window_sizes, drop_path_rate=0.0
        )
        net.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.trunk = nn.ModuleDict({"patch_embed": net.patch_embed, "stages": net.stages})  # the head stays behind
        for stage in net.stages[1:]:
            for block in stage.blocks:
                block.attn.forward = partial(_by_parts, block.attn.forward, 0)  # windows by themselves
                block.mlp.forward = partial(_by_parts, block.mlp.forward, 1)  # pixels by themselves
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dims[-1], out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """(B,3,S,S), normalised as SAM does it, to (B,256,S/16,S/16)."""
        first, *stages = self.trunk["stages"]
        rows = _STRIP_ROWS if _in_parts(pictures) else pictures.shape[2]
        x = by_strips(self.trunk["patch_embed"], pictures, shrink=4, rows=rows)
        for block in first.blocks:
            x = by_strips(block, x, shrink=1, rows=rows)
        x = by_strips(stages[0].downsample, x, shrink=2, rows=rows)
        _tidy(x)
        x = stages[0].blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for stage in stages[1:]:
            _tidy(x)
            x = stage(x)
        return self.neck(x)

    def train(self, mode: bool = True) -> "TinyVitEncoder":
        """See `nn.Module.train`. In evaluation the biases of attention are laid out now, so that the first pass is as
        all others, for a compiler and for a CUDA graph."""
        super().train(mode)
        if not mode:
            for module in self.modules():
                if hasattr(module, "get_attention_biases"):
                    module.get_attention_biases(module.attention_biases.device)
        return self


def by_strips(net: nn.Module, x: Tensor, *, shrink: int, rows: int) -> Tensor:
    """What `net` makes of x, but strip by strip, so that what lies between its layers is never there as a whole.

    Args:
        net: whose rows depend on no more than the next row of its output above and below, such as one 3x3 convolution
            between 1x1 ones. At the edges of x it sees its own padding, elsewhere x.
        x: (B,C,H,W).
        shrink: H divided by the rows that come out.
        rows: of the output, of a strip.
    """
    num = x.shape[2] // shrink
    if num <= rows:
        return net(x)
    _tidy(x)
    out: Tensor | None = None
    for top in range(0, num, rows):
        bottom = min(top + rows, num)
        first, last = max(top - 1, 0), min(bottom + 1, num)
        part = net(x[:, :, first * shrink : last * shrink])
        if out is None:  # at once, lest small strips lie scattered between what is freed
            out = part.new_empty(*part.shape[:2], num, part.shape[3])
        out[:, :, top:bottom] = part[:, :, top - first : bottom - first]
    assert out is not None
    return out


def _by_parts(forward: Callable[[Tensor], Tensor], dim: int, x: Tensor) -> Tensor:
    """What `forward` makes of x, to whom the places along `dim` are independent and which keeps the shape."""
    if not _in_parts(x) or x.numel() <= _PART_NUMBERS:
        return forward(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num = -(-x.numel() // _PART_NUMBERS)
    for part, into in zip(x.chunk(num, dim), out.chunk(num, dim), strict=True):
        into.copy_(forward(part))
    return out


def _tidy(x: Tensor) -> None:
    """Before the next step of a large picture: what one leaves free is of other sizes than what the next one wants."""
    if _in_parts(x) and x.numel() > _PART_NUMBERS:
        give_back_freed_memory()


def _in_parts(x: Tensor) -> bool:
    # A compiler would make each part one more graph; batch norms that learn would see parts alone.
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def build_mobile_sam(state: Mapping[str, Tensor] | None, *, setting: str = "state", input_px: int = 1024) -> Any:
    """A `segment_anything.modeling.Sam`, frozen and in evaluation mode, on the CPU in float32.

    Args:
        state: of the published `mobile_sam.pt`, under its own names; None: random weights, the same every time.
        setting: what the user wrote to give it, for errors.
        input_px: side of the picture that the encoder sees; 1024 is what the weights were trained for.

    Raises:
        ValueError: timm is missing, or `state` is of another net.
    """
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = input_px // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = Sam(
            image_encoder=TinyVitEncoder(input_px),
            prompt_encoder=PromptEncoder(
                embed_dim=_WIDTH,
                image_embedding_size=(grid, grid),
                input_image_size=(input_px, input_px),
                mask_in_chans=16,
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=_WIDTH,
                transformer=TwoWayTransformer(depth=2, embedding_dim=_WIDTH, num_heads=8, mlp_dim=2048),
                iou_head_hidden_dim=_WIDTH,
            ),
        )
    if state is not None:
        names = {name: published_name(name) for name in sam.state_dict()}
        wanted = {names[name]: value.shape for name, value in sam.state_dict().items()}
        check_state(state, wanted, setting=setting, what="MobileSAM (mobile_sam.pt)")
        sam.load_state_dict({name: state[published] for name, published in names.items()})
    return sam.requires_grad_(False).eval()


def published_name(name: str) -> str:
    """How `mobile_sam.pt` calls a tensor of `build_mobile_sam`'s state dict.

    timm merges patches at the start of a stage, MobileSAM at the end of the one before; convolutions are named c there.
    Left over in the file are norm_head and head, of the classifier that TinyViT once was.
    """
    name = name.replace("image_encoder.trunk.", "image_encoder.")
    name = re.sub(r"\.patch_embed\.conv([12])\.", lambda found: f".patch_embed.seq.{2 * int(found[1]) - 2}.", name)
    name = re.sub(r"\.stages\.(\d)\.downsample\.", lambda found: f".layers.{int(found[1]) - 1}.downsample.", name)
    return name.replace(".stages.", ".layers.").replace(".conv.", ".c.")

"""SAM's mask decoder with its sums re-ordered, so that a batch of pictures with a thousand prompts each is affordable.

The numbers are those of segment_anything's `MaskDecoder` with `multimask_output=True`, on its own weights; only the
order of additions differs (1e-15 in float64). The two-way transformer lets T tokens (quality, masks, point, padding: 7)
look at N tokens of the picture (64 x 64) and back. Four things are saved, per prompt of SAM's 1.81 GMAC more than half:

1. Until the first layer has written to them, the picture's tokens are the same for all prompts of a picture: they are
   projected once per picture.
2. Later they differ by prompt, but only T tokens meet them. With W the projection of one head,
   `q . (W x_n) = (W' q) . x_n` and `sum_n p_n W x_n = W sum_n p_n x_n`: T x heads (56) vectors are projected in place
   of N (4096). Of the positions `W position_n` is the same for all prompts and pictures. A bias of the keys adds the
   same to every score of a softmax, and drops out.
3. What is not read is not computed: the mask for single output, and the last look at the picture of the tokens that
   end there.
4. A transposed convolution whose stride is its kernel is a linear layer on each pixel by itself, so the mask head works
   on rows of channels, and only the finished masks are put in order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Shared(NamedTuple):
    """What all prompts of a picture have in common; see `share`.

    Attributes:
        pixels: (B,N,C) tokens of the pictures.
        values: (B,heads,N,d) what the tokens see of them in the first layer.
        keys: (B or 1,heads,N,d) for each look of the tokens at the picture, the last one included: of pixels and
            positions for the first, of positions alone for the others.
        queries: likewise for each look of the picture at the tokens.
        grid: rows and columns of the N tokens.
    """

    pixels: Tensor
    values: Tensor
    keys: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    grid: tuple[int, int]


def share(decoder: Any, embeddings: Tensor, positions: Tensor) -> Shared:
    """Do once per batch of pictures what does not depend on the prompts.

    Args:
        decoder: a `segment_anything.modeling.MaskDecoder`.
        embeddings: (B,C,h,w) of the image encoder, plus the prompt encoder's dense embedding.
        positions: (1,C,h,w), of `PromptEncoder.get_dense_pe`.
    """
    pixels, places = embeddings.flatten(2).mT.contiguous(), positions.flatten(2).mT
    first, *later = decoder.transformer.layers
    last = decoder.transformer.final_attn_token_to_image
    looks = [first.cross_attn_token_to_image, *(layer.cross_attn_token_to_image for layer in later), last]
    backs = [first.cross_attn_image_to_token, *(layer.cross_attn_image_to_token for layer in later)]
    seen = [pixels + places] + [places] * len(later) + [places]
    return Shared(
        pixels=pixels,
        values=_heads(looks[0].v_proj(pixels), looks[0]),
        keys=tuple(_heads(look.k_proj(x), look) for look, x in zip(looks, seen, strict=True)),
        queries=tuple(_heads(back.q_proj(x), back) for back, x in zip(backs, seen[:-1], strict=True)),
        grid=(embeddings.shape[2], embeddings.shape[3]),
    )


def decode(decoder: Any, shared: Shared, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The masks that prompts mean, as `MaskDecoder` gives them with `multimask_output=True`.

    Args:
        decoder: a `segment_anything.modeling.MaskDecoder`.
        shared: of the same decoder, for B pictures.
        prompts: (B or 1,P,S,C) sparse embeddings of the prompt encoder: P prompts of S tokens; with 1, the same ones
            for each picture.

    Returns:
        Logits (B,P,M,4h,4w) of M = 3 masks, and their predicted IoU (B,P,M).
    """
    transformer, num_masks = decoder.transformer, decoder.num_mask_tokens
    num_pictures, num_prompts = len(shared.pixels), prompts.shape[1]
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(prompts)
    outputs = outputs.expand(num_pictures, num_prompts, -1, -1)
    asked = torch.cat([outputs, prompts.expand(num_pictures, -1, -1, -1)], 2)  # (B,P,T,C)

    tokens, pixels = asked, None  # None: still those of the picture, for all prompts alike
    for index, layer in enumerate(transformer.layers):
        tokens = layer.norm1(_self_attention(layer, tokens, asked))
        look = layer.cross_attn_token_to_image
        tokens = layer.norm2(tokens + _look(look, tokens + asked, pixels, shared, index))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        pixels = _write(layer.cross_attn_image_to_token, tokens + asked, tokens, pixels, shared, index)
        pixels = layer.norm4(pixels)
    assert pixels is not None

    # What is read: the quality, and the masks but the one for single output.
    tokens, asked = (torch.cat([x[:, :, :1], x[:, :, 2 : 1 + num_masks]], 2) for x in (tokens, asked))
    tokens = tokens + _look(transformer.final_attn_token_to_image, tokens + asked, pixels, shared, -1)
    tokens = transformer.norm_final_attn(tokens)

    networks = list(decoder.output_hypernetworks_mlps)[1:]
    weights = torch.stack([network(tokens[:, :, 1 + m]) for m, network in enumerate(networks)], 2)
    head = decoder.iou_prediction_head
    quality = head(tokens[:, :, 0].to(head.layers[0].weight.dtype))[..., 1:]
    return _masks(decoder.output_upscaling, pixels, weights, shared.grid), quality


def _heads(x: Tensor, attention: Any) -> Tensor:
    """(...,n,C) -> (...,heads,n,d)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)


def _by_head(weight: Tensor, attention: Any) -> Tensor:
    """Weight of a projection to the heads: (heads x d,C) -> (heads,d,C)."""
    return weight.unflatten(0, (attention.num_heads, -1))


def _self_attention(layer: Any, tokens: Tensor, asked: Tensor) -> Tensor:
    if layer.skip_first_layer_pe:
        x = tokens.flatten(0, 1)
        return layer.self_attn(q=x, k=x, v=x).view_as(tokens)
    x = (tokens + asked).flatten(0, 1)
    return tokens + layer.self_attn(q=x, k=x, v=tokens.flatten(0, 1)).view_as(tokens)


def _look(attention: Any, asking: Tensor, pixels: Tensor | None, shared: Shared, index: int) -> Tensor:
    """Attention of the tokens to the picture: (B,P,T,C) -> (B,P,T,C)."""
    queries = _heads(attention.q_proj(asking), attention)  # (B,P,heads,T,d)
    num_prompts, num_heads, num_tokens, width = queries.shape[1:]
    if pixels is None:
        together = queries.transpose(1, 2).flatten(2, 3)  # (B,heads,P x T,d)
        found = F.scaled_dot_product_attention(together, shared.keys[index], shared.values)
        found = found.unflatten(2, (num_prompts, num_tokens)).permute(0, 2, 3, 1, 4)
        return attention.out_proj(found.flatten(-2))
    queries = queries * width**-0.5
    inward = torch.einsum("bphtd,hdc->bphtc", queries, _by_head(attention.k_proj.weight, attention))
    scores = inward.flatten(2, 3) @ pixels.mT  # (B,P,heads x T,N)
    scores = scores.unflatten(2, (num_heads, -1)) + torch.einsum("bphtd,bhnd->bphtn", queries, shared.keys[index])
    found = (scores.softmax(-1).flatten(2, 3) @ pixels).unflatten(2, (num_heads, -1))  # (B,P,heads,T,C)
    values = torch.einsum("bphtc,hdc->bpthd", found, _by_head(attention.v_proj.weight, attention))
    return attention.out_proj(values.flatten(-2) + attention.v_proj.bias)


def _write(attention: Any, asking: Tensor, tokens: Tensor, pixels: Tensor | None, shared: Shared, index: int) -> Tensor:
    """The pixels plus their attention to the tokens: (B,P,N,C)."""
    keys, values = _heads(attention.k_proj(asking), attention), _heads(attention.v_proj(tokens), attention)
    num_heads, _, width = keys.shape[2:]
    keys = keys * width**-0.5
    scores = torch.einsum("bphtd,bhnd->bphtn", keys, shared.queries[index])
    if pixels is not None:
        inward = torch.einsum("bphtd,hdc->bphtc", keys, _by_head(attention.q_proj.weight, attention))
        scores = (inward.flatten(2, 3) @ pixels.mT).unflatten(2, (num_heads, -1)) + scores
    weights = scores.softmax(3).flatten(2, 3)  # (B,P,heads x T,N)
    # A pixel's weights sum to 1 in each head, so the bias can be spread over the heads.
    out = torch.einsum("bphtd,chd->bphtc", values, attention.out_proj.weight.unflatten(1, (num_heads, -1)))
    out = (out + attention.out_proj.bias / num_heads).flatten(2, 3)
    if pixels is None:
        pixels = shared.pixels[:, None].repeat(1, tokens.shape[1], 1, 1)
    pixels.flatten(0, 1).baddbmm_(weights.mT.flatten(0, 1), out.flatten(0, 1))  # they are ours: nobody else has them
    return pixels


def _masks(upscaling: nn.Sequential, pixels: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Upscale four times and weigh the channels: (B,P,N,C), (B,P,M,c) -> (B,P,M,4h,4w)."""
    grow_1, norm, act_1, grow_2, act_2 = upscaling
    x = act_1(F.layer_norm(_grow(grow_1, pixels), norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = act_2(_grow(grow_2, x))  # (B,P,N,4,4,c): both times the four pixels that one becomes
    logits = weights @ x.flatten(2, 4).mT
    logits = logits.unflatten(-1, (*grid, 2, 2, 2, 2))
    return logits.permute(0, 1, 2, 3, 5, 7, 4, 6, 8).flatten(6).flatten(3, 5)


def _grow(layer: Any, x: Tensor) -> Tensor:
    """A transposed convolution with stride = kernel = 2: (...,C) -> (...,4,c), the four by row and column."""
    assert layer.stride == layer.kernel_size == (2, 2)
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 x 2 x c,C)
    return F.linear(x, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))

"""A Segment Anything of the published classes, small enough for a test; its weights are random, its masks nonsense."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SIZE_PX = 128

# A random SAM is unsure of all it finds: let everything pass.
LOOSE = {
    "points_per_side": 6,
    "points_per_batch": 16,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 0.9,
}


def tiny_sam(seed: int = 2) -> Any:
    """Image encoder 32 wide and 2 deep, pictures of 128 px; the same weights for the same seed."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = SIZE_PX // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=SIZE_PX,
                embed_dim=32,
                depth=2,
                num_heads=2,
                out_chans=32,
                use_rel_pos=True,
                window_size=4,
                global_attn_indexes=(1,),
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(SIZE_PX, SIZE_PX), mask_in_chans=4
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=32,
                transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=64),
                iou_head_hidden_dim=32,
            ),
        )
        # Untrained, all points give one mask: let positions vary over the picture, and let points be heeded.
        coarse = torch.randn(1, 32, 3, 3, generator=torch.Generator().manual_seed(seed))
        positions = torch.nn.functional.interpolate(coarse, (grid, grid), mode="bicubic", align_corners=True)
        with torch.no_grad():
            sam.image_encoder.pos_embed.copy_(2 * positions.permute(0, 2, 3, 1))
            sam.mask_decoder.mask_tokens.weight.mul_(0.3)
            for name, parameter in sam.mask_decoder.named_parameters():
                if "attn" in name and name.endswith("weight"):
                    parameter.mul_(4)
    return sam


def picture(height: int = 96, width: int = 80) -> np.ndarray:
    """(H,W,3) uint8, red on the left, blue below, some texture."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    return np.stack([200 - 2 * columns + noise // 2, 60 + noise, 2 * rows], 2).clip(0, 255).astype(np.uint8)


class AnalyticSam(torch.nn.Module):
    """A stand-in for SAM whose masks mean something: near the point, and of a colour like that at the point.

    It goes through segment_anything's own generator and, by `share` and `decode` in the place of
    `dist_train.priors.sam_decoder`'s, through ours. Only sums, products and quotients of single numbers lead to its
    logits, so that they are the same to the last bit however prompts and pictures are batched.
    """

    mask_threshold, image_format = 0.0, "RGB"

    def __init__(self, seed: int = 0, size_px: int = 256):
        from segment_anything.modeling import Sam

        super().__init__()
        random = np.random.default_rng(seed)
        self.reach, self.spread = random.uniform([0.2, 0.6, 1.5], [0.4, 1.2, 3.0]), random.uniform(0.5, 12.0, 3)
        self.mix = random.uniform(1.0, 4.0, 3)
        self.image_encoder = _Encoder(size_px)
        self.prompt_encoder = _Prompts(size_px)
        self.mask_decoder = _Decoder(self)
        self.register_buffer("pixel_mean", torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1))
        self.preprocess = lambda x: Sam.preprocess(self, x)
        self.postprocess_masks = lambda *args: Sam.postprocess_masks(self, *args)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def share(self, decoder: Any, embeddings: torch.Tensor, positions: torch.Tensor) -> Any:
        return SimpleNamespace(pixels=embeddings)

    def decode(self, decoder: Any, shared: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `dist_train.priors.sam_decoder.decode`."""
        picture = torch.nn.functional.pixel_shuffle(shared.pixels, 4)  # (B,3,n,n), a quarter of the input's side
        batch, _, side, _ = picture.shape
        point = prompts[:, :, 0, :2].expand(batch, -1, -1)
        x, y = point.unbind(-1)
        place = (y * side).long() * side + (x * side).long()
        colour = picture.flatten(2).gather(2, place[:, None].expand(-1, 3, -1))  # (B,3,P)
        difference = picture[:, :, None] - colour[..., None, None]
        unlike = sum(d * d for d in difference.unbind(1))  # (B,P,n,n)
        at = (torch.arange(side) + 0.5) / side
        across, down = at - x[..., None, None], at[:, None] - y[..., None, None]
        far = across * across + down * down
        logits = [8 * (tau - unlike - spread * far) for tau, spread in zip(self.reach, self.spread, strict=True)]
        hue = sum(float(weight) * colour[:, c] for c, weight in enumerate(self.mix)) + 3 * x + 5 * y
        quality = torch.stack([hue + 0.37 * m for m in range(3)], -1)
        return torch.stack(logits, 2), 0.7 + 0.3 * (quality - quality.floor())


class _Encoder(torch.nn.Module):
    def __init__(self, size_px: int):
        super().__init__()
        self.img_size = size_px

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(pictures[..., ::4, ::4], 4)  # (B,48,side/16,side/16)


class _Prompts(torch.nn.Module):
    def __init__(self, size_px: int):
        super().__init__()
        self.size_px, self.mask_input_size = size_px, (size_px // 4, size_px // 4)

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1, 48, self.size_px // 16, self.size_px // 16)

    def forward(self, points: Any, boxes: None, masks: None) -> tuple[torch.Tensor, torch.Tensor]:
        place = ((points[0] + 0.5) / self.size_px).float()  # (P,1,2)
        return torch.nn.functional.pad(place, (0, 46)), self.get_dense_pe().expand(len(place), -1, -1, -1)


class _Decoder(torch.nn.Module):
    def __init__(self, sam: AnalyticSam):
        super().__init__()
        self._decode = sam.decode  # a bound method: registers no module

    def forward(self, *, image_embeddings: torch.Tensor, sparse_prompt_embeddings: torch.Tensor, **_: Any) -> Any:
        logits, quality = self._decode(None, SimpleNamespace(pixels=image_embeddings), sparse_prompt_embeddings[None])
        return logits[0], quality[0]

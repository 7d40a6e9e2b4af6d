"""A Segment Anything of the published classes, small enough for a test; its weights are random, its masks nonsense."""

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

"""SAM's automatic mode for a batch of pictures: the masks of `SamAutomaticMaskGenerator`, no step waiting for another.

segment_anything goes picture by picture, makes every mask at the size of its input (1024), and comes back to the host
for each filter and each mask. Here all prompts of all pictures go through `sam_decoder` in chunks of fixed size;
of each chunk only scores and boxes are kept; suppression is a fixed number of rounds on a fixed matrix; and the
masks that are left, K at most, are decoded a second time and made at full size. All shapes are known beforehand and
nothing is read back, so `segment` is one graph for `torch.compile(fullgraph=True)`.

Two rules of the reference have no code here. The one against boxes at the edge of a crop never fires where the crop is
the picture. And empty masks, which can only pass where the thresholds are 0, take no part; they suppress nothing there.
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train.priors.masks import MaskSet, finite
from dist_train.priors.sam_attention import use_fused_attention
from dist_train.priors.sam_decoder import Shared, decode, share
from dist_train.priors.sam_filters import choose, measure
from dist_train.priors.sam_resize import Taps, logit_taps, picture_taps, resample, resample_u8
from dist_train.room import give_back_freed_memory


class Frame(NamedTuple):
    """What depends on the size of a picture alone, on SAM's device.

    Attributes:
        size: height and width of the picture.
        input_size: of the picture as SAM sees it, the longer side as long as SAM's input.
        rows: taps of the picture's resize, vertically.
        columns: horizontally.
        logit_rows: taps from logits to the picture, vertically.
        logit_columns: horizontally.
        prompts: (1,P,S,C) sparse embeddings of the grid of points.
        positions: (1,C,h,w) embedding of the places in the picture.
        dense: (1,C,h,w) embedding of "no mask given".
    """

    size: tuple[int, int]
    input_size: tuple[int, int]
    rows: Taps
    columns: Taps
    logit_rows: Taps
    logit_columns: Taps
    prompts: Tensor
    positions: Tensor
    dense: Tensor


class AutomaticMasks:
    """A frozen SAM in automatic mode, crops off.

    Args:
        sam: a `segment_anything.modeling.Sam`, or anything with its parts, on its device. It is taken over: frozen, in
            evaluation mode, a ViT encoder made to use fused attention, the decoder cast to `dtype`.
        num_masks: K of the result; of more, those with the highest predicted IoU are kept.
        points_per_side: of the grid of prompts.
        points_per_batch: prompts, of the pictures together but at least one of each, that are decoded at a time. It
            bounds the memory: about 45 MB each in float32. A CPU is fastest at 1 or 2, what fits its cache, and at more
            where the encoder's input is smaller than 1024.
        pictures_per_batch: pictures that go through at a time; none: all. The encoder's memory grows with it. A GPU is
            faster with all; a CPU is not, and slower where they leave its cache.
        pred_iou_thresh: masks whose predicted IoU is not above it go; 0: none.
        stability_score_thresh: masks whose stability is below it go; 0: none.
        stability_score_offset: see `measure`.
        box_nms_thresh: of two masks whose boxes' IoU is above it the one with the lower predicted IoU goes.
        nms_candidates: see `choose`.
        nms_rounds: see `suppress`.
        dtype: half precision of encoder (by autocast) and decoder; none: float32. Scores and masks are float32.
        compiled: each step, not their loop, is compiled, once for each shape; minutes at the first call.
    """

    def __init__(
        self,
        sam: Any,
        *,
        num_masks: int = 32,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pictures_per_batch: int | None = None,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        nms_candidates: int = 1024,
        nms_rounds: int = 31,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ):
        self._sam = sam.requires_grad_(False).eval()
        self._num_masks, self._points_per_side = num_masks, points_per_side
        self._points_per_batch, self._pictures_per_batch = points_per_batch, pictures_per_batch
        self._pred_iou_thresh, self._stability_score_thresh = pred_iou_thresh, stability_score_thresh
        self._stability_score_offset, self._box_nms_thresh = stability_score_offset, box_nms_thresh
        self._nms_candidates, self._nms_rounds, self._dtype = nms_candidates, nms_rounds, dtype
        if hasattr(sam.image_encoder, "blocks"):
            use_fused_attention(sam.image_encoder)
        if dtype is not None:
            sam.mask_decoder.to(dtype)
            sam.mask_decoder.iou_prediction_head.float()  # what ranks the masks should not be full of ties
        self.frame = lru_cache(maxsize=8)(self._frame)  # 6 MB each at 32 x 32 points
        wrap: Any = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else lambda step: step
        self._look, self._score, self._finish = wrap(self._look_at), wrap(self._score_some), wrap(self._finish_some)
        self._choose = wrap(choose)

    def __call__(self, images: Tensor) -> MaskSet:
        """Segment pictures of one size.

        Args:
            images: (B,3,H,W) RGB, any float dtype; clamped to [0,1] and rounded to 8 bits. Of a picture that is not
                finite no masks are found.

        Returns:
            `num_masks` masks a picture, largest first, on the device of the images.
        """
        with torch.no_grad(), torch.autocast(self._sam.device.type, enabled=False):
            frame = self.frame(*images.shape[-2:])
            found = []
            for group in images.to(self._sam.device).split(self._pictures_per_batch or len(images)):
                if group.device.type == "cpu":  # the encoder's blocks do not fit the gaps that prompts leave
                    give_back_freed_memory()
                found.append(self.segment(group, frame))
            masks, valid = map(torch.cat, zip(*found, strict=True))
        return MaskSet(masks, valid).to(images.device)

    def segment(self, images: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """The path itself: (B,3,H,W) on SAM's device -> masks (B,K,H,W) bool and valid (B,K) bool."""
        shared = self._look(images, frame)
        at_once = max(self._points_per_batch // len(images), 1)
        chunks = (self._score(shared, prompts, frame) for prompts in frame.prompts.split(at_once, 1))
        scores, boxes, valid = _joined(chunks, frame.prompts.shape[1])  # (B,P,M), per prompt
        chosen, found = self._choose(
            scores.flatten(1),
            boxes.flatten(1, 2),
            valid.flatten(1) & finite(images),
            iou_threshold=self._box_nms_thresh,
            candidates=self._nms_candidates,
            rounds=self._nms_rounds,
            num_masks=self._num_masks,
        )
        finished = ((self._finish(shared, part, scores.shape[2], frame),) for part in chosen.split(at_once, 1))
        (masks,) = _joined(finished, chosen.shape[1])
        masks &= found[:, :, None, None]
        area = masks.view(torch.uint8).sum((2, 3), dtype=torch.int32)  # as `largest_first`, for a CPU
        order = area.sort(descending=True, stable=True).indices
        return masks.gather(1, order[:, :, None, None].expand_as(masks)), area.gather(1, order) > 0

    def _look_at(self, images: Tensor, frame: Frame) -> Shared:
        u8 = (images.float().nan_to_num().clamp(0, 1) * 255 + 0.5).int()
        # As `Sam.preprocess`, but where the pictures lie: 12 MB each, which it would have four times.
        pictures = resample_u8(u8, frame.rows, frame.columns).float()
        pictures = pictures.sub_(self._sam.pixel_mean).div_(self._sam.pixel_std)
        below, beside = (self._sam.image_encoder.img_size - side for side in frame.input_size)
        if below or beside:
            pictures = F.pad(pictures, (0, beside, 0, below))
        with torch.autocast(pictures.device.type, self._dtype, enabled=self._dtype is not None):
            embeddings = self._sam.image_encoder(pictures)
        dtype = self._dtype or embeddings.dtype
        return share(self._sam.mask_decoder, (embeddings + frame.dense).to(dtype), frame.positions.to(dtype))

    def _score_some(self, shared: Shared, prompts: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted IoU (B,P,M), boxes (B,P,M,4) and what passes the thresholds (B,P,M) of some prompts."""
        logits, scores = decode(self._sam.mask_decoder, shared, prompts.to(shared.pixels.dtype))
        scores = scores.float()
        at_size = resample(resample(logits.float(), frame.logit_columns, -1), frame.logit_rows, -2)
        found = measure(at_size, threshold=self._sam.mask_threshold, offset=self._stability_score_offset)
        valid = found.filled
        if self._pred_iou_thresh > 0:
            valid = valid & (scores > self._pred_iou_thresh)
        if self._stability_score_thresh > 0:
            valid = valid & (found.stability >= self._stability_score_thresh)
        return scores, found.boxes, valid

    def _finish_some(self, shared: Shared, chosen: Tensor, masks_per_prompt: int, frame: Frame) -> Tensor:
        """Masks (B,k,H,W) of chosen candidates (B,k), resized by segment_anything itself."""
        prompts = frame.prompts[0][chosen // masks_per_prompt].to(shared.pixels.dtype)
        logits, _ = decode(self._sam.mask_decoder, shared, prompts)
        which = (chosen % masks_per_prompt)[:, :, None, None, None].expand(-1, -1, 1, *logits.shape[3:])
        logits = logits.gather(2, which)[:, :, 0].float()
        return self._sam.postprocess_masks(logits, frame.input_size, frame.size) > self._sam.mask_threshold

    def _frame(self, height: int, width: int) -> Frame:
        from segment_anything.utils.amg import build_point_grid
        from segment_anything.utils.transforms import ResizeLongestSide

        prompt_encoder, side = self._sam.prompt_encoder, self._sam.image_encoder.img_size
        resize, device = ResizeLongestSide(side), self._sam.device
        used = resize.get_preprocess_shape(height, width, side)
        points = build_point_grid(self._points_per_side) * np.array([[width, height]])
        points = torch.as_tensor(resize.apply_coords(points, (height, width)), device=device)[:, None]
        with torch.no_grad():
            prompts, dense = prompt_encoder((points, torch.ones(points.shape[:2], device=device)), None, None)
        rows, columns = prompt_encoder.mask_input_size  # as large as the logits
        return Frame(
            size=(height, width),
            input_size=used,
            rows=picture_taps(height, used[0]).to(device),
            columns=picture_taps(width, used[1]).to(device),
            logit_rows=logit_taps(rows, side, used[0], height).to(device),
            logit_columns=logit_taps(columns, side, used[1], width).to(device),
            prompts=prompts[None],
            positions=prompt_encoder.get_dense_pe(),
            dense=dense[:1],
        )


def _joined(chunks: Iterable[tuple[Tensor, ...]], num: int) -> list[Tensor]:
    """Tensors (B,n,...) one after the other along dimension 1, `num` in all. They go where they belong at once, lest
    small ones that live on lie scattered between large ones that do not, and those leave no room for one another."""
    whole: list[Tensor] = []
    done = 0
    for parts in chunks:
        if not whole:
            whole = [part.new_empty(part.shape[0], num, *part.shape[2:]) for part in parts]
        for into, part in zip(whole, parts, strict=True):
            into[:, done : done + part.shape[1]] = part
        done += parts[0].shape[1]
    return whole

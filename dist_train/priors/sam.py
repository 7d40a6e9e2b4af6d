"""`sam`: masks by Segment Anything's automatic mode on the restored picture (Eq. 2)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import SamConfig
from dist_train.priors.automatic import AutomaticMasks
from dist_train.priors.masks import MaskSet, Restore, Samples, finite, from_masks, to_uint8
from dist_train.priors.tiny_vit import build_mobile_sam
from dist_train.priors.weights import SAM_CHECKPOINTS, cached, check_state, fetch, load_state
from shards.schema import sha256_of

log = logging.getLogger(__name__)


class SamPrior:
    """A frozen SAM in automatic mode.

    Args:
        sam: a built `segment_anything.modeling.Sam` on its device. It is taken over: frozen, its weights and the
            precision of its encoder and decoder changed as `config.dtype` says.
        config: generator, thresholds, points, number of masks.
        weights: where its weights come from, for the run record.
        sha256: of that file.

    Raises:
        ValueError: `prior.dtype=fp16` on the CPU.
    """

    def __init__(self, sam: Any, config: SamConfig, *, weights: str, sha256: str | None = None):
        self._config, self._weights, self._sha256 = config, weights, sha256
        self._device_type = sam.device.type
        half, self._dtype = _precision(config.dtype, self._device_type)
        sam.requires_grad_(False)
        if half is None and config.dtype == "auto":
            with torch.no_grad():
                for parameter in sam.parameters():
                    parameter.copy_(parameter.half())
        sam.eval()  # after its weights have changed: in evaluation TinyViT attends by a copy of some
        make = {"batched": _batched, "reference": _reference}[config.generator]
        self._segment = make(sam, config, half)

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """SAM's masks of each picture; see `Prior`. Of more than `num_masks` those it is surest of are kept."""
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):  # whatever the training step runs in
            return self._segment(images).to(images.device)

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "name": self._config.name,
            "what": f"Segment Anything {self._config.model}, automatic mode"
            + ("" if self._sha256 == SAM_CHECKPOINTS[self._config.model].sha256 else "; NOT the published weights"),
            "parameters": self._config.model_dump(exclude={"name", "checkpoint", "download", "dtype"}),
            "weights": self._weights,
            "sha256": self._sha256,
            "dtype": self._dtype,
        }


def _batched(sam: Any, config: SamConfig, half: torch.dtype | None) -> Callable[[Tensor], MaskSet]:
    on_cuda = sam.device.type == "cuda"
    in_cache = 1 if sam.image_encoder.img_size > 512 else 4  # prompts at a time that suit a CPU
    return AutomaticMasks(
        sam,
        num_masks=config.num_masks,
        points_per_side=config.points_per_side,
        points_per_batch=config.points_per_batch or (64 if on_cuda else in_cache),
        pictures_per_batch=None if on_cuda else 1,
        pred_iou_thresh=config.pred_iou_thresh,
        stability_score_thresh=config.stability_score_thresh,
        stability_score_offset=config.stability_score_offset,
        box_nms_thresh=config.box_nms_thresh,
        dtype=half,
        compiled=config.compile,
    )


def _reference(sam: Any, config: SamConfig, half: torch.dtype | None) -> Callable[[Tensor], MaskSet]:
    from segment_anything import SamAutomaticMaskGenerator

    if half is not None:
        # Not sam.half(): its norms overflow. Not around the whole generator either: the positions of the points would
        # be rounded, and its NumPy cannot hold bf16.
        for net in (sam.image_encoder, sam.mask_decoder):
            net.forward = _in_half(net.forward, sam.device.type, half)
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=config.points_per_side,
        points_per_batch=config.points_per_batch or 64,
        pred_iou_thresh=config.pred_iou_thresh,
        stability_score_thresh=config.stability_score_thresh,
        stability_score_offset=config.stability_score_offset,
        box_nms_thresh=config.box_nms_thresh,
        min_mask_region_area=config.min_mask_region_area,
    )

    def masks_of(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
        records = generator.generate(picture)  # HWC RGB; SAM was trained on RGB
        records = sorted(records, key=lambda record: -record["predicted_iou"])[: config.num_masks]
        masks = np.array([record["segmentation"] for record in records], dtype=bool)
        return masks.reshape(-1, *picture.shape[:2])

    def segment(images: Tensor) -> MaskSet:
        found = from_masks([masks_of(picture) for picture in to_uint8(images)], num_masks=config.num_masks)
        found = found.to(images.device)
        return MaskSet(found.masks, found.valid & finite(images))

    return segment


def load_sam_prior(config: SamConfig, device: torch.device) -> SamPrior:
    """Build the prior from `config.checkpoint`, from the cache, or (if `config.download`) from the published file.

    Raises:
        ValueError: no checkpoint, or one of another net; says what it looks like.
        OSError: the download failed.
    """
    from segment_anything import sam_model_registry

    path, sha256 = _checkpoint(config)
    state = load_state(path, setting="prior.checkpoint")
    setting = f"prior.checkpoint={path}"
    if config.model == "tiny_vit":
        sam = build_mobile_sam(state, setting=setting, input_px=config.input_px)
    else:
        # Without storage: an initialisation would be overwritten at once, take seconds, and draw from the global
        # generator.
        with torch.device("meta"):
            sam = sam_model_registry[config.model]()
        shapes = {name: value.shape for name, value in sam.state_dict().items()}
        check_state(state, shapes, setting=setting, what=f"SAM {config.model} (prior.model)")
        sam.load_state_dict({name: state[name] for name in shapes}, assign=True)
    return SamPrior(sam.to(device, torch.float32), config, weights=str(path), sha256=sha256)


def _checkpoint(config: SamConfig) -> tuple[Path, str]:
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        sha256 = sha256_of(path) if path.is_file() else ""
        if sha256 and sha256 != SAM_CHECKPOINTS[config.model].sha256:
            log.warning(
                "prior.checkpoint=%s is not the published file of %s: its masks may mean nothing", path, config.model
            )
        return path, sha256
    source = SAM_CHECKPOINTS[config.model]
    path_or_none = fetch(source) if config.download else cached(source)
    if path_or_none is None:
        raise ValueError(
            f"prior.name=sam needs the weights of {config.model}, and there are none: set prior.checkpoint to the path "
            f"of {source.name}, or prior.download=true to fetch it ({source.num_bytes / 2**30:.2f} GiB); "
            "prior.name=regions needs no weights"
        )
    return path_or_none, source.sha256


def _precision(dtype: str, device_type: str) -> tuple[torch.dtype | None, str]:
    """Half precision to compute in (None: float32), and what the record says."""
    if dtype == "fp16" and device_type == "cpu":
        raise ValueError("prior.dtype=fp16 needs a GPU; on the CPU use auto (fp32, weights rounded to fp16), or bf16")
    if dtype == "bf16":
        return torch.bfloat16, "bf16"
    if dtype == "fp16" or (dtype == "auto" and device_type == "cuda"):
        return torch.float16, "fp16"
    return None, "fp32, weights rounded to fp16" if dtype == "auto" else "fp32"


def _in_half(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    def in_half(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype):
            out = forward(*args, **kwargs)
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)

    return in_half

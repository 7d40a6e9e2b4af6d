"""What the teacher and SGR see: sources of masks, and of features."""

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from dist_train.config.fields import Address, Count, CountOrZero, Fraction, NonNegative, Positive, Section


class RegionsConfig(Section):
    """`regions`: a classical over-segmentation. It needs no weights and is not SAM."""

    name: Literal["regions"] = "regions"
    num_masks: Count = 32
    """On crops of 256 px of photographs there are 30 in the middle, and 32 keep 98 % of their area; see
    configs/RESULTS.md, and `python -m launch.masks` for other pictures and priors."""
    scale: Positive = 500.0
    """Felzenszwalb's k: larger gives larger regions. 200 cuts animals and faces into pieces, 500 mostly does not."""
    sigma: NonNegative = 0.8
    """Smoothing beforehand, in px."""
    min_area_px: Count = 100
    """Smaller regions are merged into a neighbour; below 100 slivers along edges take up the masks."""


class SamConfig(Section):
    """`sam`: Segment Anything's automatic mode on the student's output (Eq. 2)."""

    name: Literal["sam"] = "sam"
    model: Literal["vit_b", "vit_l", "vit_h", "tiny_vit"] = "vit_h"
    """tiny_vit: MobileSAM, whose encoder is 77 times cheaper than vit_h's; it needs timm."""
    checkpoint: str | None = None
    """Path of the official .pth file; none: it must be in the cache, or `download` must be true."""
    download: bool = False
    """Fetch the official checkpoint into the cache, verified by sha256."""
    generator: Literal["batched", "reference"] = "batched"
    """reference: segment_anything's own, picture by picture. batched: the same masks (but for rounding), all pictures'
    prompts together and without waiting for the device; see dist_train/priors/automatic.py."""
    num_masks: Count = 32
    """The surest are kept. SAM has some 100 on a large photograph (SA-1B's mean), and fewer on a crop."""
    input_px: Annotated[int, Strict(), Field(ge=64, multiple_of=16)] = 1024
    """Side of the square that a picture is resized to fill; its masks are made at a quarter of it. Below 1024, what the
    weights were trained for, all but the reading of points costs by the area, and small things are lost: 512 is some
    four times cheaper, at 256 SAM is known to see poorly. Only tiny_vit: a ViT's table of positions is for 1024."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: fp16 on CUDA; fp32 on the CPU with weights rounded through fp16 (CPU fp16 is 64 times slower)."""
    points_per_side: Count = 32
    points_per_batch: Count | None = None
    """Prompts decoded at a time, which bounds the memory; none: 64, but for `batched` on a CPU, fastest there,
    1, and 4 with an input_px of 512 or less."""
    pred_iou_thresh: NonNegative = 0.88
    stability_score_thresh: NonNegative = 0.95
    stability_score_offset: NonNegative = 1.0
    """A mask's stability is the IoU of what its logits are this far above and this far below its threshold."""
    box_nms_thresh: Fraction = 0.7
    min_mask_region_area: CountOrZero = 0
    """Fill holes and drop islands smaller than this, in px; only `reference` can."""
    compile: bool = False
    """batched: torch.compile its steps; minutes at the first call for each size of picture."""

    @model_validator(mode="after")
    def _check(self) -> "SamConfig":
        if self.generator == "batched" and self.min_mask_region_area:
            raise ValueError(
                f"min_mask_region_area={self.min_mask_region_area} needs generator: reference; batched has no search "
                "for connected parts"
            )
        if self.input_px != 1024 and self.model != "tiny_vit":
            raise ValueError(
                f"input_px={self.input_px} needs model: tiny_vit; {self.model} has a table of positions for 1024 alone"
            )
        if self.generator == "reference" and self.compile:
            raise ValueError("compile=true needs generator: batched")
        return self


class PspConfig(Section):
    """`psp`: the classes that a PSPNet sees, each one mask (the papers' control: semantics without SAM)."""

    name: Literal["psp"] = "psp"
    weights: str
    """Path of the state dict of a segmentation_models_pytorch.PSPNet; or `random`, which the run says aloud."""
    encoder: str = "resnet50"
    """segmentation_models_pytorch's name of the net inside; `tu-...` for those of timm."""
    num_classes: Annotated[int, Strict(), Field(ge=2)] = 150
    """150: ADE20K; 19: Cityscapes; 21: Pascal VOC."""
    num_masks: Count = 32
    min_area_px: CountOrZero = 100
    """Classes that take up less of a picture are no masks."""


LivePriorConfig = Annotated[RegionsConfig | SamConfig | PspConfig, Field(discriminator="name")]
"""What segments any picture it is shown."""


class CachedConfig(Section):
    """`cached`: masks of whole pictures as the student restores them, remade now and then, and carried to each crop."""

    name: Literal["cached"] = "cached"
    of: LivePriorConfig
    """What makes them. A crop sees a part of `of.num_masks`, so more than `num_masks` are worth keeping."""
    num_masks: Count = 32
    """Largest ones of a crop that are used."""
    refresh: Count = 10
    """They are remade in every n-th epoch, at each sample's visit: 10 makes them 4.5 epochs old on average. 1: each
    visit. SAM costs as much for a whole picture as for a crop, since it resizes both, but each remade mask also needs a
    pass of the student over the whole picture: without SAM, 256 px crops of 1280x720 pictures and a small NAFNet, a
    step takes 3.4 to 4.5 times as long in an epoch that remakes, 1.24 to 1.35 times on average over 10."""
    memory_mib: Count = 256
    """Compressed masks that a rank keeps in memory beside the files in RUN/masks: some 25000 pictures' at 481x321."""

    @model_validator(mode="after")
    def _check(self) -> "CachedConfig":
        if self.of.num_masks < self.num_masks:
            raise ValueError(
                f"of.num_masks={self.of.num_masks} must not be below num_masks={self.num_masks}: a crop sees a part "
                "of the whole picture's masks"
            )
        return self


class StoredConfig(Section):
    """`stored`: masks that lie beside the pictures in the shards, put there by `python -m shards masks`."""

    name: Literal["stored"] = "stored"
    num_masks: Count = 32
    """Largest ones of a crop that are used."""


class RemoteConfig(Section):
    """`remote`: masks made by other processes, each with a GPU of its own: `python -m launch.mask_server`."""

    name: Literal["remote"] = "remote"
    of: LivePriorConfig
    """What makes them. The servers must have been started with the same; paths in it are those of their machines."""
    servers: Annotated[tuple[Address, ...], Field(min_length=1)]
    """HOST:PORT of each. They are dealt out to the ranks in turn: of n servers rank r asks the (r mod n)-th."""
    timeout_s: Positive = 600.0
    """How long to wait for a server to come up, which may be loading SAM, and for the masks of a batch, which may
    stand in line behind other ranks'; below engine.hang_timeout_s."""

    @property
    def num_masks(self) -> int:
        """Of each picture."""
        return self.of.num_masks


class NoneConfig(Section):
    """`none`: no masks. The teacher is the plain cascade without SPF units, and there is no SGR."""

    name: Literal["none"] = "none"

    @property
    def num_masks(self) -> int:
        """Of each picture."""
        return 0


PriorConfig = Annotated[
    RegionsConfig | SamConfig | PspConfig | CachedConfig | StoredConfig | RemoteConfig | NoneConfig,
    Field(discriminator="name"),
]


class VggConfig(Section):
    """Frozen features for SGR (Eq. 5)."""

    arch: Literal["vgg19", "vgg19_16x"] = "vgg19"
    """vgg19: torchvision's. vgg19_16x: its sixteen times smaller distillation (a 3.9 MB file), by path."""
    weights: str = "download"
    """A path; `download` (torchvision's file, cached and verified); or `random`, which the run says aloud."""
    layer: str = "relu4_4"
    """The papers do not say. relu4_4 (1/8 of the side, 512 channels) keeps small masks apart; relu5_4 is at 1/16.
    vgg19_16x ends at relu5_1."""

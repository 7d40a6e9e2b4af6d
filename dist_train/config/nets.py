"""The nets, and what makes a teacher of one."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from dist_train.config.fields import Below1, Count, CountOrZero, Positive, Section


class NafnetConfig(Section):
    """NAFNet; the defaults are the published GoPro width-32 network."""

    name: Literal["nafnet"] = "nafnet"
    width: Count = 32
    middle_blk_num: CountOrZero = 1
    enc_blk_nums: tuple[CountOrZero, ...] = (1, 1, 1, 28)
    dec_blk_nums: tuple[CountOrZero, ...] = (1, 1, 1, 1)
    tlc_train_px: CountOrZero | tuple[Count, Count] = 0
    """Test-time local converter: side of the training crops (or height and width); 0 pools globally. GoPro's published
    numbers use 256."""
    extra_channels: CountOrZero = 0
    """Channels beside RGB that `intro` takes: 1 in SAM-Deblur's CAT, S in its MAP. 0: what restores a picture alone."""

    @model_validator(mode="after")
    def _check(self) -> "NafnetConfig":
        if len(self.enc_blk_nums) != len(self.dec_blk_nums):
            raise ValueError(
                f"enc_blk_nums has {len(self.enc_blk_nums)} levels and dec_blk_nums {len(self.dec_blk_nums)}; "
                "a U-shape needs as many up as down"
            )
        return self


class RcdnetConfig(Section):
    """RCDNet; the defaults are the published 17-stage network."""

    name: Literal["rcdnet"] = "rcdnet"
    layout: Literal["official", "simple"] = "official"
    """Names of the weights: those of RCDNet's release, with its unused ones, or those of the authors' RCDNet_simple."""
    num_stages: Count = 17
    """S."""
    num_m: Count = 32
    """Rain kernels, and maps of where it rains."""
    num_z: Count = 32
    """Channels beside the picture that the background nets hand on."""
    num_res_blocks: Count = 4
    """T, of each proximal net; the official layout has 4."""
    batch_norm: Literal["synced", "rank"] = "synced"
    """Whose statistics batch norm takes in training. synced: those of the pass on all ranks together, so that 1 rank
    with 4 samples equals 2 ranks with 2. rank: each its own, as the official DataParallel, without the all-reduces."""

    @model_validator(mode="after")
    def _check(self) -> "RcdnetConfig":
        if self.layout == "official" and self.num_res_blocks != 4:
            raise ValueError(f"num_res_blocks={self.num_res_blocks} needs layout: simple; the official layout has 4")
        if self.layout == "official" and self.num_stages < 3:
            raise ValueError(
                f"num_stages={self.num_stages} needs layout: simple; in the official one the rain kernels that all "
                "stages read lie at index 1 of num_stages - 1"
            )
        return self


class EfficientDerainConfig(Section):
    """EfficientDerain (a kernel-predicting network); the defaults are the published one."""

    name: Literal["efficientderain"] = "efficientderain"
    kernel_px: Annotated[int, Strict(), Field(ge=1)] = 3
    """Side of the predicted kernels, odd. Published: 3; the class's own default was 5."""
    base_width: Count = 64
    """Channels at full resolution; deeper levels have 2, 4, 8 and 8 times as many."""
    fit: Literal["pad", "resize"] = "pad"
    """How a side that is no multiple of 16 is met. pad: replicated at the right and below, which keeps every pixel
    where it is. resize: stretched and shrunk back, as the official evaluation does, which also rounds to 8 bits before
    and truncates to them in between (0.6 grey levels)."""

    @model_validator(mode="after")
    def _check(self) -> "EfficientDerainConfig":
        if self.kernel_px % 2 == 0:
            raise ValueError(f"kernel_px={self.kernel_px} must be odd, so that the kernel has a centre")
        return self


class UformerConfig(Section):
    """Uformer; the defaults are Uformer-B, of which the published checkpoints are.

    T and S: embed_dim 16 and 32 with depths of 2 throughout.
    """

    name: Literal["uformer"] = "uformer"
    embed_dim: Count = 32
    depths: Annotated[tuple[Count, ...], Field(min_length=9, max_length=9)] = (1, 2, 8, 8, 2, 8, 8, 2, 1)
    """Blocks per stage: four down, the bottleneck, four up."""
    num_heads: Annotated[tuple[Count, ...], Field(min_length=9, max_length=9)] = (1, 2, 4, 8, 16, 16, 8, 4, 2)
    win_size: Count = 8
    mlp_ratio: Positive = 4.0
    modulator: bool = True
    """Learned offsets of the windows in the decoder; all published variants have them."""
    shift: bool = True
    """Whether every second block's windows are shifted."""
    img_size: Count = 256
    """The constructor's side, which no checkpoint holds: a stage whose map would not be larger than a window at this
    size never shifts. Models are trained at 256; the official GoPro test script builds 128, so that its bottleneck does
    not shift, and the published 33.06 dB are that."""
    drop_path_rate: Below1 = 0.1
    square: bool = True
    """Pad to a square, as the official scripts. false: only to multiples of 16 windows, 1.7 times less work at
    1280x720, but other values near the border."""

    @model_validator(mode="after")
    def _check(self) -> "UformerConfig":
        for stage, (factor, heads) in enumerate(zip((1, 2, 4, 8, 16, 16, 8, 4, 2), self.num_heads, strict=True)):
            if (channels := factor * self.embed_dim) % heads:
                raise ValueError(
                    f"num_heads[{stage}]={heads} does not divide the {channels} channels of its stage, {factor} x "
                    f"embed_dim={self.embed_dim}; change one of them"
                )
        if self.img_size < 16:
            raise ValueError(f"img_size={self.img_size} must be at least 16, the stride of the bottleneck")
        return self


class CustomConfig(Section):
    """Any net from elsewhere, its stages found by hooks; see README, "Bring your own"."""

    name: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every rank, that returns an `nn.Module` mapping (B,3,H,W) to the same."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""
    stages: tuple[str, ...] = ()
    """Names of submodules, in the order they run, whose outputs are maps (B,C,h,w); fusion units go after them."""
    multiple: Count = 1
    """Sides must be a multiple of this; pictures are zero-padded on the right and below."""


NetConfig = Annotated[
    NafnetConfig | RcdnetConfig | EfficientDerainConfig | UformerConfig | CustomConfig, Field(discriminator="name")
]


class InitConfig(Section):
    """Weights to start from instead of random ones: files of the official releases (.pth) or exports (.safetensors)."""

    student: str | None = None
    teacher: str | None = None
    """For the teacher's net; its fusion units always start new, so that it starts as that net."""


class SpfConfig(Section):
    """Semantic priors fusion units of the teacher (Eq. 3)."""

    every: Count = 1
    """A unit after every n-th stage."""
    max_channels: Count = 64
    """Width of a unit: the stage's, at most this (a unit at NAFNet's 512-channel bottleneck would cost 7 M weights)."""
    encoding: Literal["stack", "idmap", "pooled"] = "stack"
    """What the first unit sees. stack: a channel per mask, largest first. idmap: the same channels of a partition, each
    pixel in the smallest mask that covers it; on the CPU as look-ups, which cost the same for any number of masks.
    pooled: the picture's mean colour inside each mask (SAM-Deblur's MAP), 3 channels, for which neither the number of
    masks nor their order matters; where masks overlap their means add up."""


class TeacherConfig(Section):
    """The cascaded net that sees the masks, trained beside the student and thrown away."""

    net: NetConfig | None = None
    """None: the student's own kind."""
    start: Literal["drawn", "identity"] = "drawn"
    """How a new teacher begins. drawn: as any net. identity: it hands the student's picture on as it is, so that SPD
    never pulls the student to a picture that is worse for the teacher's newness; see configs/LOG.md. Without a part in
    what init.teacher loads."""
    spf: SpfConfig = SpfConfig()

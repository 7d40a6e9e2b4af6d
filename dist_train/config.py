"""What a run is: sections, and how a value is decided. No torch here, so a configuration is checked in 0.2 s.

A long file, so that every setting, its default and the reason for it stand in one place.

A value comes from, each overruling the one before: the defaults below, the YAML file, `key.sub=value` on the command
line. There are no environment variables but those that say *where* a run happens (rank, master address).

Checks live in one place each: of a single field in the field, between fields in `RunConfig._check`, and what depends on
the number of ranks in `plan_batch`. Derived values are properties; nothing is written back.
"""

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _off_is_false(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads off as false


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of HOST:PORT.

    Raises:
        ValueError: it has not both.
    """
    host, _, port = address.rpartition(":")
    if not host or ":" in host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT, for example gpu7:7070")
    return host, int(port)


def _address(address: str) -> str:
    host_and_port(address)
    return address


Address = Annotated[str, AfterValidator(_address)]
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
# PyYAML reads 1e-4 as a string; pydantic makes it a float again.
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Below1 = Annotated[Real, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PatchChange(Section):
    """Larger crops from some step on."""

    from_step: Count
    """Optimizer steps done before the first with such crops."""
    crop_px: Count


class MixupConfig(Section):
    """MixUp, as in Uformer's recipe for SIDD: lam * (lq, gt) + (1 - lam) * (lq, gt) of another sample."""

    alpha: Positive = 1.2
    """lam is drawn from Beta(alpha, alpha)."""
    from_step: CountOrZero = 0
    """Optimizer steps done before the first mixed one; Uformer mixes after 5 epochs."""


class RainmixConfig(Section):
    """RainMix, as in EfficientDerain's v4 recipe: further streaks on each rainy picture, or on the clean one."""

    clean: Fraction = 4 / 11
    """Probability that they fall on the clean picture instead of the rainy one."""
    streaks: str | None = None
    """Folder of pictures of bright streaks on black, none smaller than the crops; published: Garg and Nayar's, which
    are not shipped. None: streaks as `python -m shards synth rain_light` draws them. Its pictures are part of the
    stream of samples: leave them alone while a run lasts."""


class DataConfig(Section):
    """Where pairs come from and what is cut from them."""

    train: str
    """Folder of shards (made by `python -m shards write`) to train on."""
    val: str | None = None
    """Folder of shards to validate on; none: no validation."""
    crop_px: Count = 128
    """Side of the square training crop."""
    progressive: tuple[PatchChange, ...] = ()
    """Larger crops as training goes on (Restormer's progressive patches, without its shrinking batches)."""
    flips: Literal["none", "horizontal", "all"] = "all"
    """Augmentation: nothing, left-right, or all eight flips and quarter turns."""
    mixup: MixupConfig | None = None
    """Mix pairs of samples; `{}` with the published numbers."""
    rainmix: RainmixConfig | None = None
    """Rain on the degraded pictures; `{}` with the published numbers."""
    workers: CountOrZero = 1
    """Reading processes per rank; 0 reads in the training process."""
    max_bad_samples: CountOrZero = 0
    """Unreadable samples (each replaced by a stand-in and reported) that a run may meet before all ranks stop."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        steps = [0, *(change.from_step for change in self.progressive)]
        crops_px = [self.crop_px, *(change.crop_px for change in self.progressive)]
        for name, values in (("from_step", steps), ("crop_px", crops_px)):
            if any(now <= before for before, now in itertools.pairwise(values)):
                raise ValueError(
                    f"progressive goes {name} {' -> '.join(map(str, values))}; each must be above the last"
                )
        return self

    def crop_px_at(self, step: int) -> int:
        """Side of the crops when `step` optimizer steps are done."""
        return max([self.crop_px, *(change.crop_px for change in self.progressive if change.from_step <= step)])


class NafnetConfig(Section):
    """NAFNet; the defaults are the published GoPro width-32 network."""

    name: Literal["nafnet"] = "nafnet"
    width: Count = 32
    middle_blk_num: CountOrZero = 1
    enc_blk_nums: tuple[CountOrZero, ...] = (1, 1, 1, 28)
    dec_blk_nums: tuple[CountOrZero, ...] = (1, 1, 1, 1)
    tlc_train_px: CountOrZero = 0
    """Test-time local converter: side of the training crops; 0 pools globally. GoPro's published numbers use 256."""
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
    stages: Annotated[int, Strict(), Field(ge=3)] = 17
    """S; at least 3, since the rain kernels that all stages read lie at index 1 of S - 1."""
    num_m: Count = 32
    """Rain kernels, and maps of where it rains."""
    num_z: Count = 32
    """Channels beside the picture that the background nets hand on."""
    res_blocks: Count = 4
    """T, of each proximal net; the official layout has 4."""
    batch_norm: Literal["synced", "rank"] = "synced"
    """Whose statistics batch norm takes in training. synced: those of the pass on all ranks together, so that 1 rank
    with 4 samples equals 2 ranks with 2. rank: each its own, as the official DataParallel, without the all-reduces."""

    @model_validator(mode="after")
    def _check(self) -> "RcdnetConfig":
        if self.layout == "official" and self.res_blocks != 4:
            raise ValueError(f"res_blocks={self.res_blocks} needs layout: simple; the official layout has 4")
        return self


class EfficientDerainConfig(Section):
    """EfficientDerain (a kernel-predicting network); the defaults are the published one."""

    name: Literal["efficientderain"] = "efficientderain"
    kernel_px: Annotated[int, Strict(), Field(ge=1)] = 3
    """Side of the predicted kernels, odd. Published: 3; the class's own default was 5."""
    base_width: Count = 64
    """Channels at full resolution; deeper levels have 2, 4, 8 and 8 times as many."""
    fit: Literal["pad", "resize"] = "pad"
    """How a side that is no multiple of 16 is met. resize: stretched and shrunk back, as in the official evaluation;
    pad: replicated at the right and below, which keeps every pixel where it is."""

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
    spf: SpfConfig = SpfConfig()


class RegionsConfig(Section):
    """`regions`: a classical over-segmentation. It needs no weights and is not SAM."""

    name: Literal["regions"] = "regions"
    num_masks: Count = 32
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
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: fp16 on CUDA; fp32 on the CPU with weights rounded through fp16 (CPU fp16 is 64 times slower)."""
    points_per_side: Count = 32
    points_per_batch: Count | None = None
    """Prompts decoded at a time, which bounds the memory; none: 64, but 4 for `batched` on a CPU, fastest there."""
    pred_iou_thresh: NonNegative = 0.88
    stability_score_thresh: NonNegative = 0.95
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
    """They are remade in every n-th epoch, at each sample's visit: 10 makes them 4.5 epochs old on average, and costs a
    tenth of fresh ones if a whole picture costs as much as a crop, as with SAM, which resizes both. 1: each visit."""
    memory_mib: Count = 256
    """Compressed masks that a rank keeps in memory beside the files in RUN/masks: some 25000 pictures' at 481x321."""


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
    stand in line behind other ranks'. Keep it below engine.hang_timeout_s."""

    @property
    def num_masks(self) -> int:
        """Of each picture."""
        return self.of.num_masks


PriorConfig = Annotated[
    RegionsConfig | SamConfig | PspConfig | CachedConfig | StoredConfig | RemoteConfig, Field(discriminator="name")
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


class SpdConfig(Section):
    """Semantic priors distillation (Eq. 4)."""

    weight: NonNegative = 0.005
    """lambda_1; 0 turns the term off."""
    reduction: Literal["sum", "mean"] = "sum"
    """Sum over the pixels and channels of a picture, mean over pictures: with the paper's 0.005 a mean over pixels
    would be inert (its gradient 1e-5 of the reconstruction's), the sum is of the right size."""
    beta: Positive = 1.0
    """Where smooth L1 turns from quadratic to linear; on [0,1] images 1.0 is quadratic throughout."""


class SgrConfig(Section):
    """Semantic-guided relation (Eq. 5-7)."""

    weight: NonNegative = 200.0
    """lambda_2; 0 turns the term off."""
    relation: Literal["map", "pooled"] = "map"
    """map: mean square between the two masked feature maps, Eq. 5-6 as written. pooled: L2 between the features' means
    inside each mask (the co-author's earlier relation distillation), which carries direction too, and whose gradient
    is 100 times larger."""
    normalize: bool = False
    """Divide both nets' features by the teacher's root mean square first, so that the weight means the same for any
    network of features and any layer."""


class LossConfig(Section):
    """Terms of Eq. 8 and their weights. 0.005 and 200 are the paper's; which is which is read from its Table 6."""

    rec: Literal["psnr", "charbonnier", "l1", "l1_ssim", "rcdnet"] = "psnr"
    """The net's official reconstruction loss, for student and teacher alike: psnr is NAFNet's, charbonnier Uformer's,
    l1_ssim EfficientDerain's, and rcdnet RCDNet's over the pictures of all its stages."""
    spd: SpdConfig = SpdConfig()
    sgr: SgrConfig = SgrConfig()
    detach_cascade: bool = True
    """Whether the teacher's reconstruction loss stops at the student's output. The paper says that the student's loss
    is its own three terms, which only holds if it does."""


class OptimConfig(Section):
    """Optimizer, schedule, batch."""

    steps: Count = 1000
    global_batch: Count = 8
    """Samples per optimizer step over all ranks and passes; the paper's is 8."""
    batch_per_rank: Count | None = None
    """Samples per pass on one rank; none: global_batch / ranks, so one pass. Smaller values accumulate."""
    name: Literal["adam", "adamw"] = "adam"
    lr: Positive = 2e-4
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "step", "linear"] = "cosine"
    min_lr: NonNegative = 1e-6
    warmup_steps: CountOrZero = 0
    decay_from: CountOrZero = 0
    """linear: constant until this step, then straight down to min_lr at the end."""
    step_every: Count = 10000
    """step: multiply the rate by step_gamma each time so many steps are done."""
    step_gamma: Positive = 0.2
    clip_norm: NonNegative = 0.0
    """Largest norm of the joint gradient of student and teacher; 0 clips nothing, which is the paper's setting and
    keeps the two nets independent."""
    ema_decay: Below1 = 0.999
    """Exponential moving average of the student, which is what is evaluated and exported; 0 keeps none."""


class EngineConfig(Section):
    """How the step is computed."""

    zero_stage: Annotated[int, Strict(), Field(ge=0, le=3)] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are autocast: parameters and optimizer stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    hang_timeout_s: Positive = 1800.0
    """If a step takes longer, every rank prints where it stands and exits. Also how long a rank waits for the others,
    as it does while the main one draws pictures: raise it for SAM on a CPU."""
    max_bad_steps: Count = 3
    """Steps in a row with a gradient that is not finite before all ranks stop; each one is skipped by all."""


class EvalConfig(Section):
    """Validation during training."""

    every: CountOrZero = 500
    """Steps between validations; 0: only at the end."""
    protocol: Literal["rgb", "y_uint8", "y_double", "gopro"] = "rgb"
    """How PSNR and SSIM are computed; see dist_train/metrics.py."""
    teacher: bool = False
    """Also score the teacher, which needs the prior on every whole picture: minutes each with SAM on a CPU."""


class CheckpointConfig(Section):
    """What is kept for resuming."""

    every: CountOrZero = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Annotated[int, Strict(), Field(ge=2)] = 2
    """Newest checkpoints kept; never fewer than two, since the last may be in the making when power fails."""


class TrackConfig(Section):
    """What is written down. metrics.jsonl always is; wandb is a view of it."""

    every: Count = 10
    """Steps between lines of metrics.jsonl."""
    gradients_every: CountOrZero = 100
    """Steps between measurements of each loss term's gradient norm at the student's output; 0: never."""
    pictures_every: CountOrZero = 500
    """Steps between panels (lq, student, teacher, gt, masks) of validation pictures, and at the end; 0: never."""
    num_pictures: Count = 2
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off_is_false)] = "off"
    project: str = "restill"
    progress: bool = True
    """A progress bar on the main rank."""


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    out: str = "runs"
    """Parent of the run's folder."""
    seed: CountOrZero = 0
    task: Literal["plain", "distill"] = "distill"
    """plain: the student alone. distill: student, prior, teacher, SPD and SGR (Eq. 1-8)."""
    data: DataConfig
    student: NetConfig = NafnetConfig()
    teacher: TeacherConfig = TeacherConfig()
    init: InitConfig = InitConfig()
    prior: PriorConfig = RegionsConfig()
    features: VggConfig = VggConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    @property
    def dir(self) -> Path:
        """Folder of this run."""
        return Path(self.out) / self.name

    @property
    def reads_masks(self) -> bool:
        """Whether masks come from the shards."""
        return self.task == "distill" and self.prior.name == "stored"

    @property
    def uses_sgr(self) -> bool:
        """Whether VGG is needed."""
        return self.task == "distill" and self.loss.sgr.weight > 0

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        nets = [self.student] + ([self.teacher.net] if self.teacher.net and self.task == "distill" else [])
        if wide := [net for net in nets if net.name == "nafnet" and net.extra_channels]:
            raise ValueError(
                f"extra_channels={wide[0].extra_channels}: such a net wants masks beside the picture, and no task "
                "gives them yet; set it to 0"
            )
        if self.loss.rec == "rcdnet" and (other := [net.name for net in nets if net.name != "rcdnet"]):
            raise ValueError(
                f"loss.rec=rcdnet is over the pictures of RCDNet's stages, and {other[0]} has none; set loss.rec to "
                "psnr, charbonnier, l1 or l1_ssim"
            )
        if self.engine.zero_stage == 0 and self.engine.precision != "fp32":
            raise ValueError(
                f"engine.precision={self.engine.precision} needs engine.zero_stage=1, 2 or 3: DeepSpeed's stage 0 "
                "computes half precision differently from the others. Set engine.zero_stage=1"
            )
        if self.engine.precision == "fp16" and self.engine.device == "cpu":
            raise ValueError("engine.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} must not be above optim.lr={self.optim.lr}")
        if self.optim.schedule == "linear" and self.optim.decay_from >= self.optim.steps:
            raise ValueError(f"optim.decay_from={self.optim.decay_from} must be below optim.steps={self.optim.steps}")
        if self.optim.warmup_steps >= self.optim.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below optim.steps={self.optim.steps}"
            )
        if self.optim.batch_per_rank and self.optim.global_batch % self.optim.batch_per_rank:
            raise ValueError(
                f"optim.global_batch={self.optim.global_batch} is not a multiple of "
                f"optim.batch_per_rank={self.optim.batch_per_rank}"
            )
        return self


def changed_method(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that make two runs different methods or streams of samples, so that one cannot go on as the other.

    Paths of weights may change; `trainer` compares what lies there. So may the place where masks are made (`remote`).

    Returns:
        `key=old is now new`, for each that differs.
    """
    fixed = (
        "task", "seed", "student", "teacher", "prior", "features", "loss",
        "data.crop_px", "data.progressive", "data.flips", "data.mixup", "data.rainmix",
        "optim.global_batch", "optim.name",
    )  # fmt: skip
    free = (
        "prior.checkpoint", "prior.weights", "prior.download", "prior.points_per_batch", "prior.memory_mib",
        "features.weights",
    )  # fmt: skip
    old, new = _flat(_local(before)), _flat(_local(now))
    return [
        f"{key}={old.get(key)} is now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key.replace("prior.of.", "prior.") not in free
        and any(key == name or key.startswith(f"{name}.") for name in fixed)
    ]


def _local(run: RunConfig) -> dict[str, Any]:
    """The run as plain values, a remote prior as if it were here."""
    tree = run.model_dump(mode="json")
    return tree | {"prior": tree["prior"]["of"]} if run.prior.name == "remote" else tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class BatchPlan(NamedTuple):
    """How a global batch is shared out: global_batch = batch_per_rank x grad_accum x world."""

    global_batch: int
    batch_per_rank: int
    grad_accum: int


def plan_batch(optim: OptimConfig, world: int) -> BatchPlan:
    """Share `optim.global_batch` out over the ranks.

    Raises:
        ValueError: it does not divide evenly; the message lists what would.
    """
    total = optim.global_batch
    if total % world:
        fits = [n for n in range(1, total + 1) if total % n == 0]
        raise ValueError(
            f"optim.global_batch={total} cannot be shared by {world} ranks; start {fits} ranks, or set "
            f"optim.global_batch to a multiple of {world}"
        )
    per_rank = optim.batch_per_rank or total // world
    if (total // world) % per_rank:
        fits = [n for n in range(1, total // world + 1) if (total // world) % n == 0]
        raise ValueError(
            f"optim.batch_per_rank={per_rank} does not divide the {total // world} samples that each of {world} ranks "
            f"has of optim.global_batch={total}; it may be {fits}"
        )
    return BatchPlan(total, per_rank, total // world // per_rank)


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: YAML file; only what differs from the defaults.
        overrides: `key.sub=value` strings; values are read as YAML.

    Raises:
        ValueError: with the file, the dotted key, the value and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(str(p) for p in sorted(path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ValueError(f"no configuration {path}" + (f"; there are {near}" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections (key: value), not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_run(tree, source=str(path))


def parse_run(tree: dict[str, Any], *, source: str) -> RunConfig:
    """Validate a tree of plain values; `source` names it in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ValueError(f"{source}: " + "\n".join(lines)) from None


def dump_run(run: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"cannot read {override!r}: an override is key.sub=value, for example optim.lr=0.001")
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ValueError(f"{override}: {'.'.join(parents[: depth + 1])} is a value ({child!r}), not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override}: the value is not YAML: {error}") from error


def _explain(problem: Any) -> str:
    # pydantic puts the tag of a union (sam, nafnet) into the location; the user never wrote it.
    location = [str(part) for part in problem["loc"]]
    tag = None
    for place in (("prior",), ("prior", "of"), ("student",), ("teacher", "net")):
        if tuple(location[: len(place)]) == place and len(location) > len(place) + 1:
            tag = location.pop(len(place))
    key = ".".join(location) or "run"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], tag)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}" if known else ""
        return f"{key}: no such setting{hint}"
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        given = f"{value['name']!r} is none of" if isinstance(value, dict) and "name" in value else "must be one of"
        return f"{key}.name: {given} {problem['ctx'].get('expected_tags') or ', '.join(_names(location))}"
    if problem["type"] == "missing":
        return f"{key}: must be given"
    if key == "run":
        return problem["msg"].removeprefix("Value error, ")
    return f"{key}={value!r}: {problem['msg'].removeprefix('Value error, ')}"


def _known_keys(location: list[str], tag: str | None) -> list[str]:
    """Settings at a place; where `name` tells several sections apart, those of the one called `tag`."""
    sections = _sections(location)
    named = [section for section in sections if tag and section.model_fields["name"].default == tag]
    return sorted({key for section in named or sections for key in section.model_fields})


def _names(location: list[str]) -> list[str]:
    return sorted(section.model_fields["name"].default for section in _sections(location))


def _sections(location: list[str]) -> list[type[Section]]:
    """The sections that may stand at a place of the configuration; several where `name` tells them apart."""
    found: list[type[Section]] = [RunConfig]
    for part in location:
        fields = [section.model_fields[part] for section in found if part in section.model_fields]
        found = [section for field in fields for section in _sections_in(field.annotation)]
    return found


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for option in get_args(annotation) for section in _sections_in(option)]

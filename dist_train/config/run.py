"""A run: optimizer, engine and records, all sections together, and what may change in the middle of one."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, Strict, model_validator

from dist_train.config.conditioning import ConditioningConfig
from dist_train.config.data import DataConfig
from dist_train.config.fields import Below1, Count, CountOrZero, NonNegative, Positive, Section, off_is_false
from dist_train.config.losses import LossConfig
from dist_train.config.nets import InitConfig, NafnetConfig, NetConfig, TeacherConfig
from dist_train.config.priors import PriorConfig, RegionsConfig, VggConfig
from dist_train.protocols import present_name


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
    offload_optimizer: bool = False
    """Keep Adam's moments and step in the CPU's memory (ZeRO-Offload): for GPUs that are too small, at the price of
    moving gradients and weights each step."""
    recompute_teacher: bool = False
    """Activation checkpointing: the teacher's blocks keep their inputs alone and compute the rest again when going
    back. The numbers stay the same."""
    compile: bool = False
    """torch.compile student and teacher; the first steps take minutes."""
    hang_timeout_s: Positive = 1800.0
    """If a step takes longer, every rank says where it stands and exits; see dist_train/watchdog.py. Also how long the
    ranks wait for each other at the start."""
    slow_timeout_s: Positive = 7200.0
    """The same for the start with its first step, and for all that is no step: validation, pictures and checkpoint
    together. Also how long a rank waits for the others, as it does while the main one draws pictures: raise it for SAM
    on a CPU."""
    max_bad_steps: Count = 3
    """Steps in a row with a gradient that is not finite before all ranks stop; each one is skipped by all, and the last
    one's samples are kept in RUN/bad_steps."""


class EvalConfig(Section):
    """Validation during training."""

    every: CountOrZero = 500
    """Steps between validations; 0: only at the end."""
    protocol: Annotated[Literal["rgb", "rain200", "did_ddn", "gopro"], BeforeValidator(present_name)] = "rgb"
    """How PSNR and SSIM are computed; see dist_train/protocols.py. y_uint8 and y_double are former names of rain200 and
    did_ddn."""
    teacher: bool = False
    """Also score the teacher, which needs the prior on every whole picture: minutes each with SAM on a CPU."""


class CheckpointConfig(Section):
    """What is kept for resuming."""

    every: CountOrZero = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Annotated[int, Strict(), Field(ge=2)] = 2
    """Newest checkpoints kept; never fewer than two, since the last may be in the making when power fails."""
    keep_best: bool = True
    """Also keep the one whose student has validated best so far, by the PSNR of eval.protocol, among those that were
    saved at a step with a validation."""


class ProfileConfig(Section):
    """Steps whose every operation is traced by torch.profiler, into RUN/trace-rankR.json.gz for chrome://tracing."""

    from_step: CountOrZero = 0
    """The first; 0: no trace. Not among the first ten, which are slower than the rest."""
    steps: Count = 3
    """How many; each takes some MB."""


class TrackConfig(Section):
    """What is written down. metrics.jsonl always is; wandb and TensorBoard are views of it."""

    every: Count = 10
    """Steps between lines of metrics.jsonl."""
    gradients_every: CountOrZero = 100
    """Steps between measurements of each loss term's gradient norm at the student's output; 0: never."""
    pictures_every: CountOrZero = 500
    """Steps between panels (lq, student, teacher, gt, masks) of validation pictures, and at the end; 0: never."""
    num_pictures: Count = 2
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(off_is_false)] = "off"
    project: str = "restill"
    """wandb's project."""
    tensorboard: bool = False
    """Also write RUN/tensorboard, for `tensorboard --logdir runs`."""
    progress: bool = True
    """A progress bar on the main rank."""
    profile: ProfileConfig = ProfileConfig()
    samples: bool = False
    """Write every sample that a rank sees, with a hash of its pixels, to samples-rankR.jsonl."""


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    out: str = "runs"
    """Parent of the run's folder."""
    seed: CountOrZero = 0
    task: Literal["plain", "distill", "conditioned"] = "distill"
    """plain: the student alone. distill: student, prior, teacher, SPD and SGR (Eq. 1-8). conditioned: a student that
    sees the masks of its input (CAT, MAP, SAM-Deblur), in training and ever after."""
    data: DataConfig
    student: NetConfig = NafnetConfig()
    conditioning: ConditioningConfig | None = None
    """For task=conditioned, and no other."""
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
    def uses_masks(self) -> bool:
        """Whether there are any masks."""
        return self.task != "plain" and self.prior.name != "none"

    @property
    def reads_masks(self) -> bool:
        """Whether masks come from the shards."""
        return self.uses_masks and self.prior.name == "stored"

    @property
    def uses_sgr(self) -> bool:
        """Whether VGG is needed."""
        return self.task == "distill" and self.loss.sgr.weight > 0

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        nets = [self.student] + ([self.teacher.net] if self.teacher.net and self.task == "distill" else [])
        if wide := [net for net in nets if net.name == "nafnet" and net.extra_channels]:
            raise ValueError(
                f"extra_channels={wide[0].extra_channels}: such a net wants masks beside the picture; leave it out and "
                "set task=conditioned, whose section `conditioning` says what the net sees of them"
            )
        if (self.task == "conditioned") != (self.conditioning is not None):
            raise ValueError(
                "task=conditioned goes with a section `conditioning`, and no other task does: "
                "`conditioning: {method: map}` (or cat)"
            )
        if self.task == "conditioned" and not self.uses_masks:
            raise ValueError("task=conditioned wants masks, and prior.name=none gives none; take another prior")
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
        if self.engine.offload_optimizer and (self.engine.zero_stage == 0 or self.engine.precision == "fp16"):
            raise ValueError(
                "engine.offload_optimizer=true needs engine.zero_stage=1, 2 or 3, and fp32 or bf16: DeepSpeed's stage "
                "0 has no such thing, and fp16's loss scale was never tried with it"
            )
        if self.engine.compile and self.engine.zero_stage == 3:
            raise ValueError(
                "engine.compile=true needs engine.zero_stage=0, 1 or 2: stage 3's hooks break every net into pieces, "
                "which compile for minutes and run no faster"
            )
        if self.engine.recompute_teacher:
            self._check_recompute()
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
        if self.task != "plain":
            self._check_prior()
        return self

    def _check_recompute(self) -> None:
        net = (self.teacher.net or self.student).name
        if self.task != "distill" or net not in ("nafnet", "uformer", "efficientderain"):
            raise ValueError(
                "engine.recompute_teacher=true is for teachers of nafnet, uformer or efficientderain, whose blocks "
                f"give the same numbers twice; here task={self.task} and the teacher is of {net}. Set it to false"
            )

    def _check_prior(self) -> None:
        prior = self.prior
        if prior.name == "none" and self.uses_sgr:
            raise ValueError(
                f"prior.name=none gives SGR no masks, and loss.sgr.weight={self.loss.sgr.weight:g}; set it to 0, or "
                "take another prior"
            )
        if prior.name == "cached" and self.student.name == "rcdnet" and self.student.batch_norm == "rank":
            raise ValueError(
                "prior.name=cached looks at pictures as the student restores them, by running means that with "
                "student.batch_norm=rank differ from rank to rank; set student.batch_norm=synced"
            )
        if prior.name == "remote" and prior.timeout_s >= self.engine.hang_timeout_s:
            raise ValueError(
                f"prior.timeout_s={prior.timeout_s:g} must be below engine.hang_timeout_s="
                f"{self.engine.hang_timeout_s:g}, or the run ends before it can say which server is slow"
            )
        here, where = (prior.of, "prior.of") if prior.name == "cached" else (prior, "prior")  # a server has its own
        if here.name == "sam" and here.dtype == "fp16" and self.engine.device == "cpu":
            raise ValueError(
                f"{where}.dtype=fp16 needs a GPU, and engine.device=cpu; set {where}.dtype to auto or bf16"
            )


def changed_method(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that make two runs different methods or streams of samples, so that one cannot go on as the other.

    Paths of weights and of data may change; `trainer` compares what lies there. So may the place where masks are made
    (`remote`), and with data.accept_new_data the shares of data sets.

    Returns:
        `key=old is now new`, for each that differs.
    """
    fixed = (
        "task", "seed", "student", "conditioning", "teacher", "prior", "features", "loss",
        "data.crop_px", "data.progressive", "data.flips", "data.mixup", "data.rainmix",
        "data.order", "data.window", "data.lanes", "optim.global_batch", "optim.name",
        *(() if now.data.accept_new_data else ("data.shares",)),
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
    tree["data"]["shares"] = dict(zip(run.data.names, run.data.shares, strict=True))
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

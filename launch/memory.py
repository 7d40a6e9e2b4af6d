"""What a rank needs of memory, estimated: states are counted, activations followed on tensors without data."""

import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_train.config import LivePriorConfig, RunConfig, SamConfig, plan_batch
from dist_train.data.batch import Batch
from dist_train.engine import deepspeed_config
from dist_train.nets.recompute import recompute_blocks
from dist_train.priors import Priors
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam_attention import use_fused_attention
from dist_train.priors.tiny_vit import build_mobile_sam
from dist_train.priors.vgg import Features, load_features
from dist_train.room import LiveBytes
from dist_train.tasks import build_task, count_parameters

log = logging.getLogger(__name__)

FLOAT32 = 4
PROMPT_BYTES = 25 * 10**6
"""What SAM's decoder needs for a prompt in float32; see `dist_train.priors.automatic`."""


def state_bytes(run: RunConfig, *, student: int, trained: int, world: int) -> dict[str, int]:
    """What a rank's GPU keeps from step to step, and the gradients, in bytes: arithmetic, without DeepSpeed's padding.

    Stages 1 and 2 are alike: DeepSpeed moves each gradient into the bucket as it comes, and from there only a rank's
    own part stays. Both keep a copy of that part of the float32 weights. Stage 3 shards the weights too; those in use
    are gathered, in the worst case all.

    Args:
        run: stage, offloading, average.
        student: parameters of the student.
        trained: parameters in all.
        world: number of ranks.

    Returns:
        Part -> bytes: parameters, gradients, optimizer, and where there are any: average, bucket, gathered.
    """
    stage, whole = run.engine.zero_stage, FLOAT32 * trained
    part = -(-whole // world)
    parts = {
        "parameters": part if stage == 3 else whole,
        "gradients": part if stage else whole,
        "optimizer": 3 * part if stage else 2 * whole,  # Adam's moments, and the copy
    }
    if run.engine.offload_optimizer:
        parts["optimizer"] = 0
    if run.optim.ema_decay > 0:
        parts["average"] = FLOAT32 * student
    if stage:
        config = deepspeed_config(run, plan_batch(run.optim, world))
        parts["bucket"] = FLOAT32 * config["zero_optimization"]["reduce_bucket_size"]
    if stage == 3:
        parts["gathered"] = whole
    return parts


def update_bytes(run: RunConfig, *, trained: int, world: int) -> int:
    """What the update needs beside the states, in bytes: two terms of Adam; from stage 1 also gradients in one piece.

    Args:
        run: stage, offloading.
        trained: parameters in all.
        world: number of ranks.
    """
    if run.engine.offload_optimizer:
        return 0
    part = -(-FLOAT32 * trained // world)
    return 3 * part if run.engine.zero_stage else 2 * FLOAT32 * trained


class Frozen(NamedTuple):
    """What a prior needs."""

    weights: int
    """Bytes."""
    working: int
    """Bytes while it computes, of which nothing stays."""
    note: str = ""


def prior_bytes(run: RunConfig, *, batch: int) -> Frozen:
    """SAM by the parameters of its published nets; what is not known is said.

    Args:
        run: names the prior.
        batch: pictures that it sees at once.
    """
    if run.task == "plain":
        return Frozen(0, 0)
    prior = run.prior.of if run.prior.name == "cached" else run.prior
    if prior.name == "sam":
        return sam_bytes(prior, batch=batch)
    if prior.name == "psp":
        return Frozen(0, 0, "PSPNet's memory is not counted")
    return Frozen(0, 0)  # regions are found on the CPU; stored and remote masks are made elsewhere


def sam_bytes(config: SamConfig, *, batch: int) -> Frozen:
    """SAM on a GPU: weights in float32 but the decoder's, which are in half precision if `config.dtype` is not fp32."""
    sam = build_sam(config)
    half = config.dtype != "fp32"
    decoder = sum(parameter.numel() for parameter in sam.mask_decoder.parameters())
    weights = FLOAT32 * (sum(parameter.numel() for parameter in sam.parameters()) - (decoder // 2 if half else 0))
    if config.generator == "batched" and hasattr(sam.image_encoder, "blocks"):
        use_fused_attention(sam.image_encoder)
    side = sam.image_encoder.img_size
    picture = torch.empty(batch, 3, side, side, device="meta")
    with LiveBytes() as live, torch.no_grad():
        sam.image_encoder(picture)
    prompts = config.points_per_batch or 64
    return Frozen(weights, max(live.peak, prompts * PROMPT_BYTES) // (2 if half else 1))


def build_sam(config: SamConfig) -> Any:
    """The published net, without storage."""
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        if config.model == "tiny_vit":
            return build_mobile_sam(None, input_px=config.input_px).eval()
        return sam_model_registry[config.model]().eval()


class Activations(NamedTuple):
    """What a forward and backward pass needs beside the states, a gradient at a time included."""

    num_bytes: int
    how: str


def activation_bytes(run: RunConfig, *, batch: int) -> Activations:
    """Follow one micro-batch through losses and backward pass, and note the most that lives at once.

    Half precision is as autocast has it on a CPU. Working memory inside a kernel, as cuDNN's, is not seen.

    Args:
        run: the run.
        batch: samples of the micro-batch.
    """
    try:
        found = _followed(run, batch=batch, crop_px=run.data.crop_px, data=False)
        return Activations(found, f"followed through a step on tensors without data, {batch} x {run.data.crop_px} px")
    except Exception as error:  # a net from elsewhere may do anything that needs data
        log.info("not followed on tensors without data (%s: %s): computed on small ones", type(error).__name__, error)
    small = min(run.data.crop_px, 64)
    found = _followed(run, batch=1, crop_px=small, data=True) * batch * run.data.crop_px**2 // small**2
    return Activations(found, f"computed for one sample of {small} px, times pixels and samples")


def _followed(run: RunConfig, *, batch: int, crop_px: int, data: bool) -> int:
    if run.conditioning and run.conditioning.drops_masks:  # which ones are dropped, no tensor without data can say
        keeping = run.conditioning.model_copy(update={"mask_dropout": 0.0})
        run = run.model_copy(update={"conditioning": keeping})
    with torch.device("cpu" if data or needs_files(run) else "meta"):
        task = build_task(run).train()
    with nullcontext() if data else FakeTensorMode(allow_non_fake_inputs=True):
        if not data:
            task.to_empty(device="cpu")  # as it says; its kernels will not run
        if run.engine.recompute_teacher:
            recompute_blocks(task.get_submodule("teacher"))
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)  # `state_bytes` counts them
        image = torch.rand(batch, 3, crop_px, crop_px)
        pictures = Batch.of_images(image, image.clone())
        priors = Priors(_all_valid(run.prior.num_masks), random_features(run) if run.uses_sgr else None)
        dtype = torch.float16 if run.engine.precision == "fp16" else torch.bfloat16
        with LiveBytes() as live:
            with torch.autocast("cpu", dtype, enabled=run.engine.precision != "fp32"):
                losses = task(pictures, priors)
            losses["total"].backward()
        return live.peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _all_valid(num_masks: int) -> Any:
    def masks(images: Tensor, batch: object, *, restore: object = None) -> MaskSet:
        found = torch.ones(len(images), num_masks, *images.shape[-2:], dtype=torch.bool)
        return MaskSet(found, found.any(3).any(2))

    return masks


def needs_files(run: RunConfig) -> bool:
    """Whether a net is from elsewhere: building it may read a file, for which there must be storage."""
    return "custom" in {run.student.name} | ({run.teacher.net.name} if run.teacher.net else set())


def random_features(run: RunConfig) -> Features:
    """The features with random weights, whose file need not be there."""
    logger = logging.getLogger("dist_train.priors.vgg")
    before = logger.level
    logger.setLevel(logging.ERROR)  # nothing is compared by them
    try:
        return load_features(run.features.model_copy(update={"weights": "random"}), torch.device("cpu"))
    finally:
        logger.setLevel(before)


def rank_bytes(run: RunConfig, *, world: int) -> tuple[dict[str, int], list[str]]:
    """All that a rank's GPU holds at its fullest, in bytes by part; and how it was come by, in sentences.

    Raises:
        ValueError: the global batch cannot be shared by so many ranks.
    """
    plan = plan_batch(run.optim, world)
    with torch.device("cpu" if needs_files(run) else "meta"):
        task: nn.Module = build_task(run)
    counts = count_parameters(task)
    trained = sum(count for part, count in counts.items() if "." not in part)
    parts = state_bytes(run, student=counts["student"], trained=trained, world=world)
    prior = prior_bytes(run, batch=plan.batch_per_rank)
    if run.uses_sgr:
        with FakeTensorMode():
            features = random_features(run)
        parts["vgg"] = sum(conv.weight.nbytes + conv.bias.nbytes for conv in features.convs)
    activations = activation_bytes(run, batch=plan.batch_per_rank)
    if prior.weights:
        parts["sam"] = prior.weights
    # SAM works while the student's activations wait; in the worst case that is when they are most.
    passing = {"activations": activations.num_bytes} | ({"sam_working": prior.working} if prior.working else {})
    parts |= passing
    over = update_bytes(run, trained=trained, world=world) - sum(passing.values()) - parts.get("bucket", 0)
    if over > 0:  # these are gone by then
        parts["update, beyond what passes left"] = over
    notes = [f"activations: {activations.how}"]
    if run.task == "distill" and run.prior.name == "cached":
        notes.append("passes of the student over whole pictures, for prior.name=cached, are not counted")
    return parts, notes + ([prior.note] if prior.note else [])


def live_prior(run: RunConfig) -> LivePriorConfig | None:
    """What makes masks in the ranks of the run, if anything does."""
    prior = run.prior.of if run.prior.name == "cached" else run.prior
    return None if run.task == "plain" or prior.name in ("stored", "remote", "none") else prior  # type: ignore[return-value]

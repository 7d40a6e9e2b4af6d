"""What a run would need on a cluster: memory of a rank and time of a step, as `launch.train --check --gpus N` says.

Estimates, all of them: what is assumed is printed beside what follows from it.
"""

import logging
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import RunConfig, plan_batch
from dist_train.tasks import build_task, count_parameters, sample_flops
from dist_train.watch import PEAK_TFLOPS, known_gpu, peak_tflops
from launch.bench.cost import sam_cost
from launch.memory import build_sam, live_prior, needs_files, random_features, rank_bytes
from launch.step_time import Link, StepCost

log = logging.getLogger(__name__)

GIB = 2**30
GPU_GIB = {
    "V100": 16, "T4": 16, "A100": 40, "A10G": 24, "A10": 24, "A30": 24, "A40": 48, "L4": 24, "L40S": 48,
    "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200": 141, "GH200": 96, "B200": 180,
    "RTX 3090": 24, "RTX 4090": 24, "RTX A6000": 48, "RTX 6000 Ada": 48,
}  # fmt: skip
"""Of the smallest that bears the name, from the makers' data sheets."""
CONTEXT_GIB = 1.0
"""CUDA, its libraries and NCCL, in each process: assumed."""

GAP = 0.15
"""What runs on a CPU took beyond the sum of the parts, libraries apart: 13 and 16 % (configs/RESULTS.md)."""

# Assumed, none of it measured here. A short run tells the first, as time/mfu in its metrics.jsonl.
MFU = {"fp32": 0.05, "bf16": 0.15, "fp16": 0.15}
"""Of the GPU's half-precision peak, what student, teacher and VGG reach. Restoration nets are bound by memory."""
SAM_MFU = 0.4
"""The same of SAM, a large transformer."""
SPREAD = 0.1
"""cv of the time that one picture takes."""
FIXED_S = {0: 0.01, 1: 0.01, 2: 0.01, 3: 0.03}
"""What DeepSpeed and the optimizer add to a step, by ZeRO stage."""
WITHIN_NODE = Link(200e9, 5e-6)
BETWEEN_NODES = Link(25e9, 10e-6)
"""NVLink; and a network of 200 Gbit/s for each GPU."""


class Cluster(NamedTuple):
    """Where a run would run."""

    gpus: int
    """In all, one rank each."""
    nodes: int = 1
    gpu: str = "A100"
    """As `dist_train.watch.known_gpu` reads it."""
    mfu: float | None = None
    """See `MFU`."""

    @property
    def link(self) -> Link:
        """The slowest that a ring over all ranks goes through."""
        return WITHIN_NODE if self.nodes == 1 else BETWEEN_NODES

    def check(self) -> None:
        """Raises ValueError: no such cluster."""
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(f"--gpus {self.gpus} cannot be spread over --nodes {self.nodes}; each has as many")
        if peak_tflops(self.gpu) is None:
            raise ValueError(f"--gpu {self.gpu}: known are {', '.join(PEAK_TFLOPS)}")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu:g} must be above 0 and at most 1, as time/mfu of metrics.jsonl is")


class Work(NamedTuple):
    """FLOPs of one sample, two for each multiply-add."""

    nets: float
    """Student and teacher, forwards and backwards."""
    features: float = 0.0
    """VGG of both outputs, and back to the student's."""
    sam: float = 0.0


def sample_work(run: RunConfig) -> Work:
    """Counted on tensors without data."""
    device = torch.device("cpu" if needs_files(run) else "meta")
    with device:
        task = build_task(run)
    nets, features, sam = sample_flops(task, run, device), 0.0, 0.0
    if run.uses_sgr:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            random_features(run)(torch.zeros(1, 3, run.data.crop_px, run.data.crop_px))
        features = 3.0 * counter.get_total_flops()
    prior = live_prior(run)
    if prior is not None and prior.name == "sam":
        cost = sam_cost(lambda: build_sam(prior))
        kind = prior.generator
        sam = 2.0 * (cost.per_picture[kind] + cost.per_prompt[kind] * prior.points_per_side**2).macs
        if run.prior.name == "cached":
            sam /= run.prior.refresh
    return Work(nets, features, sam)


def step_cost(run: RunConfig, cluster: Cluster, work: Work) -> StepCost:
    """The cost model's numbers, from FLOPs and what is assumed."""
    plan = plan_batch(run.optim, cluster.gpus)
    samples = plan.batch_per_rank * plan.grad_accum
    peak = peak_tflops(cluster.gpu)
    assert peak is not None, "`Cluster.check` comes first"
    mfu = cluster.mfu or MFU[run.engine.precision]
    sample_s = ((work.nets + work.features) / mfu + work.sam / SAM_MFU) / (peak * 1e12)
    with torch.device("cpu" if needs_files(run) else "meta"):
        counts = count_parameters(build_task(run))
    trained = sum(count for part, count in counts.items() if "." not in part)
    one = StepCost(
        sample_s,
        SPREAD,
        FIXED_S[run.engine.zero_stage],
        num_bytes=4 * trained,
        calls=2,
        traffic=1.5 if run.engine.zero_stage == 3 else 1.0,
    )
    return one.with_batch(samples)


def describe_estimate(run: RunConfig, cluster: Cluster) -> list[str]:
    """Memory and time in lines of a comment.

    Raises:
        ValueError: there is no such cluster, or the global batch cannot be shared by so many ranks.
    """
    cluster.check()
    parts, notes = rank_bytes(run, world=cluster.gpus)
    total = sum(parts.values()) * (1 + GAP) / GIB + CONTEXT_GIB
    has = GPU_GIB[known_gpu(cluster.gpu) or ""]
    verdict = "fits" if total <= has else "DOES NOT FIT: lower optim.batch_per_rank, or set engine.recompute_teacher"
    work = sample_work(run)
    cost, link, gpus = step_cost(run, cluster, work), cluster.link, cluster.gpus
    seconds = cost.seconds(gpus, link)
    hours = seconds * run.optim.steps / 3600
    where = f"{gpus} x {cluster.gpu} on {cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    lines = [
        f"ESTIMATE for {where}: counted and assumed, not measured",
        f"memory of a rank: {total:.2f} GiB of {has} GiB, {verdict}",
        *(f"  {part}: {size / 2**20:,.0f} MiB" for part, size in parts.items()),
        f"  gap: {sum(parts.values()) * GAP / 2**20:,.0f} MiB, the {GAP:.0%} that runs on a CPU took on top",
        f"  context: {CONTEXT_GIB * 1024:,.0f} MiB, assumed; what the allocator leaves unused comes on top",
        *(f"  {note}" for note in notes),
        f"time of a step: {seconds * 1e3:.1f} ms, {run.optim.global_batch / seconds:.1f} samples/s, "
        f"{hours:.1f} h for {run.optim.steps} steps, without validation and checkpoints",
        f"  computing {cost.compute_s * 1e3:.1f} ms, waiting for the slowest {cost.waiting_s(gpus) * 1e3:.1f}, "
        f"all-reduce {cost.communication_s(gpus, link) * 1e3:.1f}, fixed {cost.fixed_s * 1e3:.1f}",
        f"  efficiency against one such GPU with the same batch: {cost.efficiency(gpus, link):.0%}",
        f"  TFLOP a sample: nets {work.nets / 1e12:.3f}, VGG {work.features / 1e12:.3f}, SAM {work.sam / 1e12:.3f}",
        f"  assumed: {peak_tflops(cluster.gpu):g} TFLOP/s at most, of which nets and VGG reach "
        f"{cluster.mfu or MFU[run.engine.precision]:.0%} (--mfu) and SAM {SAM_MFU:.0%}; spread between pictures "
        f"{SPREAD:.0%}; {link.bytes_per_s / 1e9:.0f} GB/s, {link.latency_s * 1e6:.0f} us a hop; nothing overlaps",
    ]
    prior = live_prior(run)
    if prior is not None and prior.name != "sam":
        lines.append(f"  prior.name={prior.name}: its time is not counted")
    if run.engine.recompute_teacher:
        lines.append("  engine.recompute_teacher: the teacher's second forward pass is not counted")
    if run.engine.offload_optimizer:
        lines.append("  engine.offload_optimizer: moving gradients and weights is not counted")
    return lines

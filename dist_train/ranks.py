"""Joining the ranks, telling them apart, agreeing. Every function works in an unlaunched process (world size 1).

A decision that changes control flow (stop, skip, resume from here) goes through `agree` or `broadcast_object`, so no
rank acts alone; what one rank does for all (files) goes through `on_main`. Tensors travel on the rank's own device, as
NCCL demands; gloo takes the CPU.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.config import RunConfig, plan_batch

T = TypeVar("T")

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The numbers went wrong, on all ranks alike; a person can mend it with other settings."""


def rank() -> int:
    """Global rank of this process; 0 if unlaunched."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 if unlaunched."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank within this node, which is also the index of its GPU; 0 if unlaunched."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the one rank that writes files."""
    return rank() == 0


def _comm_device() -> torch.device:
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    return torch.device("cuda", local_rank()) if "nccl" in backend else torch.device("cpu")


def mean_tensor(values: Tensor) -> Tensor:
    """Mean of a tensor over ranks, on the CPU, float64.

    Args:
        values: any shape, any float dtype; the same shape on every rank.
    """
    values = values.detach().to(_comm_device(), torch.float64).clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values.cpu()


def mean_dict(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Mean over ranks of named scalars, in one collective. Every rank must bring the same names."""
    names = sorted(values)
    stacked = torch.stack([torch.as_tensor(values[name]).detach().to("cpu", torch.float64) for name in names])
    return dict(zip(names, mean_tensor(stacked).tolist(), strict=True))


def agree(flag: bool) -> bool:
    """Whether *all* ranks say yes."""
    return mean_tensor(torch.tensor(float(flag))).item() == 1.0


def any_rank(flag: bool) -> bool:
    """Whether *any* rank says yes."""
    return not agree(not flag)


def largest(value: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    box = torch.tensor(value, device=_comm_device())
    if world_size() > 1:
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def broadcast_object(value: T) -> T:
    """The main rank's object, on every rank. Small, picklable things only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_comm_device())
    return box[0]


def on_main(act: Callable[[], T]) -> T:
    """Let the main rank alone do something, and all learn how it ended. All ranks call.

    Returns:
        What `act` gave on the main rank, on every rank; small, picklable.

    Raises:
        Exception: what `act` raised on the main rank, on every rank.
    """
    answer: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        try:
            answer = (act(), None)
        except Exception as error:
            if world_size() == 1:
                raise
            log.debug("on the main rank", exc_info=True)
            answer = (None, sendable(error))
    result, problem = broadcast_object(answer)
    if problem is not None:
        raise problem
    return cast(T, result)


def sendable(error: Exception) -> Exception:
    """The error itself if it survives the way to another rank, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class raises on its way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather_objects(value: T) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def start_ranks(run: RunConfig) -> torch.device:
    """`join_ranks` for a run, after checking that the launcher does not contradict it.

    Raises:
        ValueError: it does, or the run wants what this machine lacks.
    """
    _check_launcher(run)
    device = join_ranks(run.engine.device, timeout_s=run.engine.hang_timeout_s, wait_s=run.engine.slow_timeout_s)
    if run.engine.precision == "fp16" and device.type == "cpu":
        raise ValueError("engine.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    return device


def join_ranks(wanted: str, *, timeout_s: float = 1800, wait_s: float = 7200) -> torch.device:
    """Join the process group (of one, if unlaunched) and pick this rank's device.

    Args:
        wanted: `auto` (CUDA if there is any), `cpu` or `cuda`.
        timeout_s: how long to wait until all ranks are there.
        wait_s: how long a collective may wait for the other ranks.

    Raises:
        ValueError: CUDA is wanted and absent, or there are more ranks than GPUs.
    """
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not num_gpus:
        raise ValueError("the device wanted is cuda, but torch sees no GPU; python -m launch.doctor tells why")
    if num_gpus and local_rank() >= num_gpus:
        raise ValueError(
            f"this is local rank {local_rank()} of a machine with {num_gpus} GPUs; start at most {num_gpus} "
            "processes a machine (num_processes in the accelerate file)"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if num_gpus else "cpu")
    if num_gpus:
        torch.cuda.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # unlaunched: DeepSpeed still wants a group and the variables of a launcher
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        dist.init_process_group(
            "nccl" if num_gpus else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=wait_s),
        )
    return torch.device("cuda", local_rank()) if num_gpus else torch.device("cpu")


def set_patience(group: dist.ProcessGroup, wait_s: float) -> None:
    """Let the collectives of a group wait so long for other ranks, whoever made it."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
    set_timeout(timedelta(seconds=wait_s), group)


def _check_launcher(run: RunConfig) -> None:
    """accelerate hands its DeepSpeed settings down in variables; where they contradict the run, neither may win."""
    accum = plan_batch(run.optim, world_size()).grad_accum
    said = {
        "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "engine.zero_stage", run.engine.zero_stage),
        "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "optim.clip_norm", run.optim.clip_norm),
        "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulation of", accum),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "settings of its own:", "none"),
        "offload_optimizer_device": (
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "engine.offload_optimizer on",
            "cpu" if run.engine.offload_optimizer else "none",
        ),
        "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload", "none"),
    }
    if (
        os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    ):  # accelerate always says mixed_precision, and "no" where nobody asked
        said["mixed_precision"] = ("ACCELERATE_MIXED_PRECISION", "engine.precision", run.engine.precision)
    for setting, (variable, key, wanted) in said.items():
        launched = os.environ.get(variable, "none")
        if launched not in (str(wanted), "none"):
            raise ValueError(
                f"the launcher says {setting}={launched} and the run {key}={wanted}; leave {setting} out of the "
                "accelerate file and command, since the run decides"
            )


def is_of_peers(error: Exception) -> bool:
    """Whether an error comes from the collectives, as when another rank is gone. gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

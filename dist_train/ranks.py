"""Who am I among the ranks, and what do we agree on. Every function works in an unlaunched process (world size 1).

A decision that changes control flow (stop, skip, resume from here) goes through `agree` or `broadcast_object`, so no
rank acts alone; what one rank does for all (files) goes through `on_main`. Tensors travel on the rank's own device, as
NCCL demands; gloo takes the CPU.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

log = logging.getLogger(__name__)


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


def sum_tensor(values: Tensor) -> Tensor:
    """Sum of a tensor over ranks, on the CPU, float64."""
    return mean_tensor(values) * world_size()


def mean_dict(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Mean over ranks of named scalars, in one collective. Every rank must bring the same names."""
    names = sorted(values)
    stacked = torch.stack([torch.as_tensor(values[name]).detach().to("cpu", torch.float64) for name in names])
    return dict(zip(names, mean_tensor(stacked).tolist(), strict=True))


def agree(flag: bool) -> bool:
    """Whether *all* ranks say yes."""
    return bool(sum_tensor(torch.tensor(float(flag))).item() > world_size() - 0.5)


def any_rank(flag: bool) -> bool:
    """Whether *any* rank says yes."""
    return not agree(not flag)


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
            answer = (None, error)
    result, problem = broadcast_object(answer)
    if problem is not None:
        raise problem
    return cast(T, result)


def gather_objects(value: T) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list = [None] * world_size()
    dist.all_gather_object(box, value)
    return box

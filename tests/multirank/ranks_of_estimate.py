"""What each rank does in tests/multirank/test_estimate.py; module-level, so that processes can import it."""

import gc
from typing import Any

import torch

from dist_train import ranks
from dist_train.config import plan_batch
from dist_train.engine import Engine
from dist_train.ranks import start_ranks
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run, tiny_task


def bytes_in_stages(stages: list[int]) -> dict[int, tuple[int, int, int]]:
    """`bytes_held` in each."""
    return {stage: bytes_held(stage) for stage in stages}


def bytes_held(stage: int) -> tuple[int, int, int]:
    """Parameters of student and task, and the bytes of all tensors that an engine has brought after two steps."""
    run = tiny_run(engine={"zero_stage": stage})
    device, priors = start_ranks(run), tiny_priors(run)
    batches = tiny_batches(plan_batch(run.optim, ranks.world_size()), rank=ranks.rank(), world=ranks.world_size())
    before = _storages()
    task = tiny_task(run)
    student, trained = (sum(p.numel() for p in part.parameters()) for part in (task.student, task))
    engine: Any = Engine(run, task, plan_batch(run.optim, ranks.world_size()), device)
    for _ in range(2):
        engine.step(batches, priors)
    engine.drain()
    engine._guard.begin()
    del batches  # with what they last gave
    held = sum(size for key, size in _storages().items() if key not in before)
    engine.close()
    return student, trained, held


def _storages() -> dict[int, int]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return {storage._cdata: storage.nbytes() for storage in storages}

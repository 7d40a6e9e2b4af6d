"""What each rank does in tests/multirank/test_batch_norm.py; module-level, so that processes can import it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dist_train import engine, ranks
from dist_train.nets.batch_norm import SyncedBatchNorm2d
from tests.multirank.ranks_of_engine import _engine, _snapshot, _steps


def normalise(dtype: torch.dtype) -> dict[str, Any]:
    """Two passes of this rank's share of 4 samples, with the gradients of the second.

    The loss is the mean over the share, and the gradients are averaged over the ranks as the engine does it.
    """
    world = ranks.world_size()
    generator = torch.Generator().manual_seed(0)
    norm = SyncedBatchNorm2d(3) if world > 1 else nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    share = 4 // world
    for _ in range(2):
        # Far from zero, so that E[x^2] - E[x]^2 would lose most of its digits; and each sample elsewhere.
        x = 300 + torch.arange(4.0)[:, None, None, None] + torch.randn(4, 3, 5, 6, generator=generator)
        wanted = torch.randn(4, 3, 5, 6, generator=generator)
        x, wanted = (whole[ranks.rank() * share :][:share] for whole in (x, wanted))
        x = x.to(dtype).requires_grad_()
        y = norm(x)
    (y - wanted).square().mean().backward()
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    gradients = {"weight": ranks.mean_tensor(norm.weight.grad), "bias": ranks.mean_tensor(norm.bias.grad)}
    return {"y": y.detach(), "x": x.grad / world, "gradients": gradients, "state": state}


def train_and_resume(stages: list[int], sections: dict[str, Any]) -> tuple[dict[int, Any], list[dict[str, float]]]:
    """In each stage two steps, a snapshot and a third step; and the third again in the last, from the first's snapshot.

    Stage 3 shards every parameter, as it does those of larger nets: by default DeepSpeed keeps small ones whole.
    """
    config = engine.deepspeed_config

    def without_threshold(*args: Any) -> dict[str, Any]:
        made = config(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    engine.deepspeed_config = without_threshold
    results = {}
    for stage in stages:
        trained = _engine(stage, **sections)
        lines = _steps(trained, 2)
        snapshot = _snapshot(trained)
        results[stage] = SimpleNamespace(**vars(snapshot), lines=lines + _steps(trained, 1))
        trained.close()
    resumed = _engine(stages[-1], resumed=results[stages[0]], **sections)
    again = _steps(resumed, 1)
    resumed.close()
    return results, again

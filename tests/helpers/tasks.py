"""Small real tasks and batches for tests of the engine: the same samples whatever the number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_train.config import BatchPlan, RunConfig, VggConfig, parse_run
from dist_train.data.batch import Batch
from dist_train.priors import Priors
from dist_train.priors.regions import RegionsPrior
from dist_train.priors.vgg import Features, load_features
from dist_train.tasks import build_task


def tiny_run(tmp: Path | str = "unused", **sections: object) -> RunConfig:
    """A distill run of two tiny NAFNets with all terms on."""
    tree: dict[str, object] = {
        "name": "tiny",
        "out": str(tmp),
        "data": {"train": "unused", "crop_px": 16, "workers": 0},
        "student": {"name": "nafnet", "width": 4, "enc_blk_nums": [1], "dec_blk_nums": [1]},
        "teacher": {"spf": {"max_channels": 8}},
        "prior": {"name": "regions", "num_masks": 6, "scale": 50.0, "min_area_px": 16},
        "features": {"weights": "random", "layer": "relu2_2"},
        "loss": {"sgr": {"weight": 1.0}},
        "optim": {"steps": 8, "global_batch": 4, "lr": 1e-3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if _adds(tree.get(name), section) else section  # type: ignore[dict-item]
    return parse_run(tree, source="tiny_run")


def _adds(default: object, section: object) -> bool:
    """Whether a section changes the default, and is not another kind (net, prior) altogether."""
    if not isinstance(section, dict) or not isinstance(default, dict):
        return False
    return "name" not in section or section["name"] == default.get("name")


def tiny_task(run: RunConfig) -> nn.Module:
    """The run's task, NAFNet's residual scales shaken so that all parameters have a gradient."""
    torch.manual_seed(run.seed)
    task = build_task(run)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if name.endswith((".beta", ".gamma", "fuse.weight")):
                parameter.normal_(0, 0.1)
    return task


def tiny_priors(run: RunConfig) -> Priors:
    """Regions and random VGG features, as far as the task wants any."""
    if run.task == "plain":
        return Priors(masks=None, features=None)
    assert run.prior.name == "regions"
    return Priors(masks=RegionsPrior(run.prior), features=_features(run.features) if run.uses_sgr else None)


@lru_cache(maxsize=1)  # twenty million random numbers
def _features(config: VggConfig) -> Features:
    return load_features(config, torch.device("cpu"))


def tiny_batches(plan: BatchPlan, *, rank: int, world: int, start_step: int = 0, px: int = 16) -> Iterator[Batch]:
    """Blocky pictures with noise, every third of one colour; sample p is a pure function of p."""
    step = start_step
    while True:
        for micro in range(plan.grad_accum):
            first = step * plan.global_batch + (micro * world + rank) * plan.batch_per_rank
            positions = range(first, first + plan.batch_per_rank)
            pairs = [_pair(position, px) for position in positions]
            batch = Batch.of_images(
                torch.stack([lq for lq, _ in pairs]),
                torch.stack([gt for _, gt in pairs]),
                keys=tuple(str(position) for position in positions),
            )
            yield replace(batch, positions=torch.tensor(positions))
        step += 1


def _pair(position: int, px: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(position)
    blocks = rng.random((3, 1, 1) if position % 3 == 2 else (3, 4, 4)) * np.ones((3, 4, 4))
    blocks = blocks.repeat(px // 4, 1).repeat(px // 4, 2)
    noisy = blocks + 0.1 * rng.standard_normal(blocks.shape)
    return torch.from_numpy(noisy).float(), torch.from_numpy(blocks).float()

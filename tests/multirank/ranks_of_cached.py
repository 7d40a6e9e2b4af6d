"""What each rank does in tests/multirank/test_priors_cached.py; module-level, so that processes can import it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dist_train import engine, ranks
from dist_train.config import RunConfig, plan_batch
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader
from dist_train.engine import Engine
from dist_train.priors import build_priors
from dist_train.ranks import start_ranks
from tests.helpers.tasks import tiny_run, tiny_task


def run_of(folder: Path, stage: int, name: str) -> RunConfig:
    """Masks remade every other epoch, of 6 samples by 4: steps straddle epochs."""
    of = {"name": "regions", "num_masks": 9, "scale": 50.0, "min_area_px": 16}
    return tiny_run(
        folder,
        name=name,
        data={"train": str(folder / "shards"), "crop_px": 16, "workers": 0},
        prior={"name": "cached", "num_masks": 6, "refresh": 2, "of": of},
        engine={"zero_stage": stage},
    )


def train(folder: Path, stage: int, name: str, *, steps: int, resumed: Any = None) -> tuple[list[dict], Any]:
    """Loss lines up to step `steps`, and what to go on from."""
    config: Callable[..., dict[str, Any]] = engine.deepspeed_config

    def without_threshold(*args: Any) -> dict[str, Any]:
        """As nets of full size meet stage 3: no parameter is small enough to stay whole on every rank."""
        made = config(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    engine.deepspeed_config = without_threshold
    run = run_of(folder, stage, name)
    device, reader = start_ranks(run), ShardReader(run.data.train)
    plan = plan_batch(run.optim, ranks.world_size())
    task = tiny_task(run)
    start = 0
    if resumed is not None:
        task.load_state_dict(resumed.model)
        start = resumed.state["step"]
    training = Engine(run, task, plan, device, resumed=resumed)
    priors = build_priors(run, device, train=reader, val=None, checkpoints=lambda: [2])
    batches = training_batches(
        reader, run.data, seed=0, plan=plan, rank=ranks.rank(), world=ranks.world_size(), start_step=start
    )
    lines = []
    while training.step_count < steps:
        training.step(batches, priors)
        lines.append(training.drain())
    snapshot = SimpleNamespace(
        state={"step": steps}, model=training.weights(), ema=training.ema_weights(), moments=training.moments()
    )
    training.close()
    engine.deepspeed_config = config
    return lines, snapshot


def stages(folder: Path, name: str) -> dict[int, list[dict]]:
    """Loss lines of 9 steps, six epochs."""
    return {stage: train(folder, stage, f"{name}-{stage}", steps=9)[0] for stage in (0, 3)}


def halves(folder: Path) -> list[dict]:
    """To step 2, a checkpoint; on to step 7; and again from the checkpoint, to step 9."""
    _, snapshot = train(folder, 3, "halves", steps=2)
    train(folder, 3, "halves", steps=7, resumed=snapshot)
    return train(folder, 3, "halves", steps=9, resumed=snapshot)[0]

"""What each rank does in tests/multirank/test_engine.py; module-level, so that processes can import it."""

from types import SimpleNamespace
from typing import Any

import torch

from dist_train import ranks
from dist_train.config import plan_batch
from dist_train.engine import Engine, start_ranks
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run, tiny_task

STEPS = 4


def _engine(stage: int, resumed: Any = None, **sections: Any) -> Engine:
    run = tiny_run(engine={"zero_stage": stage, **sections.pop("engine", {})}, **sections)
    device = start_ranks(run)
    plan = plan_batch(run.optim, ranks.world_size())
    task = tiny_task(run)
    if resumed is not None:
        task.load_state_dict(resumed.model)
    return Engine(run, task, plan, device, resumed=resumed)


def _steps(engine: Engine, count: int) -> list[dict[str, float]]:
    batches = tiny_batches(engine.plan, rank=ranks.rank(), world=ranks.world_size(), start_step=engine.step_count)
    priors = tiny_priors(engine.run)
    lines = []
    for _ in range(count):
        engine.step(batches, priors, measure=True)
        lines.append(engine.drain())
    return lines


def _snapshot(engine: Engine) -> Any:
    state = {"step": engine.step_count}
    return SimpleNamespace(state=state, model=engine.weights(), ema=engine.ema_weights(), moments=engine.moments())


def losses_of_stages(stages: list[int], sections: dict[str, Any]) -> dict[int, Any]:
    """Loss lines and final weights of each stage."""
    result = {}
    for stage in stages:
        engine = _engine(stage, **sections)
        result[stage] = (_steps(engine, STEPS), engine.weights(), engine.ema_weights())
        engine.close()
    return result


def resume_everywhere(stages: list[int], start: Any, sections: dict[str, Any]) -> dict[int, Any]:
    """From one snapshot in each stage: what a snapshot taken at once holds, and the loss lines of two more steps."""
    result = {}
    for stage in stages:
        engine = _engine(stage, resumed=start, **sections)
        again = _snapshot(engine)
        result[stage] = (again, _steps(engine, 2))
        engine.close()
    return result


def train_and_snapshot(stage: int, sections: dict[str, Any]) -> Any:
    """Two steps, a snapshot, two more steps: the snapshot and the loss lines of the last two."""
    engine = _engine(stage, **sections)
    _steps(engine, 2)
    snapshot = _snapshot(engine)
    after = _steps(engine, 2)
    engine.close()
    return snapshot, after


def nan_on_one_rank(stage: int) -> Any:
    """One rank's picture is NaN in the second step: who moved?"""
    engine = _engine(stage)
    _steps(engine, 1)
    before = engine.weights()
    batches = tiny_batches(engine.plan, rank=ranks.rank(), world=ranks.world_size(), start_step=1)

    def poisoned() -> Any:
        batch = next(batches)
        if ranks.rank() == 1:
            batch.gt.fill_(torch.nan)
        yield batch

    engine.step(poisoned(), tiny_priors(engine.run))
    after = engine.weights()
    lines = _steps(engine, 1)
    engine.close()
    return before, after, lines

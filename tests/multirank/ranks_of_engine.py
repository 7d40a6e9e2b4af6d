"""What each rank does in tests/multirank/test_engine.py; module-level, so that processes can import it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dist_train import checkpoint, ranks
from dist_train.config import plan_batch
from dist_train.engine import Engine, learning_rate
from dist_train.ranks import start_ranks
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run, tiny_task

STEPS = 4
STAGES = [0, 1, 2, 3]


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


def losses_of_stages(stages: list[int], sections: dict[str, Any], steps: int = STEPS) -> dict[int, Any]:
    """Loss lines and final weights of each stage."""
    result = {}
    for stage in stages:
        engine = _engine(stage, **sections)
        lines = _steps(engine, steps)
        result[stage] = SimpleNamespace(
            lines=lines, weights=engine.weights(), ema=engine.ema_weights(), moments=engine.moments()
        )
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


def save_in_every_stage(folder: Path, sections: dict[str, Any]) -> dict[int, list[dict[str, float]]]:
    """Two steps, a checkpoint in FOLDER/stage-S, one more step, in each stage: the loss lines of that one."""
    result = {}
    for stage in STAGES:
        engine = _engine(stage, **sections)
        _steps(engine, 2)
        checkpoint.save(
            folder / f"stage-{stage}",
            state={"step": engine.step_count},
            model=engine.weights(),
            ema=engine.ema_weights(),
            moments=engine.moments(),
            keep=2,
        )
        result[stage] = _steps(engine, 1)
        engine.close()
    return result


def resume_from_files(folders: list[Path], sections: dict[str, Any]) -> dict[tuple[Path, int], list[dict[str, float]]]:
    """From each folder's newest checkpoint, in each stage: the loss lines of one more step."""
    result = {}
    for folder in folders:
        found = checkpoint.find_agreed(folder)
        assert found is not None
        saved = checkpoint.load(found)
        for stage in STAGES:
            engine = _engine(stage, resumed=saved, **sections)
            result[folder, stage] = _steps(engine, 1)
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


def nan_on_one_rank(stages: list[int], sections: dict[str, Any]) -> dict[int, Any]:
    """The first micro-batch of the second step is NaN on rank 1: snapshots around it, and a third step's losses."""
    result = {}
    for stage in stages:
        engine = _engine(stage, **sections)
        _steps(engine, 1)
        before = _snapshot(engine)
        batches = tiny_batches(engine.plan, rank=ranks.rank(), world=ranks.world_size(), start_step=1)
        engine.step(_poisoned(batches, only=0), tiny_priors(engine.run))
        nothing = engine.drain()
        result[stage] = (before, _snapshot(engine), nothing, _steps(engine, 1))
        engine.close()
    return result


def nan_for_ever(out: Path) -> str:
    """All further samples of rank 1 are NaN: what does every rank say in the end?"""
    engine = _engine(2, out=str(out))
    batches = _poisoned(tiny_batches(engine.plan, rank=ranks.rank(), world=ranks.world_size()))
    try:
        for _ in range(10):
            engine.step(batches, tiny_priors(engine.run))
    except RuntimeError as error:
        return f"{engine.step_count} {error}"
    return "went on"


def nan_gradient_for_ever(stages: list[int], out: Path) -> dict[int, str]:
    """One gradient of rank 1 is NaN in every step, no loss is: what does every rank say in the end?"""
    said = {}
    for stage in stages:
        engine = _engine(stage, engine={"max_bad_steps": 2}, out=str(out / str(stage)))
        if ranks.rank() == 1:
            engine.task.get_parameter("student.intro.weight").register_hook(lambda gradient: gradient * torch.nan)
        try:
            _steps(engine, 10)
        except RuntimeError as error:
            said[stage] = f"{engine.step_count} {error}"
        engine.close()
    return said


def _poisoned(batches: Any, *, only: int | None = None) -> Any:
    for number, batch in enumerate(batches):
        if ranks.rank() == 1 and only in (None, number):
            batch.gt.fill_(torch.nan)
        yield batch


def fp16_overflow(stages: list[int]) -> dict[int, Any]:
    """fp16 on the CPU, which only tests may do: a scale that overflows, until it has fallen far enough."""
    result = {}
    for stage in stages:
        run = tiny_run(engine={"zero_stage": stage})
        device = start_ranks(run)
        half = tiny_run(engine={"zero_stage": stage, "precision": "fp16"}, optim={"clip_norm": 0.01})
        engine = Engine(half, tiny_task(half), plan_batch(half.optim, ranks.world_size()), device)
        before = engine.moments()  # of an optimizer that has not stepped
        engine._scaler._init_scale = 2.0**40
        scales, moved = [], []
        weights = engine.weights()
        batches = tiny_batches(engine.plan, rank=ranks.rank(), world=ranks.world_size())
        for _ in range(40):
            engine.step(batches, tiny_priors(half))
            scales.append(engine._scaler.get_scale())
            now = engine.weights()
            moved.append(any(not torch.equal(weights[name], now[name]) for name in now))
            weights = now
        result[stage] = (before["step"], scales, moved, engine.moments())
        engine.close()
    return result


def patience(stages: list[int]) -> dict[int, set[float]]:
    """How long the groups wait, in seconds, that DeepSpeed has made for its collectives."""
    found: dict[int, set[float]] = {}
    calls = {name: getattr(torch.distributed, name) for name in ("all_reduce", "reduce", "all_gather_into_tensor")}

    def note(call: Any, waits: set[float], *args: Any, group: Any = None, **options: Any) -> Any:
        if group not in (None, torch.distributed.group.WORLD):
            waits.add(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        return call(*args, group=group, **options)

    for stage in stages:
        engine = _engine(stage, engine={"slow_timeout_s": 77.0})
        found[stage] = set()
        for name, call in calls.items():
            setattr(torch.distributed, name, partial(note, call, found[stage]))
        _steps(engine, 1)
        engine.close()
    return found


def plain_loop(steps: int = STEPS) -> Any:
    """The same run without DeepSpeed: torch's Adam on whole batches, its learning rate from the schedule."""
    run = tiny_run()
    task = tiny_task(run)
    optimizer = torch.optim.Adam(task.parameters(), betas=run.optim.betas)
    batches, priors = tiny_batches(plan_batch(run.optim, 1), rank=0, world=1), tiny_priors(run)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.optim, step)
        terms = task(next(batches), priors)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append({name: float(value) for name, value in terms.items()})
    moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in task.named_parameters()}
    return SimpleNamespace(lines=losses, weights=task.state_dict(), moments={"exp_avg": moments})

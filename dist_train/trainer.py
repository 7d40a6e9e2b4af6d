"""The loop."""

import faulthandler
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_train import checkpoint, ranks
from dist_train.config import RunConfig, plan_batch
from dist_train.data.batch import Batch
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader
from dist_train.engine import Engine
from dist_train.evaluate import draw_panels, evaluate, means
from dist_train.export import start_from
from dist_train.meters import Stopwatch, named_losses
from dist_train.priors import build_priors
from dist_train.ranks import TrainingError
from dist_train.record import environment, write_record
from dist_train.tasks import build_task, count_parameters
from dist_train.track import Tracker

log = logging.getLogger(__name__)


def train(run: RunConfig) -> Path:
    """Train a run to its end, going on from its newest checkpoint if there is one.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: something the user wrote does not fit; the message says what, where and how to mend it.
        TrainingError: gradients or weights are no longer finite.
        OSError: a checkpoint could not be written.
    """
    device = ranks.start_ranks(run)
    try:
        return _train(run, device)
    finally:
        faulthandler.cancel_dump_traceback_later()
        ranks.stop_ranks()


def _train(run: RunConfig, device: torch.device) -> Path:
    plan = plan_batch(run.optim, ranks.world_size())
    reader = ShardReader(run.data.train)
    val = ShardReader(run.data.val) if run.data.val else None
    saved = checkpoint.find_agreed(run.dir)
    resumed = None if saved is None else checkpoint.load(saved)
    if resumed:
        checkpoint.check_same_run(resumed, run, fingerprint=reader.fingerprint)
    start = resumed.state["step"] if resumed else 0
    if saved is not None and start >= run.optim.steps:
        log.info("%s is finished: %s has all its %d steps", run.name, saved, start)
        return saved

    torch.manual_seed(run.seed)  # the same new weights on every rank
    task = build_task(run)
    parameters = count_parameters(task)
    if resumed:
        checkpoint.load_model(task, resumed)
    else:
        start_from(task, run.init)
    on_disk = partial(checkpoint.steps_on_disk, run.dir)
    priors = build_priors(run, device, train=reader, val=val, checkpoints=on_disk)
    if resumed:
        checkpoint.check_same_priors(resumed, priors.describe())
    engine = Engine(run, task, plan, device, resumed=resumed)
    batches = training_batches(
        reader,
        run.data,
        seed=run.seed,
        plan=plan,
        rank=ranks.rank(),
        world=ranks.world_size(),
        start_step=start,
        masks=run.reads_masks,
    )
    env = environment(
        device,
        start_step=start,
        data={"train": reader.fingerprint, "val": val.fingerprint if val else None},
        batch=plan._asdict(),
        parameters=parameters,
        priors=priors.describe(),
    )
    ranks.on_main(lambda: write_record(run, env))
    _say_what_runs(run, env, resumed)

    bad_samples: set[str] = set()
    with Tracker(run, resume_step=start, extra=env) as tracker:
        watch = Stopwatch(run.optim.global_batch, device)
        timed = priors._replace(timing=watch.making_masks)
        while engine.step_count < run.optim.steps:
            faulthandler.dump_traceback_later(run.engine.hang_timeout_s, exit=True)
            step = engine.step_count + 1
            last = step == run.optim.steps
            measure = _due(step, run.track.gradients_every)
            engine.step(_watched(batches, watch, bad_samples), timed, measure=measure)
            _stop_if_too_many(bad_samples, run)
            watch.step()
            if last or _due(step, run.track.every):
                losses = engine.drain()  # all ranks; what follows is written by the main one
                seen = step * plan.global_batch
                progress = {"lr": engine.rate, "samples_seen": seen, "epoch": seen / len(reader)}
                tracker.log(step, named_losses(losses, run.loss) | watch.lap() | progress)
                tracker.progress(step, {name: losses[name] for name in losses if name in ("student_rec", "total")})
            faulthandler.cancel_dump_traceback_later()  # what follows may take its time
            if val and (last or _due(step, run.eval.every)):
                restore = partial(engine.whole_task().restore, priors=priors, teacher=run.eval.teacher)
                tracker.log(step, means(evaluate(restore, val, protocols=[run.eval.protocol], device=device)))
            if val and run.track.pictures_every and (last or _due(step, run.track.pictures_every)):
                restore, some = partial(engine.whole_task().restore, priors=priors), range(run.track.num_pictures)
                tracker.pictures(step, partial(draw_panels, restore, val, indices=some, device=device))
            if last or _due(step, run.checkpoint.every):
                saved = _save(run, engine, reader, env)
            watch.leave_out_since_step()
    batches.close()
    engine.close()
    assert saved is not None  # there was a last step
    return saved


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: RunConfig, engine: Engine, reader: ShardReader, env: dict[str, Any]) -> Path:
    weights = engine.weights()
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise TrainingError(
            f"{broken[0]} is not finite at step {engine.step_count}, which is not saved; lower optim.lr"
        )
    state = {
        "step": engine.step_count,
        "samples_seen": engine.step_count * run.optim.global_batch,
        "data": reader.fingerprint,
        "config": run.model_dump(mode="json"),
        "env": env,
    }
    path = checkpoint.save(
        run.dir / "checkpoints",
        state=state,
        model=weights,
        ema=engine.ema_weights(),
        moments=engine.moments(),
        keep=run.checkpoint.keep,
    )
    log.info("saved %s", path)
    return path


def _watched(batches: Iterator[Batch], watch: Stopwatch, bad: set[str]) -> Iterator[Batch]:
    """Pass batches on, timing the wait for them and noting samples that had to be replaced."""
    while True:
        with watch.waiting_for_data():
            batch = next(batches)
        for message in set(batch.bad) - bad:
            log.warning("replaced a bad sample: %s", message)
        bad.update(batch.bad)
        yield batch


def _stop_if_too_many(bad: set[str], run: RunConfig) -> None:
    """All ranks stop together when together they have met more bad samples than the run allows."""
    if not ranks.any_rank(bool(bad)):
        return
    everyone = sorted(set().union(*ranks.gather_objects(bad)))
    if len(everyone) > run.data.max_bad_samples:
        raise ValueError(
            f"{len(everyone)} samples could not be read and data.max_bad_samples is {run.data.max_bad_samples}:\n  "
            + "\n  ".join(everyone[:10])
            + f"\nRun `python -m shards check {run.data.train}`, or raise data.max_bad_samples to go on without them"
        )


def _say_what_runs(run: RunConfig, env: dict[str, Any], resumed: checkpoint.Checkpoint | None) -> None:
    if resumed:
        log.info("resuming %s from %s, %d samples seen", run.name, resumed.path, resumed.state["samples_seen"])
    log.info("%s (%s): to step %d, batch %s", run.name, run.task, run.optim.steps, env["batch"])
    for part, count in env["parameters"].items():
        log.info("%s: %s parameters", part, f"{count:,}")
    for part, what in env["priors"].items():
        log.info("%s: %s", part, what)

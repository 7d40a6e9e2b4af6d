"""The loop."""

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_train import checkpoint, ranks, resume
from dist_train.config import RunConfig, plan_batch
from dist_train.data.batch import Batch
from dist_train.data.ledger import Ledger
from dist_train.data.loader import training_batches
from dist_train.data.mixture import open_training, order_of
from dist_train.data.reader import ShardReader
from dist_train.engine import Engine
from dist_train.evaluate import draw_panels, evaluate, means
from dist_train.load import start_from
from dist_train.lock import RunLock
from dist_train.meters import named_losses
from dist_train.priors import build_priors
from dist_train.ranks import TrainingError
from dist_train.record import environment, write_record
from dist_train.spans import Spans
from dist_train.stop import Ended, StopRequests
from dist_train.tasks import build_task, count_parameters, sample_flops
from dist_train.track import Tracker
from dist_train.watch import Watch
from dist_train.watchdog import Watchdog
from shards.cache import ShardCache

log = logging.getLogger(__name__)


def train(run: RunConfig) -> tuple[Path, Ended]:
    """Train a run to its end, or until it is asked to stop, going on from its newest checkpoint if there is one.

    Returns:
        The last checkpoint, and whether all steps are done; see `StopRequests.ended`.

    Raises:
        ValueError: something the user wrote does not fit; the message says what, where and how to mend it.
        TrainingError: gradients or weights are no longer finite.
        OSError: a checkpoint could not be written.
    """
    device = ranks.start_ranks(run)
    spans = Spans(device)
    try:
        with Watchdog(run, spans) as watchdog, RunLock(run.dir) as lock:
            return _train(run, device, spans, watchdog, lock)
    finally:
        ranks.stop_ranks()


def _train(run: RunConfig, device: torch.device, spans: Spans, watchdog: Watchdog, lock: RunLock) -> tuple[Path, Ended]:
    plan = plan_batch(run.optim, ranks.world_size())
    cache = ShardCache(run.data.cache_dir, limit_gib=run.data.cache_gib)
    reader = open_training(run.data, cache)
    val = ShardReader(run.data.val, cache) if run.data.val else None
    saved = checkpoint.find_agreed(run.dir)
    resumed = None if saved is None else checkpoint.load(saved)
    stream_start = resume.check_same_run(resumed, run, fingerprint=reader.fingerprint) if resumed else 0
    stream = {"data": reader.fingerprint, "stream_start": stream_start}
    order = order_of(reader, run.data, seed=run.seed, global_batch=plan.global_batch, start=stream_start)
    start = resumed.state["step"] if resumed else 0
    if saved is not None and start >= run.optim.steps:
        log.info("%s is finished: %s has all its %d steps", run.name, saved, start)
        return saved, "finished"

    torch.manual_seed(run.seed)  # the same new weights on every rank
    task = build_task(run)
    parameters = count_parameters(task)
    if resumed:
        resume.load_model(task, resumed)
    else:
        start_from(task, run.init)
    on_disk = partial(checkpoint.steps_on_disk, run.dir)
    priors = build_priors(run, device, train=reader, val=val, checkpoints=on_disk, epoch_at=order.epoch_at)
    if resumed:
        resume.check_same_priors(resumed, priors.describe(), new_data=run.data.accept_new_data)
    flops = sample_flops(task, run, device)
    engine = Engine(run, task, plan, device, resumed=resumed, span=spans)
    batches = training_batches(
        reader,
        run.data,
        seed=run.seed,
        plan=plan,
        order=order,
        rank=ranks.rank(),
        world=ranks.world_size(),
        start_step=start,
        masks=run.reads_masks,
        device=device,
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

    ledger = Ledger(run, num_samples=len(reader), start_step=start)
    tracking, listening = Tracker(run, resume_step=start, extra=env), StopRequests(run.dir)
    with tracking as tracker, ledger, listening as stop, closing(batches):
        stopping = False
        watch = Watch(run, device, spans, sample_flops=flops)
        timed = priors._replace(span=spans)
        while engine.step_count < run.optim.steps and not stopping:
            step, scores = engine.step_count + 1, {}
            watchdog.expect(f"step {step}", slow=step == start + 1)  # kernels are compiled and tuned
            last = step == run.optim.steps
            with watch.step(step):
                engine.step(_timed(batches, spans, ledger), timed, measure=_due(step, run.track.gradients_every))
                with spans("communication"):
                    ledger.settle()
                    stopping = stop.agreed()
            if last or _due(step, run.track.every):
                lock.check()
                losses = engine.drain()  # all ranks; what follows is written by the main one
                seen = step * plan.global_batch
                progress = {"lr": engine.rate, "samples_seen": seen, "epoch": seen / len(reader)}
                progress |= {"bad_samples": ledger.num_bad, "skipped_steps": engine.num_skipped}
                tracker.log(step, named_losses(losses, run.loss) | watch.lap(losses) | progress)
                tracker.progress(step, {name: losses[name] for name in losses if name in ("student_rec", "total")})
            watchdog.expect(f"after step {step}", slow=True)
            if val and (last or _due(step, run.eval.every)):
                with spans("validation"):
                    restore = partial(engine.whole_task().restore, priors=priors, teacher=run.eval.teacher)
                    scores = means(evaluate(restore, val, protocols=[run.eval.protocol], device=device))
                    tracker.log(step, scores)
            if val and run.track.pictures_every and (last or _due(step, run.track.pictures_every)):
                with spans("pictures"):
                    restore, some = partial(engine.whole_task().restore, priors=priors), range(run.track.num_pictures)
                    tracker.pictures(step, partial(draw_panels, restore, val, indices=some, device=device))
            if last or stopping or _due(step, run.checkpoint.every):
                with spans("checkpoint"):
                    lock.check()
                    saved = _save(run, engine, stream | {"scores": scores, "env": env})
            if aside := watch.aside():
                tracker.log(step, aside)
    engine.close()
    ranks.agree(True)  # a launcher ends all ranks soon after the first, and the main one had files to close
    assert saved is not None  # there was a step
    return saved, "finished" if engine.step_count == run.optim.steps else stop.ended


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: RunConfig, engine: Engine, about: dict[str, Any]) -> Path:
    weights = engine.weights()
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise TrainingError(
            f"{broken[0]} is not finite at step {engine.step_count}, which is not saved; lower optim.lr"
        )
    state = {
        "step": engine.step_count,
        "samples_seen": engine.step_count * run.optim.global_batch,
        "skipped_steps": engine.num_skipped,
        "unlogged": engine.unlogged(),
        **about,
        "config": run.model_dump(mode="json"),
    }
    return checkpoint.save(
        run.dir / "checkpoints",
        state=state,
        model=weights,
        ema=engine.ema_weights(),
        moments=engine.moments(),
        keep=run.checkpoint.keep,
        best_by=f"val/{run.eval.protocol}/psnr/student" if run.checkpoint.keep_best else None,
    )


def _timed(batches: Iterator[Batch], spans: Spans, ledger: Ledger) -> Iterator[Batch]:
    """Pass batches on, timing the wait for them and writing down what they hold."""
    while True:
        with spans("data"):
            batch = next(batches)
        ledger.note(batch)
        yield batch


def _say_what_runs(run: RunConfig, env: dict[str, Any], resumed: checkpoint.Checkpoint | None) -> None:
    if resumed:
        log.info("resuming %s from %s, %d samples seen", run.name, resumed.path, resumed.state["samples_seen"])
    log.info("%s (%s): to step %d, batch %s", run.name, run.task, run.optim.steps, env["batch"])
    for part, count in env["parameters"].items():
        log.info("%s: %s parameters", part, f"{count:,}")
    for part, what in env["priors"].items():
        log.info("%s: %s", part, what)

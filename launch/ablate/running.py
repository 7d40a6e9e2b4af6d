"""Train the runs, some at a time, each as a process of its own; what is done is not done again."""

import logging
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from dist_train.config import RunConfig, changed_method, load_run
from launch.ablate.plan import Trial

log = logging.getLogger(__name__)

POLL_S = 0.5
SAY_EVERY_S = 60.0


def check_same(trials: Sequence[Trial]) -> None:
    """Refuse folders that were trained with other settings.

    Raises:
        ValueError: names the run and what differs.
    """
    for trial in trials:
        path = trial.run.dir / "config.yaml"
        if path.exists() and (changes := _changes(load_run(path), trial.run)):
            raise ValueError(
                f"{trial.run.dir} was trained with other settings: {'; '.join(changes)}. Move it away, or give "
                "another --out"
            )


def _changes(before: RunConfig, now: RunConfig) -> list[str]:
    changes = changed_method(before, now)
    for section in ("optim", "init"):
        old, new = (getattr(run, section).model_dump() for run in (before, now))
        told = ("global_batch", "name", "batch_per_rank")  # by the above; or it does not matter
        changes += [
            f"{section}.{key}={old[key]} is now {new[key]}" for key in old if old[key] != new[key] and key not in told
        ]
    return changes


def is_finished(trial: Trial) -> bool:
    """Whether the run has saved its last step."""
    from dist_train.checkpoint import steps_on_disk

    return trial.run.optim.steps in steps_on_disk(trial.run.dir)


def train_all(trials: Sequence[Trial], *, launcher: Sequence[str], jobs: int, logs: Path) -> dict[str, str]:
    """Train what is not finished yet, `jobs` at a time, and tell on the way how far it is.

    A run that fails is told of, and the others go on. Ctrl-C and SIGTERM ask the runs to save, and wait for that.

    Args:
        trials: of different runs; see `plan.unique`.
        launcher: what stands before `-m launch.train`.
        jobs: runs at a time.
        logs: folder for what the runs print, NAME.log each.

    Returns:
        Names of the runs that failed -> why.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [trial for trial in trials if not is_finished(trial)]
    running: list[tuple[Trial, subprocess.Popen[bytes]]] = []
    failed: dict[str, str] = {}
    log.info("%d runs, %d of them to be trained; what they print is in %s", len(trials), len(waiting), logs)
    said = time.monotonic()
    with _ending(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), launcher, logs))
                log.info("%s: started", running[-1][0].run.name)
            time.sleep(POLL_S)
            ended = [(trial, process) for trial, process in running if process.poll() is not None]
            for trial, process in ended:
                running.remove((trial, process))
                if is_finished(trial):
                    log.info("%s: finished", trial.run.name)
                else:
                    failed[trial.run.name] = _reason(process.returncode, logs / f"{trial.run.name}.log")
                    log.error("%s: %s", trial.run.name, failed[trial.run.name])
            if ended or time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                log.info("%s", progress(trials, failed=failed, jobs=jobs))
    return failed


def progress(trials: Sequence[Trial], *, failed: dict[str, str], jobs: int) -> str:
    """How far all runs are together, in words, and how long it will take by what their variants' steps took so far."""
    done, costs = {}, {}
    for trial in trials:
        done[trial.run.name], seconds = _so_far(trial.run)
        if seconds is not None:
            costs[trial.variant.name] = seconds
    going_on = [trial for trial in trials if trial.run.name not in failed]
    left = [(trial, trial.run.optim.steps - done[trial.run.name]) for trial in going_on]
    total = sum(trial.run.optim.steps for trial in going_on)
    text = f"{sum(not steps for _, steps in left)} of {len(trials)} runs done"
    text += f", {total - sum(steps for _, steps in left)} of {total} steps"
    if costs:
        mean = statistics.fmean(costs.values())
        seconds = sum(steps * costs.get(trial.variant.name, mean) for trial, steps in left)
        text += f", {timedelta(seconds=round(seconds / max(min(jobs, len(left)), 1)))} left"
    return text + (f", {len(failed)} failed" if failed else "")


def _so_far(run: RunConfig) -> tuple[int, float | None]:
    """Steps done, and what one takes in seconds."""
    from dist_train.track import read_metrics

    record = read_metrics(run.dir)
    times = [line["time/step_s"] for line in record if "time/step_s" in line]
    return int(record[-1]["step"]) if record else 0, statistics.median(times) if times else None


def _start(trial: Trial, launcher: Sequence[str], logs: Path) -> tuple[Trial, subprocess.Popen[bytes]]:
    with (logs / f"{trial.run.name}.log").open("ab") as file:
        # A session of its own: Ctrl-C in the terminal would kill it before it has saved.
        command = [*launcher, "-m", "launch.train", *trial.arguments]
        return trial, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


@contextmanager
def _ending(running: list[tuple[Trial, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """If the block is left early, ask all runs to save and stop, and wait until they have."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BaseException:
        log.info("stopping %d runs; they save first", len(running))
        for _, process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for _, process in running:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(code: int, path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error")] or [line for line in lines if line.strip()]
    return f"exit code {code}, see {path}: {errors[-1] if errors else 'it printed nothing'}"

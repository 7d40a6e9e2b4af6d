"""What a run leaves to read: metrics.jsonl, pictures, a progress bar, wandb, TensorBoard.

metrics.jsonl is the record: one JSON object per line, flushed at once, keyed by step. wandb and TensorBoard are views
of it, which may fail without stopping the run. Only the main rank writes; what fails there fails on every rank.
"""

import json
import logging
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dist_train import ranks
from dist_train.config import RunConfig
from dist_train.pictures import write_png
from shards.files import write_whole

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""
WANDB_WAIT_S = 60.0
"""Longest that wandb may hold up the run while it opens it, and while it uploads the rest at the end."""


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """A run's record, one dict per step in order; of a value written twice the later counts.

    Args:
        run_dir: folder that holds metrics.jsonl; without the file the record is empty.

    Returns:
        Dicts of `step` (int) and what was measured at it, for example `loss/spd`. Not every step has every name.

    Raises:
        ValueError: a line is not JSON. A last line cut short by a crash is left out instead.
    """
    path = run_dir / "metrics.jsonl"
    merged: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}. Delete the line") from None
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


class Tracker:
    """Writes the record of one run while it trains.

    A resumed run goes on in the same record and the same wandb run: lines of steps after the checkpoint are dropped
    (they will be computed again), and wandb, which cannot forget, is not told them twice. A run that starts from step 0
    is a new wandb run. TensorBoard's files are RUN/tensorboard; there it is told from which step on it must forget.

    Args:
        run: the run; its folder is made if need be.
        resume_step: steps done by the checkpoint that this run goes on from; 0: none.
        extra: what wandb shall show beside the configuration (commit, versions, parameter counts).

    Raises:
        ValueError: track.wandb or track.tensorboard is wanted and not installed; on every rank.
    """

    def __init__(self, run: RunConfig, *, resume_step: int = 0, extra: Mapping[str, Any] | None = None) -> None:
        if run.track.wandb != "off":
            _require_wandb(run.track.wandb)  # on every rank, so that none is left waiting for the main one
        if run.track.tensorboard:
            _require_tensorboard()
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._dir = run.dir
        self._writes = ranks.is_main()
        ranks.on_main(lambda: self._start(run, resume_step, extra or {}))

    def _start(self, run: RunConfig, resume_step: int, extra: Mapping[str, Any]) -> None:
        records = read_metrics(run.dir)
        path = run.dir / "metrics.jsonl"
        with _naming(path):
            lines = (json.dumps(record) + "\n" for record in records if record["step"] <= resume_step)
            write_whole(path, "".join(lines))
            self._file = path.open("a")
        self._told_wandb = -math.inf
        if run.track.wandb != "off":
            if resume_step and (run.dir / "wandb_id").exists():
                self._told_wandb = max((record["step"] for record in records), default=-math.inf)
            else:
                (run.dir / "wandb_id").write_text(uuid.uuid4().hex[:8])
            self._start_wandb(run, extra)
        if run.track.tensorboard:
            self._start_tensorboard(run, resume_step, extra)
        self._bar = _Bar(run, resume_step)
        self._open = ExitStack()
        if sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())  # log lines above the bar, not through it

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        self._bar.close()
        self._open.close()
        self._file.close()
        if self._wandb is not None:
            with self._wandb_may_fail():
                self._wandb.finish(exit_code=int(kind is not None))
        if self._tensorboard is not None:
            with self._tensorboard_may_fail():
                self._tensorboard.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to the record, for example `{"loss/spd": 0.1, "val/psnr": 31.2}`. All ranks call.

        Several calls may tell of one step. NaN and infinity are written as Python's json spells them.

        Raises:
            OSError: it cannot be written; on every rank.
        """
        ranks.on_main(lambda: self._write(step, values))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        plain = {name: float(value) for name, value in values.items()}
        with _naming(self._dir / "metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        self._tell_wandb(step, plain)
        if self._tensorboard is not None:
            with self._tensorboard_may_fail():
                for name, value in plain.items():
                    self._tensorboard.add_scalar(name, value, step)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, NDArray[np.uint8]]]) -> None:
        """Write pictures to RUN/pictures/NAME-STEP.png, and show them in wandb and TensorBoard. All ranks call.

        Args:
            step: optimizer steps done.
            draw: gives (H,W,3) uint8 RGB pictures by name; called on the main rank alone.

        Raises:
            OSError: one cannot be written; on every rank.
        """
        ranks.on_main(lambda: self._write_pictures(step, draw()))

    def _write_pictures(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        paths = {name: self._dir / "pictures" / f"{name}-{step:08d}.png" for name in pictures}
        for name, path in paths.items():
            with _naming(path):
                write_png(path, pictures[name])
        if self._wandb is not None:
            import wandb

            self._tell_wandb(step, {f"pictures/{name}": wandb.Image(str(path)) for name, path in paths.items()})
        if self._tensorboard is not None:
            with self._tensorboard_may_fail():
                for name, picture in pictures.items():
                    self._tensorboard.add_image(f"pictures/{name}", picture, step, dataformats="HWC")

    def progress(self, step: int, losses: Mapping[str, float] | None = None) -> None:
        """Move the bar to `step`; it shows the losses (the last ones given), samples/s and the time left."""
        if not self._writes:
            return
        if losses is not None:
            self._bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in losses.items()), refresh=False)
        self._bar.update(step - self._bar.n)

    def _start_wandb(self, run: RunConfig, extra: Mapping[str, Any]) -> None:
        import wandb

        with self._wandb_may_fail():
            self._wandb = wandb.init(
                project=run.track.project,
                name=run.name,
                id=(run.dir / "wandb_id").read_text().strip(),
                resume="allow",
                mode=run.track.wandb,
                dir=run.dir,
                config={**run.model_dump(mode="json"), "env": dict(extra)},
                # Without an end it would retry a server that is down for hours, on every GPU of the job.
                settings=wandb.Settings(
                    init_timeout=WANDB_WAIT_S, finish_timeout=WANDB_WAIT_S, finish_timeout_raises=True
                ),
            )
            if run.track.wandb == "online":  # of what it has, the server knows better: a killed run had not sent all
                self._told_wandb = self._wandb.starting_step - 1
            self._wandb.define_metric("*", step_metric="train/step")

    def _tell_wandb(self, step: int, values: Mapping[str, Any]) -> None:
        # Syncing two offline parts of a run that overlap would renumber every later step.
        if self._wandb is not None and step > self._told_wandb:
            with self._wandb_may_fail():
                self._wandb.log({**values, "train/step": step}, step=step)

    @contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no network, no login, a killed service: nothing in a view may stop the run
            self._wandb = None
            log.warning("wandb stopped: %s. The run goes on, and metrics.jsonl with it", error)

    def _start_tensorboard(self, run: RunConfig, resume_step: int, extra: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._tensorboard_may_fail():
            # purge_step: its readers forget what an earlier start told of these steps.
            self._tensorboard = SummaryWriter(str(run.dir / "tensorboard"), purge_step=resume_step + 1, flush_secs=10)
            about = json.dumps({**run.model_dump(mode="json"), "env": dict(extra)}, indent=1, default=str)
            self._tensorboard.add_text("run", f"```json\n{about}\n```", resume_step + 1)

    @contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its thread gives back whatever it met: a full disk, a folder that has gone
            self._tensorboard = None
            log.warning("TensorBoard stopped: %s. The run goes on, and metrics.jsonl with it", error)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk says "no space left", and not where."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}; mend it, then start again") from error


class _Bar(tqdm):
    """Steps done, losses, samples/s and time left: a bar on a terminal, now and then a line in a log file."""

    def __init__(self, run: RunConfig, resume_step: int) -> None:
        self.global_batch = run.optim.global_batch  # before super(), which draws the bar
        terminal = sys.stderr.isatty()
        super().__init__(
            total=run.optim.steps,
            initial=resume_step,
            disable=not run.track.progress,
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.2 if terminal else LINE_EVERY_S,
            miniters=1,
            dynamic_ncols=terminal,
            bar_format=("{bar:20} " if terminal else "")
            + "step {n}/{total}{postfix}, {samples_per_s}, {remaining} left",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = super().format_dict
        elapsed = shown["elapsed"]
        rate = shown["rate"] or ((shown["n"] - shown["initial"]) / elapsed if elapsed else 0.0)
        return {**shown, "samples_per_s": f"{rate * self.global_batch:.1f} samples/s"}


class _Lines:
    """Gives each redrawing of a bar a line of its own on stderr."""

    encoding = "ascii"

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _require_wandb(mode: str) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"track.wandb={mode}, but wandb cannot be imported ({error}): pip install wandb, or set track.wandb=off"
        ) from None


def _require_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"track.tensorboard=true, but TensorBoard cannot be imported ({error}): "
            "pip install 'restill[tensorboard]', or set track.tensorboard=false"
        ) from None

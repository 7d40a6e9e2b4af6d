"""Look at a run in a terminal, while it goes on or afterwards: `python -m launch.watch RUN`."""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from launch.command import program
from launch.console import run_main

SILENT_S, SILENT_STEPS = 60.0, 10
"""A run that gives no sign of life for so long, and for so many of its steps, may hang."""
ASIDE = ("time/validation_s", "time/pictures_s", "time/checkpoint_s", "time/trace_s")
"""What is measured once when it happens, and is no part of a step."""


def main(argv: list[str] | None = None) -> int:
    """Parse and show until the runs have ended, or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.watch"),
        description="Step, loss terms, samples/s, the prior's share of a step, time left and the last validation, from "
        "what a run writes into its folder: nothing is asked of the run itself. Ends when the runs have ended.",
        epilog=f"example: {program('launch.watch')} runs/derain runs/plain",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--once", action="store_true", help="show how things stand, and end")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="default: 2 on a terminal, 60 elsewhere")
    args = parser.parse_args(argv)
    return run_main(lambda: watch(args.runs, once=args.once, every_s=args.every), stopped="")


def watch(folders: list[Path], *, once: bool, every_s: float | None) -> int:
    """Show the runs again and again, on a terminal in place; returns 0 when none is going on."""
    if every_s is not None and every_s <= 0:
        raise ValueError(f"--every {every_s:g}: give seconds above 0")
    runs = [Run(folder) for folder in folders]
    terminal, num_lines = sys.stdout.isatty(), 0
    while True:
        goes_on, lines = False, []
        for run in runs:
            run.read()
            state, ended = run.state(time.time())
            goes_on |= not ended
            lines += [*run.lines(state), ""]
        if terminal:
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in lines[: height - 1]]
            print(f"\033[{num_lines}F\033[J" if num_lines else "", end="")
            num_lines = len(lines)
        print("\n".join(lines), flush=True)
        if once or not goes_on:
            return 0
        time.sleep(every_s or (2.0 if terminal else 60.0))


class Run:
    """What a run's folder tells, read on from where the last reading ended.

    Args:
        folder: of the run.

    Raises:
        ValueError: it is no run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config = yaml.safe_load((folder / "config.yaml").read_text())
            self.num_steps = int(self.config["optim"]["steps"])
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{folder} holds no config.yaml, so it is no run's; give the folder of one, runs/NAME"
            ) from None
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise ValueError(
                f"{folder / 'config.yaml'} is not what a run writes ({error!r}); name another run"
            ) from None
        self._beat: dict[str, Any] = {}
        self._file, self._offset = -1, 0
        self._forget()

    def _forget(self) -> None:
        self.now: dict[str, tuple[int, float]] = {}
        """Of every name its newest step and value."""
        self._losses: list[dict[str, float]] = []
        self._aside_s = 0.0

    def read(self) -> None:
        """Take in what was written since; from the start if the record was begun anew."""
        try:
            self._beat = json.loads((self.folder / "heartbeat.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._beat = {}
        try:
            file = (self.folder / "metrics.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._offset:  # a start cuts the record, in a new file
                self._file, self._offset = found.st_ino, 0
                self._forget()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            values: dict[str, float] = json.loads(line)
        except json.JSONDecodeError:  # whoever trains or exports is told of it
            return
        step = int(values["step"])
        self.now |= {name: (step, value) for name, value in values.items()}
        self._aside_s += sum(values.get(name, 0.0) for name in ASIDE)
        if "loss/total" in values:
            self._losses.append({name: v for name, v in values.items() if name == "step" or name.startswith("loss/")})

    def _value(self, name: str) -> float:
        return self.now[name][1] if name in self.now else float("nan")

    @property
    def step(self) -> int:
        """Steps done, as far as the folder tells."""
        return max(int(self._beat.get("step", 0)), self.now.get("step", (0, 0))[0])

    def state(self, now_s: float) -> tuple[str, bool]:
        """How it is, in words, and whether it has ended.

        Args:
            now_s: the time, in seconds since 1970.
        """
        at_last = self.step >= self.num_steps
        # Its last step done, a run still validates, and saves when all else is done.
        if at_last and (not self._beat or (self.folder / "checkpoints" / f"step-{self.num_steps:08d}").is_dir()):
            return "finished", True
        if not self._beat:
            return ("starting", False) if not self.now else ("no sign of life: heartbeat.json is not there", True)
        where = f"on {self._beat['host']}, process {self._beat['pid']}"
        if self._beat.get("job"):
            where += f", job {self._beat['job']}"
        if self._beat["host"] == socket.gethostname() and not Path("/proc", str(self._beat["pid"])).exists():
            before = "before it was saved" if at_last else "before its last"
            return f"ended at step {self.step}, {before}; the command that started it goes on with it", True
        silent_s = now_s - datetime.strptime(self._beat["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        step_s = self._value("time/step_s")
        if silent_s > SILENT_S and not silent_s < SILENT_STEPS * step_s:
            return f"silent for {duration(silent_s)} {where}: it validates, saves, or hangs; its log tells", False
        return f"{'validating and saving' if at_last else 'running'} {where}", False

    def lines(self, state: str) -> list[str]:
        """The screen of this run."""
        config = self.config
        lines = [f"{config.get('name', self.folder.name)} ({config.get('task')}): {state}"]
        step_s, done = self._value("time/step_s"), self.step
        bar = "#" * (20 * done // self.num_steps)
        progress = f"[{bar:-<20}] step {done}/{self.num_steps}"
        if step_s > 0:
            if done < self.num_steps:
                each_s = step_s + self._aside_s / max(self.now["step"][0], 1)
                progress += f", {duration((self.num_steps - done) * each_s)} left"
            progress += f", {self._value('time/samples_per_s'):.4g} samples/s, {step_s:.3g} s a step"
        parts = [self._phases(step_s), *self._terms(), self._progress(), *self._validation()]
        return [*lines, progress, *(f"  {part}".rstrip() for part in parts if part)]

    def _phases(self, step_s: float) -> str:
        """Where the time of a step goes; the prior's share is what SAM costs."""
        no_phases = {"time/step_s", "time/samples_per_s", *ASIDE}
        shares = {
            name.removeprefix("time/").removesuffix("_s"): value / step_s
            for name, (_, value) in self.now.items()
            if name.startswith("time/") and name.endswith("_s") and name not in no_phases
        }
        names = {"prior": f"prior ({(self.config.get('prior') or {}).get('name')})"}
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{names.get(name, name)} {share:.0%}" for name, share in ranked if share >= 0.01)
        return f"time: {told}" if told else ""

    def _terms(self) -> list[str]:
        """The loss terms, now and half way back, and their gradients."""
        if not self._losses:
            return []
        now = self._losses[-1]
        past = min(self._losses, key=lambda line: abs(line["step"] - now["step"] / 2))
        heading = f"at step {past['step']:.0f}"
        lines = [f"{'loss':14}{'now':>12}{heading:>18}{'weight':>10}{'gradient':>11}"]
        for name in now:
            if name != "step":
                term = name.removeprefix("loss/")
                weight, ratio = self._optional(f"weight/{term}"), self._optional(f"gradient_ratio/{term}")
                lines.append(f"{term:14}{now[name]:12.5g}{past.get(name, float('nan')):18.5g}{weight:>10}{ratio:>11}")
        return lines

    def _optional(self, name: str) -> str:
        return f"{self._value(name):.3g}" if name in self.now else ""

    def _progress(self) -> str:
        told = {
            "lr": "lr {:.3g}", "epoch": "epoch {:.2f}", "prior/masks_per_picture": "{:.3g} masks a picture",
            "memory/gpu_peak_gib": "GPU {:.1f} GiB", "memory/host_gib": "host {:.1f} GiB",
            "bad_samples": "{:.0f} bad samples", "skipped_steps": "{:.0f} skipped steps",
        }  # fmt: skip
        return ", ".join(text.format(self._value(name)) for name, text in told.items() if name in self.now)

    def _validation(self) -> list[str]:
        """PSNR and SSIM of the last validation, for each protocol."""
        scores: dict[str, dict[str, str]] = {}
        for name, (step, value) in self.now.items():
            if name.startswith("val/"):
                *protocol, metric, whose = name.removeprefix("val/").split("/")
                row = scores.setdefault(f"validation at step {step}, {' '.join([*protocol, metric.upper()])}", {})
                row[whose] = f"{value:.4f}" if metric == "ssim" else f"{value:.2f}"
        return [
            f"{title}: " + ", ".join(f"{whose} {value}" for whose, value in row.items())
            for title, row in scores.items()
        ]


def duration(seconds: float) -> str:
    """Two units, as people say it: `3 h 12 min`."""
    whole = round(seconds)
    units: Mapping[str, int] = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    parts = []
    for unit, size in units.items():
        count, whole = divmod(whole, size)
        parts.append((count, unit))
    first = next((place for place, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or unit == parts[first][1])


if __name__ == "__main__":
    sys.exit(main())

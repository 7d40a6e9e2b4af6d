"""What `launch.watch` shows of a run, as it begins, goes on, falls silent, is killed, begins anew."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launch.watch import Run, duration, main

pytestmark = pytest.mark.unit

NOW_S = 1.8e9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: mine\ntask: distill\nprior: {name: sam}\noptim: {steps: 100}\n")
    return tmp_path


def log(folder: Path, step: int, **values: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def beat(folder: Path, step: int, *, ago_s: float = 0.0, **more: Any) -> None:
    told = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(NOW_S - ago_s))
    mine = {"step": step, "steps": 100, "time": told, "host": socket.gethostname(), "pid": os.getpid(), **more}
    (folder / "heartbeat.json").write_text(json.dumps(mine))


def shown(run: Run) -> tuple[str, bool]:
    run.read()
    state, ended = run.state(NOW_S)
    return "\n".join(run.lines(state)), ended


def test_the_screen_of_a_run_that_goes_on(folder: Path) -> None:
    run = Run(folder)
    assert "starting" in shown(run)[0]
    timing = {"time/step_s": 2.0, "time/prior_s": 1.5, "time/data_s": 0.5, "time/samples_per_s": 4.0}
    log(folder, 10, **{"loss/total": 8.0, "loss/spd": 0.5, "weight/spd": 0.05, "gradient_ratio/spd": 0.25, **timing})
    log(folder, 10, **{"time/validation_s": 40.0, "val/rgb/psnr/student": 31.234, "val/mcr/student": 0.0})
    log(folder, 20, **{"loss/total": 4.0, "loss/spd": 0.125, "lr": 1e-3, "bad_samples": 2, **timing})
    beat(folder, 25)
    text, ended = shown(run)
    assert not ended and "mine (distill): running on" in text
    # 75 steps of 2 s, and of 40 s of validation in 20 steps.
    assert "[#####---------------] step 25/100, 5 min left, 4 samples/s, 2 s a step" in text
    assert "time: prior (sam) 75%, data 25%" in text
    (total,) = [line.split() for line in text.splitlines() if line.startswith("  total")]
    (spd,) = [line.split() for line in text.splitlines() if line.startswith("  spd")]
    assert total == ["total", "4", "8"] and spd == ["spd", "0.125", "0.5", "0.05", "0.25"]  # now, then
    assert "lr 0.001, 2 bad samples" in text
    assert "validation at step 10, rgb PSNR: student 31.23" in text and "MCR: student 0.00" in text


def test_states(folder: Path) -> None:
    run = Run(folder)
    log(folder, 10, **{"loss/total": 1.0, "time/step_s": 2.0, "time/samples_per_s": 4.0})
    beat(folder, 10, ago_s=50)
    assert "running" in shown(run)[0]
    beat(folder, 10, ago_s=130)
    assert "silent for 2 min 10 s" in shown(run)[0] and not shown(run)[1]
    beat(folder, 10, ago_s=130, host="elsewhere", pid=4_194_305, job="7")  # above every process id
    text, ended = shown(run)
    assert "silent" in text and "on elsewhere, process 4194305, job 7" in text and not ended
    beat(folder, 10, pid=4_194_305)
    text, ended = shown(run)
    assert ended and "ended at step 10, before its last" in text
    beat(folder, 100)
    assert "validating and saving on" in shown(run)[0] and not shown(run)[1]
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    text, ended = shown(run)
    assert ended and "finished" in text and "left" not in text


def test_a_record_that_begins_anew_is_read_anew_and_half_a_line_waits(folder: Path) -> None:
    run = Run(folder)
    log(folder, 10, **{"loss/total": 1.0})
    log(folder, 90, **{"loss/total": 7.0, "skipped_steps": 3})
    assert "step 90/100" in shown(run)[0]
    part = folder / "part"
    longer = '{"step": 10, "loss/total": 1.0, "a/name/that/makes/it/longer/than/what/was/there/before/it": 0}'
    part.write_text(longer + '\n{"step": 20, "loss/to')
    part.replace(folder / "metrics.jsonl")  # as a start cuts the record
    text, _ = shown(run)
    assert "step 10/100" in text and "skipped" not in text
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('tal": 5.0}\n')
    assert "step 20/100" in shown(run)[0]


def test_without_a_terminal_it_is_plain_text_and_ends_with_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(folder, 100)
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    assert main([str(folder)]) == 0
    assert "\033" not in capsys.readouterr().out
    beat(folder, 10)
    assert main([str(folder), str(folder), "--once"]) == 0
    assert capsys.readouterr().out.count("step 10/100") == 2
    assert main([str(folder / "nowhere")]) == 2
    assert "nowhere holds no config.yaml, so it is no run's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.6, "1 min"), (107, "1 min 47 s"), (3600, "1 h"), (11520, "3 h 12 min"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said

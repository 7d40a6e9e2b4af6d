"""The record of a run: metrics.jsonl, pictures, wandb through the real client, the progress line."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dist_train.config import RunConfig
from dist_train.track import Tracker, read_metrics

pytestmark = pytest.mark.unit


def make_run(out: Path, **track) -> RunConfig:
    tree = {"name": "r", "out": str(out), "data": {"train": "shards"}, "optim": {"steps": 6, "global_batch": 8}}
    return RunConfig.model_validate({**tree, "track": {"progress": False, **track}})


def record(run: RunConfig, steps: range, resume_step: int = 0) -> None:
    with Tracker(run, resume_step=resume_step, extra={"commit": "abc"}) as tracker:
        for step in steps:
            tracker.log(step, {"loss/total": 1.0 / step})
            tracker.pictures(step, lambda: {"panel": np.full((12, 12, 3), (255, 0, 0), np.uint8)})


def test_resumed_record_has_each_step_once(tmp_path):
    run = make_run(tmp_path)
    record(run, range(1, 5))
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/to')  # killed while writing
    record(run, range(3, 7), resume_step=2)
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines == read_metrics(run.dir) == [{"step": s, "loss/total": 1.0 / s} for s in range(1, 7)]


def test_values_of_one_step_are_merged_and_the_later_wins(tmp_path):
    run = make_run(tmp_path)
    with Tracker(run) as tracker:
        tracker.log(1, {"loss/total": 2.0, "lr": 0.1})
        tracker.log(1, {"loss/total": 3.0, "val/psnr": float("inf")})
        assert read_metrics(run.dir)  # flushed: a reader sees it while the run goes on
    assert read_metrics(run.dir) == [{"step": 1, "loss/total": 3.0, "lr": 0.1, "val/psnr": float("inf")}]


def test_a_spoilt_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_pictures_keep_their_colours(tmp_path):
    run = make_run(tmp_path)
    record(run, range(1, 2))
    bgr = cv2.imread(str(run.dir / "pictures" / "panel-00000001.png"))
    assert bgr[0, 0].tolist() == [0, 0, 255]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = make_run(tmp_path)
    with Tracker(run) as tracker:
        tracker.log(1, {"loss/total": 1.0})
        tracker.pictures(1, lambda: {"panel": np.zeros((4, 4, 3), np.uint8)})
        tracker.progress(1, {"loss/total": 1.0})
    assert not run.dir.exists()


def wandb_records(run_dir: Path, kind: str) -> list[dict]:
    """Records of one kind in all parts of an offline run, read by wandb's own reader."""
    found = []
    for part in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(part)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found += [item[kind] for item in map(json.loads, lines) if item["type"] == kind]
    return found


def test_resumed_wandb_run_is_the_same_and_repeats_no_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = make_run(tmp_path, wandb="offline")
    record(run, range(1, 5))  # ends at 4, while its last checkpoint is of step 2
    record(run, range(3, 7), resume_step=2)
    history = [item["item"] for item in wandb_records(run.dir, "history")]
    assert [row["train/step"] for row in history] == [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["loss/total"] for row in history] == pytest.approx([1.0 / step for step in range(1, 7)])
    assert all(row["pictures/panel._type"] == "image-file" for row in history)
    assert len({item["run_id"] for item in wandb_records(run.dir, "run")}) == 1
    config = wandb_records(run.dir, "run")[0]["config"]["update"]
    assert config["env"]["commit"] == "abc" and config["optim"]["steps"] == 6


def test_a_run_from_the_start_is_a_new_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = make_run(tmp_path, wandb="offline")
    record(run, range(1, 2))
    record(run, range(1, 2))
    assert len({item["run_id"] for item in wandb_records(run.dir, "run")}) == 2
    assert len(wandb_records(run.dir, "history")) == 2


def test_wandb_without_login_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    for name, value in {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = make_run(tmp_path, wandb="online")
    with caplog.at_level(logging.WARNING):
        record(run, range(1, 3))
    assert "metrics.jsonl" in caplog.text
    assert [line["step"] for line in read_metrics(run.dir)] == [1, 2]


def test_missing_wandb_is_a_clear_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="pip install wandb, or set track.wandb=off"):
        Tracker(make_run(tmp_path, wandb="online"))


def test_progress_in_a_log_file_is_lines(tmp_path, capsys):
    with Tracker(make_run(tmp_path, progress=True), resume_step=2) as tracker:
        for step in range(3, 7):
            tracker.progress(step, {"total": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 2/6") and lines[-1].startswith("step 6/6, total 0.25, ")
    assert "samples/s" in lines[-1] and lines[-1].endswith("left") and "\r" not in "".join(lines)

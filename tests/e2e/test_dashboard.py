"""A run on two ranks that tells all it can, and what is made of it: wandb's panels, TensorBoard, the terminal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.track import read_metrics
from launch.dashboard import DASHBOARD, MEASURED_BY_WANDB, fill, logged_keys, workspace
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.starts import TinyRun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
WANDB = str(Path(sys.executable).with_name("wandb"))
ON_A_GPU_ALONE = {"time/mfu", "memory/gpu_peak_gib"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run with all terms, a cached prior, validation with the teacher, and pictures."""
    work = tmp_path_factory.mktemp("dashboard")
    TinyRun.prepare(work)
    write_pairs(make_pairs(work / "val_pairs", 2, h=40, w=48), work / "val", split="val")
    settings = (
        f"data.val={work}/val", "optim.steps=6", "eval.every=3", "eval.teacher=true",
        "track.pictures_every=3", "track.gradients_every=3", "track.wandb=offline", "track.tensorboard=true",
        "prior={name: cached, num_masks: 4, refresh: 1, of: {name: regions, num_masks: 8, scale: 50, min_area_px: 16}}",
        "loss.sgr={weight: 1.0}", "features={arch: vgg19_16x, weights: random, layer: relu2_2}",
    )  # fmt: skip
    run = TinyRun(work, "told", *settings)
    env = {"HOME": str(work), "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    with run.start(env=env) as start:
        assert start.wait() == [0, 0], start.said
    return run


@pytest.fixture(scope="module")
def told_wandb(run: TinyRun) -> frozenset[str]:
    """Every key of the offline run, as wandb's own reader gives them."""
    (part,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    command = [WANDB, "leet", "inspect", "--json", str(part)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    keys: set[str] = set()
    for record in map(json.loads, lines):
        if record["type"] == "history":
            keys |= {name.removesuffix("._type") for name in record["history"]["item"]}
        if record["type"] == "stats":
            keys |= {MEASURED_BY_WANDB + name for name in record["stats"]["item"]}
    return frozenset(keys)


def keys_of(spec: Any) -> list[str]:
    """The keys that the panels of a workspace point to."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    return [key for config in configs for key in [*config.get("metrics", []), *config.get("mediaKeys", [])]]


def test_every_panel_points_to_a_key_that_is_logged(run: TinyRun, told_wandb: frozenset[str]) -> None:
    sections, left_out = fill(DASHBOARD, told_wandb)
    assert set(left_out) == ON_A_GPU_ALONE  # what one run can log is all there
    assert list(sections) == list(DASHBOARD)
    spec = (
        workspace(sections, entity="e", project="p", name="n")._to_model().spec.model_dump(by_alias=True, mode="json")
    )
    pointed_to = keys_of(spec)
    assert set(pointed_to) <= told_wandb and len(pointed_to) > 50
    assert {"pictures/val/s-1", "pictures/val/s-2", "val/rgb/psnr/lead", "time/prior_share"} <= set(pointed_to)


def test_the_folder_tells_the_same_keys_as_wandb(run: TinyRun, told_wandb: frozenset[str]) -> None:
    mine = {key for key in told_wandb if not key.startswith((MEASURED_BY_WANDB, "_", "train/"))}
    pictures = {key for key in mine if key.startswith("pictures/")}
    parts = ("format", "height", "path", "sha256", "size", "width")
    mine -= {f"{key}.{part}" for key in pictures for part in parts}
    assert logged_keys(run.folder) == mine


def test_the_command_lists_the_panels(run: TinyRun) -> None:
    said = restill("dashboard", str(run.folder), "--list")
    assert "val/rgb/psnr/teacher" in said and "left out: time/mfu, memory/gpu_peak_gib" in said


def test_tensorboard_has_the_whole_record(run: TinyRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) | set(found.Tags()["images"]) == logged_keys(run.folder)
    record = {line["step"]: line["loss/total"] for line in read_metrics(run.folder)}
    assert {event.step: event.value for event in found.Scalars("loss/total")} == pytest.approx(record)


def test_the_terminal_shows_a_finished_run(run: TinyRun) -> None:
    said = restill("watch", str(run.folder))
    (last,) = [line for line in read_metrics(run.folder) if line["step"] == 6]
    assert "told (distill): finished" in said and "step 6/6" in said
    assert f"prior (cached) {last['time/prior_share']:.0%}" in said
    assert f"student {last['val/rgb/psnr/student']:.2f}" in said and f"lead {last['val/rgb/psnr/lead']:.2f}" in said
    assert f"{last['loss/sgr']:.5g}" in said and f"{last['gradient_ratio/sgr']:.3g}" in said


def restill(*arguments: str) -> str:
    command = [sys.executable, "-m", "launch.command", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout

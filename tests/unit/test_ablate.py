"""Variants become runs, runs become a table; what is done is not done again, and nobody is compared unfairly."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dist_train.config import RunConfig, dump_run, load_run
from dist_train.published import Published
from launch.ablate.__main__ import main
from launch.ablate.draw import draw_ladder, worst_place
from launch.ablate.plan import RUNGS, Trial, make_trials, make_variants, unique
from launch.ablate.running import check_same, progress, train_all
from launch.ablate.scores import read_scores
from launch.ablate.statistics import estimate, paired
from launch.ablate.table import as_json, make_rows, markdown

pytestmark = pytest.mark.unit

FAKE_TRAINER = """
import sys, time
from pathlib import Path
settings = dict(word.partition("=")[::2] for word in sys.argv[4:])  # after -m launch.train CONFIG
folder = Path(settings["out"], settings["name"])
with open(folder.parent / "begun", "a") as file:
    print(settings["name"], file=file)
if settings["name"] == (folder.parent / "broken").read_text():
    sys.exit("error: no room")
if settings["name"] == (folder.parent / "endless").read_text():
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder.parent / "saved").touch()))
    (folder.parent / "ready").touch()
    time.sleep(60)
(folder / "checkpoints/step-00000010").mkdir(parents=True)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("""
name: full
data: {train: train, val: val}
prior: {name: regions, num_masks: 9}
loss: {spd: {weight: 0.05}, sgr: {weight: 2.0}}
optim: {steps: 10, global_batch: 4}
eval: {every: 0}
""")
    return str(tmp_path / "run.yaml")


def plan(config: str, *overrides: str, seeds: tuple[int, ...] = (0,), **asked: Any) -> list[Trial]:
    variants = make_variants(load_run(config, overrides), **asked)
    return make_trials(config, overrides, variants, seeds=seeds, out=Path(config).parent)


def test_each_rung_adds_one_part(config: str) -> None:
    def parts(run: RunConfig) -> tuple[Any, ...]:
        return run.task, run.prior.name, run.loss.spd.weight, run.loss.sgr.weight

    trials = plan(config, "optim.lr=1e-3", rungs=list(RUNGS), seeds=(3, 4))
    runs = [trial.run for trial in trials]
    assert [parts(run)[0] for run in runs[:5]] == ["plain", *["distill"] * 4]
    assert [parts(run)[1:] for run in runs[1:5]] == [
        ("none", 0, 0), ("regions", 0, 0), ("regions", 0.05, 0), ("regions", 0.05, 2),
    ]  # fmt: skip
    assert [run.name for run in runs] == [f"{rung}-s{seed}" for seed in (3, 4) for rung in RUNGS]
    assert [run.seed for run in runs] == [3] * 5 + [4] * 5
    for trial in trials:
        assert trial.run.eval.teacher and trial.run.eval.every == 2 and trial.run.optim.lr == 1e-3
        path, *settings = trial.arguments
        assert load_run(path, settings) == trial.run  # what launch.train will be told


def test_the_control_is_the_spd_rung_but_for_what_the_student_is_drawn_to(config: str) -> None:
    spd, control = (trial.run for trial in plan(config, rungs=["spd", "control"]))
    assert spd.loss.spd.towards == "teacher" and control.loss.spd.towards == "gt"
    for part in ("name", "loss"):
        spd, control = (run.model_copy(update={part: None}) for run in (spd, control))
    assert spd == control
    with pytest.raises(ValueError, match=r"--rungs control: loss.spd.weight is 0"):
        plan(config, "loss.spd.weight=0", rungs=["control"])


def test_priors_and_sweeps_share_runs_of_equal_settings(config: str) -> None:
    other = "{name: regions, num_masks: 3}"
    trials = plan(config, rungs=["sgr"], priors=["regions", "none", other], sweeps=["loss.spd.weight=0.05,5e-1"])
    assert [trial.run.name for trial in trials] == [
        "sgr-s0", "sgr-s0", "prior-none-s0", "prior-name-regions-num_masks-3-s0", "sgr-s0", "loss.spd.weight-5e-1-s0",
    ]  # fmt: skip
    assert [trial.run.prior.num_masks for trial in trials] == [9, 9, 0, 3, 9, 9]
    assert trials[-1].run.loss.spd.weight == 0.5 and trials[2].run.loss.spd.weight == 0.05
    assert trials[2].variant.what == "full method but for SGR, prior none" and trials[2].run.loss.sgr.weight == 0
    assert len(unique(trials)) == 4


@pytest.mark.parametrize(
    ("overrides", "asked", "message"),
    [
        ((), {}, "nothing to compare"),
        ((), {"rungs": ["sgd"]}, "there are plain, teacher"),
        (("loss.sgr.weight=0",), {"rungs": ["sgr"]}, "adds nothing"),
        (("seed=1",), {"rungs": ["plain"]}, "seed is set for each run"),
        (("data.val=null",), {"rungs": ["plain"]}, "data.val must be given"),
        ((), {"priors": ["psp"]}, "prior.weights: must be given.*such as '{name: psp, weights: FILE}'"),
        ((), {"sweeps": ["optim.steps=10"]}, "stands before the options"),
        ((), {"sweeps": ["optim.steps=10,20"]}, "different numbers of samples.*-10-s0 40, .*-20-s0 80"),
        ((), {"sweeps": ["optim.lr=1e-3,0.001", "loss.rec=l1,psnr"]}, None),
        ((), {"sweeps": ["data.val=a b,a-b"]}, "come to one name: data.val-a-b-s0"),
    ],
)
def test_what_compares_nothing_is_refused(
    config: str, overrides: tuple[str, ...], asked: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert len(unique(plan(config, *overrides, **asked))) == 3
    else:
        with pytest.raises(ValueError, match=message):
            plan(config, *overrides, **asked)


def test_estimates_are_scipys() -> None:
    rng = np.random.default_rng(0)
    base = dict(enumerate(rng.normal(30, 1, 5)))
    better = {seed: value + rng.normal(0.2, 0.05) for seed, value in base.items()}
    mean, half, n = estimate(list(base.values()))
    low, high = stats.t.interval(0.95, 4, loc=np.mean([*base.values()]), scale=stats.sem([*base.values()]))
    assert n == 5 and (mean - half, mean + half) == pytest.approx((low, high))  # type: ignore[operator]
    gain = paired(better | {99: 0.0}, base)  # a seed without partner does not count
    wanted = stats.ttest_rel([*better.values()], [*base.values()]).confidence_interval(0.95)
    assert gain is not None and gain.half is not None
    assert (gain.mean - gain.half, gain.mean + gain.half) == pytest.approx((wanted.low, wanted.high))
    assert gain.half < half / 3  # type: ignore[operator]  # which is why they are paired
    assert estimate([1.0]) == (1.0, None, 1) and paired({1: 0.0}, {2: 0.0}) is None


def test_the_list_is_what_slurm_reads(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "optim.lr=0.1", "--rungs", "plain", "teacher", "--out", str(tmp_path), "--list"]) == 0
    runs = [load_run(path, settings) for path, *settings in map(shlex.split, capsys.readouterr().out.splitlines())]
    assert [trial.run for trial in plan(config, "optim.lr=0.1", rungs=["plain", "teacher"])] == runs


@pytest.fixture
def trainer(tmp_path: Path) -> list[str]:
    """A launcher of runs that take no time."""
    (tmp_path / "fake.py").write_text(FAKE_TRAINER)
    for name in ("broken", "endless"):
        (tmp_path / name).write_text("")
    return [sys.executable, str(tmp_path / "fake.py")]


def test_finished_runs_rest_and_a_failed_one_holds_nobody_up(config: str, trainer: list[str], tmp_path: Path) -> None:
    trials = plan(config, rungs=["plain", "spf", "sgr"])
    (tmp_path / "spf-s0/checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "sgr-s0/checkpoints/step-00000009").mkdir(parents=True)  # begun
    (tmp_path / "broken").write_text("plain-s0")
    failed = train_all(trials, launcher=trainer, jobs=1, logs=tmp_path / "logs")
    assert failed.keys() == {"plain-s0"} and "exit code 1" in failed["plain-s0"]
    assert failed["plain-s0"].endswith("error: no room")
    assert (tmp_path / "begun").read_text().split() == ["plain-s0", "sgr-s0"]
    (tmp_path / "broken").write_text("")
    assert train_all(trials, launcher=trainer, jobs=2, logs=tmp_path / "logs") == {}
    assert (tmp_path / "begun").read_text().split() == ["plain-s0", "sgr-s0", "plain-s0"]


def test_a_stop_reaches_the_runs(config: str, trainer: list[str], tmp_path: Path) -> None:
    (tmp_path / "endless").write_text("plain-s0")

    def stop_when_ready() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready).start()
    with pytest.raises(KeyboardInterrupt):
        train_all(plan(config, rungs=["plain", "spf"]), launcher=trainer, jobs=1, logs=tmp_path / "logs")
    assert (tmp_path / "saved").exists() and (tmp_path / "begun").read_text().split() == ["plain-s0"]


def test_folders_of_other_settings_are_refused(config: str, tmp_path: Path) -> None:
    before, now = plan(config, rungs=["plain"]), plan(config, "optim.lr=0.1", "data.workers=0", rungs=["plain"])
    (tmp_path / "plain-s0").mkdir()
    (tmp_path / "plain-s0/config.yaml").write_text(dump_run(before[0].run))
    check_same(before)
    with pytest.raises(ValueError, match=r"other settings: optim\.lr=0\.0002 is now 0\.1\. Move it away"):
        check_same(now)


def write_record(
    trial: Trial, *, student: float, teacher: float | None = None, step: int = 10, crops: dict[int, float] | None = None
) -> None:
    scores = {"input/psnr": 20.0, "input/ssim": 0.5, "student/psnr": student, "student/ssim": student / 40}
    if teacher is not None:
        scores |= {"teacher/psnr": teacher, "teacher/ssim": teacher / 40}
    named = {f"val/rgb/{metric}/{net}": v for name, v in scores.items() for net, metric in [name.split("/")]}
    lines = [{"step": n, "time/step_s": n / 10, "samples_seen": 4 * n} for n in (1, 2, step)]
    lines += [{"step": n, "loss/student_rec": -psnr} for n, psnr in (crops or {}).items()]
    trial.run.dir.mkdir()
    (trial.run.dir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": step} | named])
    )


def test_the_table_is_of_finished_runs_paired_by_seed(config: str, tmp_path: Path) -> None:
    trials = plan(config, rungs=["plain", "teacher", "sgr"], seeds=(0, 1, 2))
    scores = {"plain": (30.0, 31.0, 29.0), "sgr": (30.3, 31.2, 29.4)}
    for trial in trials:
        if trial.variant.name != "teacher":
            score = scores[trial.variant.name][trial.seed]
            write_record(trial, student=score, teacher=score + 0.5 if trial.variant.name == "sgr" else None)
    write_record(trials[1], student=1.0, step=8)  # not at its end
    text = progress(unique(trials), failed={}, jobs=1)
    assert text == "6 of 9 runs done, 68 of 90 steps, 0:00:04 left"  # 22 steps of 0.2 s
    rows = make_rows([trial.variant for trial in trials[:3]], read_scores(trials))
    assert [row.variant for row in rows] == ["plain", "sgr"] and rows[1].step_s == pytest.approx(0.2)
    gain, wanted = rows[1].gains["student/psnr"], stats.ttest_rel(scores["sgr"], scores["plain"])
    assert gain.mean == pytest.approx(0.3) and gain.mean + gain.half == pytest.approx(  # type: ignore[operator]
        wanted.confidence_interval(0.95).high
    )
    assert rows[1].gains["teacher/psnr"].mean == pytest.approx(0.8)
    assert rows[1].means["lead/psnr"].mean == pytest.approx(0.5) and not rows[0].gains
    paper = [Published(table="distill-5", row="sgr", what="-", data="unnamed", values={"psnr": 34.09, "ssim": 0.9847})]
    table = markdown(rows, protocol="rgb", data="val", published=paper)
    (line,) = [line for line in table.splitlines() if line.startswith("| sgr")]
    assert line == (
        "| sgr | + SGR: the full method | 30.30 +- 2.24 / 0.7575 +- 0.0559 | +0.30 +- 0.25 | "
        "30.80 +- 2.24 / 0.7700 +- 0.0559 | +0.80 +- 0.25 | +0.50 +- 0.00 | 0.2 | 34.09 / 0.9847 (published) |"
    )
    assert json.loads(as_json(rows, protocol="rgb", data="val"))["rows"][1]["dots"]["student/psnr"]["2"] == 29.4
    draw_ladder(rows, tmp_path / "ladder.png", protocol="rgb", data="val")
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    odd = [*read_scores(trials), read_scores(trials)[0]._replace(samples=7)]
    with pytest.raises(ValueError, match="different samples"):
        make_rows([trial.variant for trial in trials[:3]], odd)


def test_the_fit_is_what_crops_scored_in_the_last_quarter_weighted_by_steps(config: str) -> None:
    trials = plan(config, rungs=["plain", "spd"], seeds=(0, 1))
    for trial in trials:
        more = 0.5 * (trial.variant.name == "spd") + 3 * trial.seed
        write_record(trial, student=30.0, crops={4: 1.0, 7: 20.0, 9: 28.0 + more, 10: 31.0 + more})
    rows = make_rows([trial.variant for trial in trials[:2]], read_scores(trials))
    assert rows[0].means["fit/psnr"].mean == pytest.approx(29.0 + 1.5)  # of 28, 28, 31
    assert rows[1].gains["fit/psnr"] == pytest.approx((0.5, 0.0, 2))
    table = markdown(rows, protocol="rgb", data="val")
    assert "| gain dB | fit gain dB | teacher |" in table and "+0.00 +- 0.00 | +0.50 +- 0.00 |" in table
    assert "scored before the step that learns from it" in table


def test_the_crop_is_where_the_degraded_picture_is_worst() -> None:
    rng = np.random.default_rng(0)
    lq, gt = (rng.integers(0, 256, (17, 30, 3), dtype=np.uint8) for _ in range(2))
    error = (lq.astype(int) - gt) ** 2
    sums = {(y, x): error[y : y + 8, x : x + 8].sum() for y in range(10) for x in range(23)}
    top, left = max(sums, key=sums.__getitem__)
    assert worst_place(lq, gt, 8) == (slice(top, top + 8), slice(left, left + 8))
    assert worst_place(lq, gt, 20)[0] == slice(0, 17)  # no taller than the picture

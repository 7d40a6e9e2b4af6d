"""The real commands, as subprocesses: shards, two ranks under accelerate launch, resume, evaluate, export, restore."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil
import pytest

from dist_train.track import read_metrics
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
LAUNCH = (ACCELERATE, "launch", "--config_file", "launch/accelerate/cpu_2rank.yaml")
PHASES = (
    "data", "student", "prior", "teacher", "features", "losses", "backward", "communication", "update", "other",
)  # fmt: skip
TERMS = ("loss/student_rec", "loss/teacher_rec", "loss/spd", "loss/sgr", "loss/total")


def run(*command: str, code: int = 0, timeout_s: float = 500) -> str:
    """Run a command in the repository and return all it printed; its exit code must be `code`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = done.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(done.pid).children(recursive=True), done]:
            process.send_signal(signal.SIGABRT)  # upon which each says where it stands
        raise AssertionError(f"{command} not done in {timeout_s} s:\n{done.communicate(timeout=30)[0]}") from None
    launched = command[0] == ACCELERATE  # whose own code for a failed rank is 1
    assert done.returncode == (min(code, 1) if launched else code), (
        f"exit code {done.returncode} of {command}:\n{said[-4000:]}"
    )
    return said


def python(*arguments: str, code: int = 0) -> str:
    return run(sys.executable, "-m", *arguments, code=code)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 12 training and 3 validation pairs, and a configuration."""
    folder = tmp_path_factory.mktemp("job")
    for split, num in (("train", 12), ("val", 3)):
        write_pairs(make_pairs(folder / f"{split}_pairs", num, h=40, w=48), folder / split, split=split)
    (folder / "run.yaml").write_text(f"""
name: tiny
out: {folder}/runs
data: {{train: {folder}/train, val: {folder}/val, crop_px: 32, workers: 1}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1, 1], dec_blk_nums: [1, 1]}}
prior: {{name: regions, num_masks: 8, scale: 50, min_area_px: 16}}
features: {{arch: vgg19_16x, weights: random, layer: relu2_2}}
loss: {{spd: {{weight: 0.05}}, sgr: {{weight: 1.0, normalize: true}}}}
optim: {{steps: 4, global_batch: 4, lr: 1e-3, schedule: constant}}
eval: {{every: 2, teacher: true}}
checkpoint: {{every: 2}}
track: {{every: 1, gradients_every: 2, pictures_every: 4, wandb: offline}}
""")
    return folder


def lines(work: Path, name: str) -> list[dict[str, float]]:
    return [line for line in read_metrics(work / "runs" / name) if "loss/total" in line]


@pytest.fixture(scope="module")
def two_ranks(work: Path) -> str:
    """The run `tiny` on two ranks: four steps."""
    return run(*LAUNCH, "-m", "launch.train", str(work / "run.yaml"))


def test_two_ranks_write_the_whole_record(work: Path, two_ranks: str) -> None:
    folder = work / "runs/tiny"
    record = read_metrics(folder)
    assert [line["step"] for line in record] == [1, 2, 3, 4]
    assert all(name in line for line in record for name in (*TERMS, "lr", "time/samples_per_s"))
    assert {"gradient_ratio/spd", "gradient_ratio/sgr", "weight/spd", "val/rgb/psnr/teacher"} <= record[1].keys()
    for line in record:
        seconds = [line[f"time/{phase}_s"] for phase in PHASES]
        assert min(seconds) > 0 and sum(seconds) == pytest.approx(line["time/step_s"])
        assert line["time/tflops"] > 0 and line["memory/host_gib"] > 0 and line["time/spread"] >= 1
    assert {"time/validation_s", "time/checkpoint_s"} <= record[1].keys() and "time/pictures_s" in record[3]
    assert json.loads((folder / "heartbeat.json").read_text())["step"] == 4
    (env,) = json.loads((folder / "env.json").read_text())  # one start
    assert env["world_size"] == 2 and env["batch"] == {"global_batch": 4, "batch_per_rank": 2, "grad_accum": 1}
    assert "not SAM" in env["priors"]["masks"]["what"] and "RANDOM" in env["priors"]["features"]["what"]
    assert list((folder / "pictures/val").glob("*.png")) and list((folder / "wandb").glob("offline-run-*"))
    assert "RANDOM" in two_ranks and "not SAM" in two_ranks  # said aloud


def test_losses_are_those_of_the_golden_file(work: Path, two_ranks: str) -> None:
    golden = (ROOT / "tests/golden/smoke_losses.txt").read_text().splitlines()
    rows = [line.split() for line in golden if not line.startswith("#")]
    for (step, *wanted), line in zip(rows, lines(work, "tiny"), strict=True):
        assert int(step) == line["step"]
        for name, value in zip(TERMS, wanted, strict=True):
            assert line[name] == pytest.approx(float(value), rel=1e-3), (step, name)


def test_again_says_that_it_is_finished(work: Path, two_ranks: str) -> None:
    assert "is finished" in python("launch.train", str(work / "run.yaml"))


def test_unlaunched_sees_the_same_batches_as_two_ranks(work: Path, two_ranks: str) -> None:
    profile = "track.profile={from_step: 2, steps: 2}"
    python("launch.train", str(work / "run.yaml"), "name=alone", "data.workers=0", "engine.zero_stage=0", profile)
    for two, one in zip(lines(work, "tiny"), lines(work, "alone"), strict=True):
        for name in TERMS:
            assert one[name] == pytest.approx(two[name], rel=1e-4), (name, one["step"])
    with gzip.open(work / "runs/alone/trace-rank0.json.gz", "rt") as file:
        named = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert named.count("teacher") == named.count("backward") == 2  # one pass in each of two steps


def test_stopped_and_resumed_equals_uninterrupted_bit_by_bit(work: Path, two_ranks: str) -> None:
    run(*LAUNCH, "-m", "launch.train", str(work / "run.yaml"), "name=halves", "optim.steps=2")
    said = run(*LAUNCH, "-m", "launch.train", str(work / "run.yaml"), "name=halves")
    assert "resuming halves" in said and "8 samples seen" in said
    whole, halves = lines(work, "tiny"), lines(work, "halves")
    assert [[line[name] for name in TERMS] for line in whole] == [[line[name] for name in TERMS] for line in halves]
    for name in ("val/rgb/psnr/student", "val/rgb/psnr/teacher"):  # of the averaged student, and through all weights
        assert whole[-1][name] == halves[-1][name]


def test_killed_at_any_moment_goes_on_as_if_nothing_had_been(work: Path, two_ranks: str) -> None:
    """kill -9 of all ranks in mid-run, under a schedule that changes every step."""
    config = [
        str(work / "run.yaml"),
        "optim.schedule=cosine",
        "optim.warmup_steps=2",
        "optim.steps=30",
        "track.wandb=off",
    ]
    run(*LAUNCH, "-m", "launch.train", *config, "name=whole", "eval.every=0")
    command = [*LAUNCH, "-m", "launch.train", *config, "name=killed", "eval.every=0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (work / "runs/killed/checkpoints/step-00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    launcher = psutil.Process(process.pid)
    ranks = [child for child in launcher.children(recursive=True) if "launch.train" in " ".join(child.cmdline())]
    assert len(ranks) >= 2
    for each in [launcher, *ranks]:
        each.kill()
    psutil.wait_procs([launcher, *ranks])
    said = run(*command)
    assert "resuming killed" in said
    assert [[line[name] for name in TERMS] for line in lines(work, "whole")] == [
        [line[name] for name in TERMS] for line in lines(work, "killed")
    ]
    assert len(json.loads((work / "runs/killed/env.json").read_text())) == 2  # both starts are on record


def test_torchrun_and_stage_3(work: Path, two_ranks: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(*torchrun, "-m", "launch.train", str(work / "run.yaml"), "name=sharded", "engine.zero_stage=3")
    for two, sharded in zip(lines(work, "tiny"), lines(work, "sharded"), strict=True):
        assert sharded["loss/total"] == pytest.approx(two["loss/total"], rel=1e-5)
    assert read_metrics(work / "runs/sharded")[-1]["val/rgb/psnr/student"] == pytest.approx(
        read_metrics(work / "runs/tiny")[-1]["val/rgb/psnr/student"], abs=1e-3
    )


def test_export_evaluate_restore(work: Path, two_ranks: str) -> None:
    weights = work / "student.safetensors"
    python("launch.export", str(work / "runs/tiny"), str(weights))
    card = json.loads(weights.with_suffix(".json").read_text())
    validated = read_metrics(work / "runs/tiny")[-1]["val/rgb/psnr/student"]
    assert card["scores"]["val/rgb/psnr/student"] == validated
    said = python("launch.evaluate", str(weights), str(work / "val"), "--json", str(work / "scores.json"))
    scores = json.loads((work / "scores.json").read_text())
    assert scores["means"]["val/rgb/psnr/student"] == pytest.approx(validated, abs=1e-6)
    assert len(scores["pictures"]) == 3 * 2 * 2 and f"{validated:.4f}" in said
    shared = run(*LAUNCH, "-m", "launch.evaluate", str(work / "runs/tiny"), str(work / "val"), "--protocol", "rgb")
    assert f"{validated:.4f}" in shared  # each rank scores its share
    python("launch.restore", str(weights), str(work / "val_pairs/lq"), str(work / "restored"))
    restored = cv2.imread(str(work / "restored/s-1.png"))
    assert restored is not None and restored.shape == (40, 48, 3)
    python("launch.before_after", str(weights), str(work / "val"), str(work / "before_after.png"))
    assert cv2.imread(str(work / "before_after.png")) is not None


def test_check_prints_the_run_and_does_nothing(work: Path) -> None:
    said = python("launch.train", str(work / "run.yaml"), "--check", "name=unborn")
    assert "4 samples a step = 4 a pass x 1 passes x 1 ranks" in said and "student: " in said
    assert not (work / "runs/unborn").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.stepz=1"], "optim.stepz: no such setting; did you mean steps?"),
        (["data.train=nowhere"], "nowhere"),
        (["optim.global_batch=64", "name=big"], "has 12 samples"),
        (["data.crop_px=41", "name=crop"], "data.crop_px to at most 40"),
        (["prior={name: sam, model: vit_b, checkpoint: nowhere.pth}", "name=nosam"], "nowhere.pth"),
        (["student.width=8", "optim.steps=9"], "cannot go on as this run: student.width=4 is now 8"),
        (["prior.num_masks=4"], "cannot go on as this run: prior.num_masks=8 is now 4"),
        (["seed=1", "optim.steps=9"], "seed=0 is now 1"),
        (["data.crop_px=4", "name=onepixel"], "set data.crop_px to 8 or more"),
        (["out=/proc/none"], "the run's folder /proc/none/tiny cannot be written"),
    ],
)
def test_mistakes_end_in_one_clear_line(work: Path, two_ranks: str, overrides: list[str], message: str) -> None:
    said = python("launch.train", str(work / "run.yaml"), *overrides, code=2)
    assert message in said and "Traceback" not in said, said


def test_a_bad_sample_on_one_rank_stops_all_with_its_name(work: Path, two_ranks: str) -> None:
    folder = work / "corrupt"
    write_pairs(work / "train_pairs", folder)
    (tar,) = folder.glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[700] ^= 1  # in the first picture
    tar.write_bytes(content)
    config = (str(work / "run.yaml"), f"data.train={folder}", "track.wandb=off", "optim.steps=6", "eval.every=0")
    said = run(*LAUNCH, "-m", "launch.train", *config, "name=strict", code=2)
    assert "1 samples could not be read and data.max_bad_samples is 0" in said and "crc32 differs" in said, said
    run(*LAUNCH, "-m", "launch.train", *config, "name=lenient", "data.max_bad_samples=1")
    assert read_metrics(work / "runs/lenient")[-1]["step"] == 6

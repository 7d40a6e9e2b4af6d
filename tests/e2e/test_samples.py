"""Which samples a run sees, whatever kills it and wherever it goes on: those of the plan, each once, bit by bit."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_train.config import load_run, plan_batch
from dist_train.data.ledger import pixels_sha1
from dist_train.data.loader import training_batches
from dist_train.data.mixture import open_training
from tests.e2e.test_main_job import LAUNCH, ROOT, python, run
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.shared import shared

pytestmark = pytest.mark.e2e

Seen = dict[int, tuple[str, str]]


def planned(config: Path, *overrides: str) -> Seen:
    """Position -> key and hash of pixels, of one process that is never interrupted."""
    run = load_run(config, overrides)
    data, found = run.data.model_copy(update={"workers": 0}), {}
    stream = training_batches(open_training(data), data, seed=run.seed, plan=plan_batch(run.optim, 1))
    for batch in itertools.islice(stream, run.optim.steps):
        found |= dict(zip(batch.positions.tolist(), zip(batch.keys, pixels_sha1(batch), strict=True), strict=True))
    return found


def recorded(folder: Path) -> Seen:
    """What the ranks wrote down; no position twice."""
    found: Seen = {}
    for path in folder.glob("samples-rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for position, key, sha1 in zip(line["positions"], line["keys"], line["sha1"], strict=True):
                assert position not in found, f"{path}: position {position} was seen twice"
                found[position] = key, sha1
    return found


def test_killed_again_and_again_at_other_world_sizes_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    """Ranks that only read, two data sets in a windowed order."""
    sets = []
    for name, num in (("one", 31), ("two", 8)):
        write_pairs(make_pairs(tmp_path / f"{name}_src", num), tmp_path / name, shard_mib=0.02)
        sets.append({"path": str(tmp_path / name), "share": num})
    config = tmp_path / "run.yaml"
    config.write_text(f"""
name: killed
out: {tmp_path}
data: {{train: {json.dumps(sets)}, crop_px: 16, workers: 1, order: windowed, window: 4}}
optim: {{steps: 150, global_batch: 12}}
checkpoint: {{every: 3}}
track: {{samples: true}}
""")
    committed = tmp_path / "killed/committed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for world in (2, 3, 1, 4):
        before = int(committed.read_text()) if committed.exists() else 0
        process = subprocess.Popen(torchrun(world, config), cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while (int(committed.read_text()) if committed.exists() else 0) < before + 9:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        launcher = psutil.Process(process.pid)
        everyone = [launcher, *launcher.children(recursive=True)]
        assert len(everyone) >= 1 + 2 * world  # and their workers
        for each in everyone:
            each.kill()
        psutil.wait_procs(everyone)
        assert before + 9 <= int(committed.read_text()) < 150
    run(*torchrun(2, config))
    assert int(committed.read_text()) == 150
    assert recorded(tmp_path / "killed") == planned(config)


def torchrun(world: int, config: Path) -> list[str]:
    script = str(Path(__file__).with_name("loader_ranks.py"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [*start, script, str(config)]


def test_a_run_on_real_pictures_resumed_from_2_ranks_on_1_and_4_sees_the_planned_samples(tmp_path: Path) -> None:
    pictures = shared("data", "rain100L_train")
    shards, config = tmp_path / "shards", tmp_path / "run.yaml"
    layout = ("--lq-dir", "rain", "--gt-dir", "norain", "--select", "1-14", "--shard-mib", "2")
    python("shards", "write", "pairs", "--src", str(pictures), "--out", str(shards), *layout)
    config.write_text(f"""
name: two
out: {tmp_path}
task: plain
data: {{train: {shards}, crop_px: 32}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1], dec_blk_nums: [1]}}
optim: {{steps: 9, global_batch: 4}}
checkpoint: {{every: 2, keep: 9}}
track: {{every: 1, samples: true, gradients_every: 0}}
""")
    plan = planned(config)
    assert len(plan) == 36 and len({key for key, _ in plan.values()}) == 14
    run(*LAUNCH, "-m", "launch.train", str(config), "optim.steps=5")
    assert recorded(tmp_path / "two") == {position: seen for position, seen in plan.items() if position < 20}
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000005")  # so that step 5 is done again
    for name, command in (
        ("one", [sys.executable, "-m", "launch.train"]),
        ("four", [*LAUNCH[:2], "--num_processes", "4", *LAUNCH[2:], "-m", "launch.train"]),
    ):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        said = run(*command, str(config), f"name={name}")
        assert f"resuming {name}" in said and "16 samples seen" in said
        assert recorded(tmp_path / name) == plan
        world = {"one": 1, "four": 4}[name]
        ranks = [json.loads(path.read_text().splitlines()[-1]) for path in (tmp_path / name).glob("samples-rank*")]
        assert sum(line["step"] == 9 for line in ranks) == world

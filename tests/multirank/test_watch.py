"""Two ranks of a real run, of which one hangs, dies, fails, lags or computes NaN: it is named, and the run ends soon.

No launcher watches here, so what ends the other rank is the rank itself.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dist_train.track import read_metrics
from dist_train.watchdog import GRACE_S
from tests.helpers.pairs import make_pairs, write_pairs
from tests.multirank.ranks_of_watch import BAD_STEP

pytestmark = pytest.mark.multirank

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
SLACK_S = 15.0
"""For a machine that has other things to do; what hangs here would hang for 1000 s."""


class Ended(NamedTuple):
    """A rank that has."""

    code: int
    said: str
    at: float


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_pairs(make_pairs(folder / "pairs", 12, h=40, w=48), folder / "train")
    (folder / "run.yaml").write_text(f"""
name: run
out: {folder}
data: {{train: {folder}/train, crop_px: 32, workers: 1}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1, 1], dec_blk_nums: [1, 1]}}
prior: {{name: regions, num_masks: 8, scale: 50, min_area_px: 16}}
loss: {{sgr: {{weight: 0.0}}}}
optim: {{steps: 30, global_batch: 4}}
engine: {{hang_timeout_s: 15}}
track: {{every: 1}}
""")
    return folder / "run.yaml"


def run_ranks(config: Path, fault: str) -> list[Ended]:
    """Two ranks of the run named as the fault, when both have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.multirank.ranks_of_watch", str(config), fault, f"name={fault}"]
    logs = [config.parent / f"{fault}-{rank}.log" for rank in range(2)]
    processes = []
    for rank, path in enumerate(logs):
        env = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with path.open("w") as file:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 240
    try:
        while len(ended) < 2 and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic()
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(ended) == 2, f"only {list(ended)} ended: {[path.read_text()[-3000:] for path in logs]}"
    return [Ended(processes[rank].returncode, logs[rank].read_text(), ended[rank]) for rank in range(2)]


def stacks(config: Path, fault: str) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (config.parent / fault / "stacks").glob("*/rank*.txt")}


def test_a_rank_that_hangs_is_named_with_every_ranks_stack(config: Path) -> None:
    main, other = run_ranks(config, "hangs")
    assert main.code == other.code == 1
    written = stacks(config, "hangs")
    place = f"rank {{}} on {HOST}, step {BAD_STEP}, in {{}}: this has taken more than 15 s (engine.hang_timeout_s)"
    assert written["rank0"].startswith(place.format(0, "communication")) and "all_reduce" in written["rank0"]
    assert written["rank1"].startswith(place.format(1, "prior")) and "in hangs" in written["rank1"]
    assert "in hangs" in other.said
    assert re.search(rf"1 of 2 ranks waited for others\n{re.escape(place.format(1, 'prior'))}\nstacks: ", main.said)
    assert abs(main.at - other.at) < GRACE_S + SLACK_S
    told = json.loads((config.parent / "hangs/heartbeat.json").read_text())
    seconds_since_last_step = time.time() - (config.parent / "hangs/metrics.jsonl").stat().st_mtime
    assert told["step"] < BAD_STEP and seconds_since_last_step < 15 + GRACE_S + SLACK_S


def test_a_rank_that_was_killed_is_named_by_those_left(config: Path) -> None:
    main, other = run_ranks(config, "dies")
    assert other.code == -9 and main.code == 1
    assert f"rank 1 on {HOST} has said nothing: it was killed" in main.said
    assert stacks(config, "dies").keys() == {"rank0"}
    assert main.at - other.at < GRACE_S + SLACK_S


def test_a_rank_that_fails_by_itself_is_named_with_its_error(config: Path) -> None:
    main, other = run_ranks(config, "fails")
    assert main.code == other.code == 1
    assert f"rank 1 on {HOST}, step {BAD_STEP}, in prior: RuntimeError: no memory left\nstacks: " in main.said
    assert "has said nothing" not in main.said
    assert main.at - other.at < GRACE_S + SLACK_S


def test_a_rank_that_lags_and_then_computes_nan_is_named_and_its_batch_kept(config: Path) -> None:
    main, other = run_ranks(config, "lags")
    assert main.code == other.code == 2  # which a person must mend
    assert main.said.count(f"rank 1 on {HOST} keeps the others waiting: ") == 1 and "most of it in prior" in main.said
    lines = read_metrics(config.parent / "lags")
    assert all(line["time/slowest_rank"] == 1 and line["time/spread"] > 1.4 for line in lines[1:])
    assert all(line["time/communication_s"] > 1 for line in lines[1:])  # rank 0 waits, and that is what it is called
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2]
    last = BAD_STEP + 2
    for rank in (main, other):
        assert f"gradients were not finite in 3 steps in a row (engine.max_bad_steps), up to step {last}" in rank.said
        assert f"rank 1 on {HOST}: student_rec is nan; its samples: s-" in rank.said
    (path,) = (config.parent / "lags/bad_steps").glob("*.safetensors")
    assert path.name == f"step-{last:08d}-rank1.safetensors" and str(path) in main.said
    gt = load_file(path)["gt"]
    assert gt.shape == (2, 3, 32, 32) and torch.isnan(gt[1]).all() and torch.isfinite(gt[0]).all()
    told = json.loads(path.with_suffix(".json").read_text())
    assert len(told["keys"]) == 2 and told["positions"] == [(last - 1) * 4 + 2, (last - 1) * 4 + 3]
    assert not stacks(config, "lags")

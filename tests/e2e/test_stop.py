"""A run that is asked to stop, or loses its launcher, goes on as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_train.track import read_metrics
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.slurm import ROOT, until

pytestmark = pytest.mark.e2e

STEPS = 40
BIN = Path(sys.executable).parent
MODULE = ("-m", "launch.train")
TWO_RANKS = (f"{BIN}/accelerate", "launch", "--config_file", "launch/accelerate/cpu_2rank.yaml", *MODULE)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_pairs(make_pairs(tmp_path / "pairs", 12, h=40, w=48), tmp_path / "train")
    (tmp_path / "run.yaml").write_text(f"""
name: none
out: {tmp_path}/runs
task: plain
data: {{train: {tmp_path}/train, crop_px: 32}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1, 1], dec_blk_nums: [1, 1]}}
optim: {{steps: {STEPS}, global_batch: 4, lr: 1e-3, warmup_steps: 2}}
checkpoint: {{every: 0}}
track: {{every: 3, gradients_every: 5, pictures_every: 0}}
""")
    return tmp_path


def start(work: Path, name: str, *, launcher: tuple[str, ...] = TWO_RANKS, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, str(work / "run.yaml"), f"name={name}"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_a_line(work: Path, name: str, process: subprocess.Popen) -> None:
    """Until this start of the run has logged its losses."""
    before = len(read_metrics(work / "runs" / name))

    def logged() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return len(read_metrics(work / "runs" / name)) > before

    until(logged, f"a line of {name}")


def test_asked_to_stop_orphaned_and_killed(work: Path) -> None:
    """No checkpoint is due before the end, so what is not saved on the way is lost."""
    whole = start(work, "whole")
    assert whole.communicate(timeout=300)[0] and whole.returncode == 0

    asked = start(work, "broken")
    wait_for_a_line(work, "broken", asked)
    (work / "runs/broken/stop").write_text("lunch")
    said, _ = asked.communicate(timeout=300)
    assert "stop: lunch" in said and "exitcode  : 3" in said and asked.returncode == 1, said  # 1 is accelerate's own
    assert not (work / "runs/broken/stop").exists() and not (work / "runs/broken/lock").exists()

    orphaned = start(work, "broken")
    wait_for_a_line(work, "broken", orphaned)
    orphaned.kill()  # the launcher alone: nobody is left to end the ranks
    last = start(work, "broken")  # waits for them
    said, _ = orphaned.communicate(timeout=300)  # until the ranks have ended too
    assert "the launcher of rank 0 has died" in said and "saved" in said, said
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said

    same_end(work, "whole", "broken")

    # torchrun starts the ranks again by itself, if they do not meet at the addresses of those before.
    again = start(
        work, "again", launcher=(f"{BIN}/torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=1", *MODULE),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip
    wait_for_a_line(work, "again", again)
    psutil.Process(again.pid).children()[1].kill()
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and said.count("to step 40") == 2, said
    same_end(work, "whole", "again")


def same_end(work: Path, one: str, other: str) -> None:
    for file in ("model.safetensors", "moments.safetensors"):
        paths = [work / "runs" / name / f"checkpoints/step-{STEPS:08d}" / file for name in (one, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    records = [
        [(line["step"], line["loss/total"]) for line in read_metrics(work / "runs" / name) if "loss/total" in line]
        for name in (one, other)
    ]
    assert records[0] == records[1]

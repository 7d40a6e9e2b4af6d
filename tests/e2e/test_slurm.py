"""sbatch on a real SLURM: a run that is interrupted in every way equals one that is not, and what queues again."""

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.track import read_metrics
from shards.schema import load_manifest
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.slurm import SlurmCluster, until, why_not

REASON = why_not()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(1800)]

STEPS = 60
OTHERS = "n5,n6"  # the interrupted job has the nodes n1 to n4 for itself

# In the place of `accelerate launch` where it is not the launcher that is tried, to be quick.
LAUNCHER = """#!/usr/bin/env bash
[ "${SLURM_RESTART_COUNT:-0}" != 1 ] || LAUNCHER=${LAUNCHER_OF_RESTART:-$LAUNCHER}
RUN=$(dirname "$(dirname "$(dirname "$RESTILL_OUTCOME")")")
case $LAUNCHER in
  accelerate) PATH=${PATH#*:} exec accelerate "$@" ;;
  direct)  # one rank on each node, and nothing around it
    while [ "$1" != -m ]; do
      case $1 in
        --machine_rank) export RANK=$2 LOCAL_RANK=0 ;;
        --num_machines) export WORLD_SIZE=$2 ;;
        --main_process_ip) export MASTER_ADDR=$2 ;;
        --main_process_port) export MASTER_PORT=$2 ;;
      esac
      shift
    done
    exec python "$@" ;;
  die) exit 1 ;;
  refuse) echo "refused: a setting" > "$RESTILL_OUTCOME"; exit 1 ;;
  finish_late) until [ -e "$RUN/stop" ]; do sleep 0.1; done; echo finished > "$RESTILL_OUTCOME" ;;
  obey) until [ -e "$RUN/stop" ]; do sleep 0.1; done; rm "$RUN/stop"; echo stopped > "$RESTILL_OUTCOME" ;;
  deaf) sleep 1000 ;;
esac
"""

# In the place of SLURM's own, for a controller that is away: where AWAY names a file, the first call makes it and fails
AWAY = """#!/usr/bin/env bash
[ -z "${AWAY:-}" ] || [ -e "$AWAY" ] || { touch "$AWAY"; exit 1; }
PATH=${PATH#*:} exec squeue "$@"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), 6, CPUS=16, KILL_WAIT=30, GRACE_TIME=300)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 12 pairs, the demo's configuration made tiny, and a launcher."""
    folder = tmp_path_factory.mktemp("job")
    write_pairs(make_pairs(folder / "pairs", 12, h=40, w=48), folder / "train")
    (folder / "bin").mkdir()
    for name, content in (("accelerate", LAUNCHER), ("squeue", AWAY)):
        program = folder / "bin" / name
        program.write_text(content)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def run_of(work: Path, name: str, *more: str) -> list[str]:
    """Arguments of slurm/train.sh."""
    return [
        "configs/demo.yaml", f"name={name}", f"out={work}/runs", f"data={{train: {work}/train, crop_px: 32}}",
        "student={name: nafnet, width: 4, enc_blk_nums: [1, 1], dec_blk_nums: [1, 1]}",
        "prior={name: regions, num_masks: 8, scale: 50, min_area_px: 16}",
        f"optim={{steps: {STEPS}, global_batch: 4, lr: 1e-3, warmup_steps: 2}}",
        "track={every: 3, gradients_every: 7, pictures_every: 0}", "checkpoint.every=10", *more,
    ]  # fmt: skip


def environment(work: Path, launcher: str) -> dict[str, str]:
    """Of a job: this interpreter's, with our launcher first."""
    path = f"{work}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"VIRTUAL_ENV": sys.prefix, "PATH": path, "LAUNCHER": launcher}


def submit(
    cluster: SlurmCluster, work: Path, name: str, *options: str, launcher: str, more: tuple[str, ...] = (), **env: str
) -> str:
    """Submit slurm/train.sh with small claims; returns the job's number."""
    return cluster.submit(
        "--cpus-per-task=1", f"--output={work}/{name}.out", *options, "slurm/train.sh", *run_of(work, name, *more),
        env=environment(work, launcher) | env,
    )  # fmt: skip


def said(work: Path, name: str) -> str:
    path = work / f"{name}.out"
    return path.read_text() if path.exists() else ""


def last_step(work: Path, name: str) -> int:
    record = read_metrics(work / "runs" / name)
    return int(record[-1]["step"]) if record else 0


@pytest.fixture(scope="module", autouse=True)
def deaf(cluster: SlurmCluster, work: Path) -> str:
    """A job that does not stop when told, and so is ended by its time limit of a minute."""
    return submit(cluster, work, "deaf", "--nodes=1", "--nodelist=n6", "--time=1", launcher="deaf")


@pytest.fixture(scope="module", autouse=True)
def uninterrupted(cluster: SlurmCluster, work: Path) -> str:
    """The run that others are compared with; it goes on beside the first tests."""
    return submit(cluster, work, "whole", "--nodes=2", f"--nodelist={OTHERS}", launcher="accelerate")


# --------------------------------------------------------------------------------- what queues again, and how often


@pytest.mark.parametrize(
    ("name", "launcher", "env", "state", "restarts", "code"),
    [
        ("died", "die", {"MAX_FAILURES": "2"}, "FAILED", "1", "1:0"),
        ("refused", "refuse", {}, "FAILED", "0", "2:0"),
    ],
)
def test_what_died_queues_again_and_what_a_person_must_mend_does_not(
    cluster: SlurmCluster, work: Path, name: str, launcher: str, env: dict, state: str, restarts: str, code: str
) -> None:
    job = submit(cluster, work, name, "--nodes=1", "--nodelist=n6", launcher=launcher, **env)
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == (state, restarts, code), said(work, name)


def test_a_mistake_in_the_configuration_ends_the_job_before_a_rank_starts(cluster: SlurmCluster, work: Path) -> None:
    job = submit(cluster, work, "mistake", "--nodes=1", "--nodelist=n6", launcher="die", more=("optim.lrr=1",))
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "did you mean lr?" in said(work, "mistake") and "srun" not in said(work, "mistake")


def test_finished_although_asked_to_stop(cluster: SlurmCluster, work: Path) -> None:
    job = submit(cluster, work, "late", "--nodes=1", "--nodelist=n6", launcher="finish_late")
    until(lambda: "1 nodes" in said(work, "late"), "the job to train")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0")


def test_ranks_that_were_told_to_end_and_not_their_shell_queue_again(cluster: SlurmCluster, work: Path) -> None:
    """As a preemption does that sends no USR1; and the controller is away when the job asks."""
    job = submit(
        cluster, work, "told", "--nodes=1", "--nodelist=n6", launcher="direct", LAUNCHER_OF_RESTART="deaf",
        AWAY=f"{work}/away", PATIENCE_S="0.1",
    )  # fmt: skip
    until(lambda: last_step(work, "told") > 0, "the job to train")
    cluster.run("scancel", "--signal=TERM", job)
    until(lambda: "start 1] 1 nodes" in said(work, "told"), "the job to train again")
    assert (work / f"runs/told/jobs/{job}.0/outcome").read_text().startswith("interrupted: ")
    assert (work / "away").exists() and "attempt 1 of 20: squeue fails" in said(work, "told")
    cluster.run("scancel", job)


def test_cancelled_stays_cancelled(cluster: SlurmCluster, work: Path) -> None:
    job = submit(cluster, work, "cancelled", "--nodes=1", "--nodelist=n6", launcher="deaf")
    until(lambda: "1 nodes" in said(work, "cancelled"), "the job to train")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["JobState"] == "CANCELLED"


def test_one_task_of_an_array_queues_again_alone(cluster: SlurmCluster, work: Path) -> None:
    """ablate.sh; also the cap on requeues, and a stop that a person asks for."""
    names = ("first", "second")
    runs = [" ".join(f"'{word}'" for word in run_of(work, name)) for name in names]
    (work / "list").write_text("# two runs\n\n" + "\n".join(runs) + "\n")
    array = cluster.submit(
        "--array=1-2", "--cpus-per-task=1", "--nodelist=n6", f"--output={work}/%a.out", "slurm/ablate.sh",
        str(work / "list"), env=environment(work, "obey") | {"MAX_REQUEUES": "1"},
    )  # fmt: skip
    for task in ("1", "2"):
        until(lambda task=task: "start 0] 1 nodes" in said(work, task), f"task {task} to train")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
    until(lambda: "start 1] 1 nodes" in said(work, "1"), "task 1 to train again")
    assert cluster.job(f"{array}_2")["JobState"] == "RUNNING" and cluster.job(f"{array}_2")["Restarts"] == "0"
    (work / "runs/second/stop").touch()
    assert cluster.wait_for(f"{array}_2", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
    ended = cluster.wait_for(f"{array}_1", "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1") and "MAX_REQUEUES" in said(work, "1")


def test_shards_are_made_by_an_array(cluster: SlurmCluster, work: Path) -> None:
    line = f"write pairs --src {work}/pairs --lq-dir lq --gt-dir gt --out {work}"
    (work / "parts").write_text(f"# parts\n{line}/first --select 1-6\n{line}/second --select 7-12\n")
    array = cluster.submit(
        "--array=1-2", "--cpus-per-task=1", f"--output={work}/shards%a.out", "slurm/shards.sh", f"{work}/parts",
        env=environment(work, "die"),
    )  # fmt: skip
    for task, part in (("1", "first"), ("2", "second")):
        ended = cluster.wait_for(f"{array}_{task}", "COMPLETED", "FAILED")
        assert ended["JobState"] == "COMPLETED", said(work, f"shards{task}")
        assert load_manifest(work / part).num_samples == 6


def test_the_doctor_knows_this_cluster(cluster: SlurmCluster) -> None:
    script = (
        "from pathlib import Path; from launch.doctor_slurm import *; print(*check_slurm(Path('runs'), []), sep='\\n')"
    )
    told = cluster.run(sys.executable, "-c", script, env={"SBATCH_TIMELIMIT": "2-00"})
    for words in ("SLURM 2", "train, 6 nodes of 0 GPUs", "2-00 is above train's limit of 24 h", "USR1, 300 s"):
        assert words in told, told


def test_a_job_that_its_time_limit_ends_queues_again(cluster: SlurmCluster, work: Path, deaf: str) -> None:
    until(lambda: cluster.job(deaf)["Restarts"] == "1", "the time limit", timeout_s=150)
    assert "got USR1" in said(work, "deaf") and "got TERM" in said(work, "deaf")
    cluster.run("scancel", deaf)


# ------------------------------------------------------------------------------------- a run, interrupted in every way


def test_interrupted_in_every_way_ends_in_the_same_weights(
    cluster: SlurmCluster, work: Path, uninterrupted: str
) -> None:
    job = submit(
        cluster, work, "broken", "--nodes=2", "--exclusive", f"--exclude={OTHERS}", "--time=60", "--signal=B:USR1@600",
        launcher="direct", LAUNCHER_OF_RESTART="accelerate", MAX_FAILURES="9",
    )  # fmt: skip
    begun = time.monotonic()

    def phase(number: int, *, steps: int) -> None:
        """Wait until the job's start `number` has done some steps."""
        until(lambda: f"start {number}] 2 nodes" in said(work, "broken"), f"start {number}")
        first = last_step(work, "broken")
        until(lambda: last_step(work, "broken") >= first + steps, f"steps of start {number}")
        print(f"{time.monotonic() - begun:.0f} s: start {number} trains, step {last_step(work, 'broken')}")

    # USR1 ten minutes before the time limit. SLURM looks twice a minute: hold the ranks until then.
    phase(0, steps=3)
    ranks = cluster.processes("-m launch.train", "name=broken")
    for process in ranks:
        process.suspend()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    until(lambda: "start 0] got USR1" in said(work, "broken"), "the time limit's signal", timeout_s=90)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    for process in ranks:
        process.resume()

    phase(1, steps=3)  # under accelerate: SIGTERM to every process, loader workers and launcher included
    cluster.run("scontrol", "requeue", job)

    phase(2, steps=3)
    nodes = cluster.job(job)["NodeList"]
    urgent = cluster.submit("--partition=urgent", "--exclusive", "--nodes=2", f"--nodelist={nodes}", "--wrap=true",
                            f"--output={work}/urgent.out")  # fmt: skip
    assert cluster.wait_for(urgent, "COMPLETED")["NodeList"] == nodes

    phase(3, steps=12)  # a checkpoint later
    (second,) = set(cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()) - {
        cluster.job(job)["BatchHost"]
    }
    cluster.pull_plug(second)

    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", said(work, "broken")
    print(f"{time.monotonic() - begun:.0f} s: finished")
    assert cluster.wait_for(uninterrupted, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", said(work, "whole")

    log = said(work, "broken")
    for words in ("USR1 from SLURM", "SIGTERM to rank", "queues again", "finished: "):
        assert words in log, (words, log)
    same_end(work, "whole", "broken")


def same_end(work: Path, one: str, other: str) -> None:
    """Equal weights, moments and record, and no step of it missing or told twice."""
    last = f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "ema.safetensors", "moments.safetensors"):
        assert (work / "runs" / one / last / file).read_bytes() == (work / "runs" / other / last / file).read_bytes()
    records = [losses(work / "runs" / name / "metrics.jsonl") for name in (one, other)]
    assert [line["step"] for line in records[0]] == list(range(3, STEPS + 1, 3))
    assert records[0] == records[1]


def losses(path: Path) -> list[dict[str, float]]:
    """The lines that tell of losses, as they stand in the file, without what was measured of time and memory."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in lines
        if "loss/total" in line
    ]


def test_a_start_keeps_what_it_was(cluster: SlurmCluster, work: Path, uninterrupted: str) -> None:
    assert cluster.wait_for(uninterrupted, "COMPLETED", "FAILED")["Restarts"] == "0"
    kept = work / f"runs/whole/jobs/{uninterrupted}.0"
    assert {path.name for path in kept.iterdir()} == {"config.yaml", "sbatch.txt", "code.tar.gz", "outcome"}
    assert "sbatch --nodes=2 --partition=train slurm/train.sh configs/demo.yaml name=whole" in (
        (kept / "sbatch.txt").read_text()
    )
    assert f"step-{STEPS:08d}" in (kept / "outcome").read_text()


def test_a_finished_run_says_so_and_is_not_requeued(cluster: SlurmCluster, work: Path, uninterrupted: str) -> None:
    cluster.wait_for(uninterrupted, "COMPLETED")
    weights = (work / f"runs/whole/checkpoints/step-{STEPS:08d}/model.safetensors").stat()
    job = submit(
        cluster, work, "whole", f"--nodelist={OTHERS}", "--nodes=2", f"--output={work}/again.out", launcher="direct"
    )
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0") and "is finished" in said(work, "again")
    assert (work / f"runs/whole/checkpoints/step-{STEPS:08d}/model.safetensors").stat() == weights


def test_two_nodes_evaluate_a_run(cluster: SlurmCluster, work: Path, uninterrupted: str) -> None:
    cluster.wait_for(uninterrupted, "COMPLETED")
    job = cluster.submit(
        "--nodes=2", f"--nodelist={OTHERS}", "--cpus-per-task=1", f"--output={work}/evaluate.out", "slurm/evaluate.sh",
        f"{work}/runs/whole", f"{work}/train", "--json", f"{work}/scores.json", env=environment(work, "direct"),
    )  # fmt: skip
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", said(work, "evaluate")
    assert len({row["key"] for row in json.loads((work / "scores.json").read_text())["pictures"]}) == 12


def test_a_wrong_address_fails_as_on_a_cluster(cluster: SlurmCluster, work: Path) -> None:
    job = submit(
        cluster, work, "wrong", "--nodes=2", f"--nodelist={OTHERS}", launcher="direct",
        more=("engine={hang_timeout_s: 20, slow_timeout_s: 20}",), HEAD_ADDRESS="127.0.0.1", MAX_FAILURES="1",
    )  # fmt: skip
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "FAILED"
    assert not (work / "runs/wrong/metrics.jsonl").exists()

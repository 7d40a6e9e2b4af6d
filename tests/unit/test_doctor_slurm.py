"""`launch.doctor --slurm` finds each line that does not fit the cluster. The cluster's answers are made up."""

from pathlib import Path

import pytest

from launch import doctor_slurm
from launch.doctor import Finding, Findings
from tests.helpers.slurm import ROOT

pytestmark = pytest.mark.unit

SINFO = """\
cpu*|1-00:00:00|(null)|40
gpu|2-00:00:00|gpu:a100:8(S:0-1)|6
gpu|2-00:00:00|gpu:a100:4,lustre:1|2
"""


def found(findings: Findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture
def partitions(monkeypatch: pytest.MonkeyPatch) -> list[doctor_slurm.Partition]:
    monkeypatch.setattr(doctor_slurm, "_ask", lambda *command: SINFO)
    return doctor_slurm._partitions()


def claims(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    """Those of the script as it is, and what a user exports."""
    for name, value in variables.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    return doctor_slurm.read_claims((ROOT / "slurm/train.sh").read_text())


def test_partitions_are_read_with_the_gpus_of_their_nodes(partitions: list[doctor_slurm.Partition]) -> None:
    assert [(each.name, each.is_default, each.gpus_per_node, each.nodes) for each in partitions] == [
        ("cpu", True, 0, 40),
        ("gpu", False, 8, 8),
    ]


@pytest.mark.parametrize(
    ("variables", "subject", "status", "words"),
    [
        ({}, "gpus", "ok", "0 on each of 1 nodes"),
        ({"PARTITION": "gpus"}, "partition", "FAIL", "'gpus' is not among cpu, gpu"),
        ({"PARTITION": "gpu"}, "gpus", "warn", "would train on CPUs"),
        ({"PARTITION": "gpu", "GPUS_PER_NODE": "a100:8"}, "gpus", "ok", "8 on each"),
        ({"GPUS_PER_NODE": "8"}, "gpus", "FAIL", "8 a node are claimed, and nodes of cpu have 0"),
        ({"TIMELIMIT": "2-12"}, "time", "FAIL", "above cpu's limit of 24 h"),
    ],
)
def test_claims_are_compared_with_the_partition(
    monkeypatch: pytest.MonkeyPatch,
    partitions: list[doctor_slurm.Partition],
    variables: dict[str, str],
    subject: str,
    status: str,
    words: str,
) -> None:
    finding = found(doctor_slurm.check_partition(claims(monkeypatch, **variables), partitions, []))[subject]
    assert finding.status == status and words in finding.detail


def test_a_run_that_the_gpus_cannot_share_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: r\ndata: {train: somewhere}\noptim: {global_batch: 8}\n")
    (finding,) = doctor_slurm.check_batches([path], world=16)
    assert finding.status == "FAIL" and "cannot be shared by 16 ranks" in finding.detail
    (finding,) = doctor_slurm.check_batches([path], world=4)
    assert finding.status == "ok" and "2 samples a pass on each of 4 ranks" in finding.detail


@pytest.mark.parametrize(
    ("account", "status", "words"),
    [("", "warn", "yours are alpha, beta"), ("gamma", "FAIL", "not among yours"), ("beta", "ok", "beta")],
)
def test_the_account_is_one_of_the_users(
    monkeypatch: pytest.MonkeyPatch, account: str, status: str, words: str
) -> None:
    monkeypatch.setattr(doctor_slurm, "_ask", lambda *command: "beta\nalpha\nbeta\n")
    settings = {"AccountingStorageEnforce": "associations,limits"}
    (finding,) = doctor_slurm.check_account(claims(monkeypatch, ACCOUNT=account), settings)
    assert finding.status == status and words in finding.detail


def test_signals_must_reach_the_batch_shell_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    preempting = {"PreemptType": "preempt/qos", "KillWait": "30 sec"}
    told = found(doctor_slurm.check_signals(claims(monkeypatch), preempting))
    assert told["signal"].status == "ok" and told["preemption"].status == "warn"
    told = found(doctor_slurm.check_signals(claims(monkeypatch, SIGNAL="USR1@300"), {}))
    assert told["signal"].status == "FAIL" and told["preemption"].status == "ok"
    told = found(doctor_slurm.check_signals(claims(monkeypatch, SIGNAL="B:USR1@600", TIMELIMIT="10"), {}))
    assert told["signal"].status == "FAIL"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-00:30", 88200), ("infinite", float("inf"))],
)
def test_slurms_ways_to_write_a_time(time: str, seconds: float) -> None:
    assert doctor_slurm.seconds(time) == seconds


def test_the_environment_must_find_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MAX_FAILURES", "three")
    monkeypatch.setenv("VIRTUAL_ENV", "/nowhere")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (finding,) = doctor_slurm.check_environment()
    assert finding.status == "FAIL" and "no python or accelerate" in finding.detail
    monkeypatch.delenv("VIRTUAL_ENV")
    if (ROOT / ".venv/bin/accelerate").exists():
        told = found(doctor_slurm.check_environment())
        assert told["MAX_FAILURES"].status == "FAIL" and told["slurm/env.sh"].status == "ok"

"""Where time goes, who lags, what a sample costs, and how a rank that stands still ends."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import spans as spans_module
from dist_train.spans import Spans, spend_in
from dist_train.tasks import sample_flops
from dist_train.watch import Stragglers, Watch, peak_tflops
from tests.helpers.tasks import tiny_run, tiny_task

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(spans_module.time, "perf_counter", lambda: self.now)

    def goes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_phases_take_their_time_from_those_around_them_and_add_up(clock: Clock) -> None:
    spans = Spans()
    for _ in range(400):  # more marks than are kept
        with spans("backward"):
            clock.goes(1)
            with spans("communication"):
                clock.goes(2)
                assert spans.phase == "communication"
            clock.goes(3)
        clock.goes(4)
    spent = spans.take()
    assert {phase: tuple(taken) for phase, taken in spent.items()} == {
        "backward": (1600, 400), "communication": (800, 400), "other": (1600, 0),
    }  # fmt: skip
    assert spans.take() == {"other": (0, 0)}


def test_what_is_no_part_of_a_step_is_taken_by_itself_with_all_that_lies_in_it(clock: Clock) -> None:
    spans = Spans()
    with spans("student"):
        clock.goes(1)
    assert spans.take(["checkpoint"]) == {}
    with spans("checkpoint"):
        clock.goes(2)
        with spans("communication"):
            clock.goes(5)
    assert spans.take(["checkpoint"])["checkpoint"].seconds == 7
    assert {phase for phase, spent in spans.take().items() if spent.seconds} == {"student"}


def test_methods_count_for_the_last_one_who_asked(clock: Clock) -> None:
    class Backend:
        def reduce(self, seconds: float) -> str:
            clock.goes(seconds)
            return "reduced"

    backend, first, second = Backend(), Spans(), Spans()
    spend_in(first, "communication", backend, ["reduce"])
    spend_in(second, "communication", backend, ["reduce"])
    assert backend.reduce(3) == "reduced"
    assert second.take()["communication"].seconds == 3 and "communication" not in first.take()


def test_an_exception_leaves_the_name_of_its_phase() -> None:
    spans = Spans()
    with pytest.raises(RuntimeError), spans("backward"), spans("communication"):
        raise RuntimeError
    assert spans.broke_in == "communication" and spans.phase == "other"


def test_a_lap_gives_seconds_a_step_that_add_up(clock: Clock, tmp_path: Path) -> None:
    spans = Spans()
    clock.goes(50)  # starting
    watch = Watch(tiny_run(tmp_path), CPU, spans, sample_flops=3e12)
    for step in (1, 2):
        with watch.step(step):
            with spans("data"):
                clock.goes(1)
            with spans("student"):
                clock.goes(3)
        if step == 1:
            with spans("validation"):
                clock.goes(40)
            assert watch.aside() == {"time/validation_s": 40}
    lap = watch.lap({"total": 0.5})
    assert lap.pop("memory/host_gib") > 0.05
    assert lap == {
        "time/step_s": 4, "time/data_s": 1, "time/student_s": 3, "time/other_s": 0, "time/samples_per_s": 1.0,
        "time/tflops": 3.0,
    }  # fmt: skip


def test_the_sign_of_life_is_rare_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    run.dir.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    watch = Watch(run, CPU, Spans(), sample_flops=1.0)
    for step in (1, 2):  # within seconds
        with watch.step(step):
            pass
    told = json.loads((run.dir / "heartbeat.json").read_text())
    assert (told["step"], told["steps"], told["loss"], told["job"]) == (1, 8, None, "7")
    watch.lap({"total": -3.5})
    with watch.step(8):  # the last
        pass
    told = json.loads((run.dir / "heartbeat.json").read_text())
    assert (told["step"], told["loss"]) == (8, -3.5)


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(tmp_path, track={"profile": {"from_step": 1, "steps": 1}})
    (run.dir / "trace-rank0.json.gz").mkdir(parents=True)  # in its place
    with Watch(run, CPU, Spans(), sample_flops=1.0).step(1):
        pass
    assert "trace-rank0.json.gz could not be written" in caplog.text


def test_a_rank_that_lags_three_times_in_a_row_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    stragglers, hosts = Stragglers(), ["n1", "n1", "n2", "n2"]
    fine = {"data": 0.1, "prior": 0.9}
    slow = {"data": 0.2, "prior": 1.9}
    assert stragglers.note(["n1"], [fine]) == {}
    with caplog.at_level(logging.WARNING):
        for ranks in ([fine, fine, slow, fine], [fine, fine, slow, fine], [slow, fine, fine, fine]):
            told = stragglers.note(hosts, ranks)
        assert told == {"time/spread": pytest.approx(2.1), "time/slowest_rank": 0} and not caplog.messages
        for _ in range(5):
            stragglers.note(hosts, [fine, fine, slow, fine])
    (message,) = caplog.messages
    assert message.startswith(
        "rank 2 on n2 keeps the others waiting: 2.1 s a step of its own where the median rank has 1 s"
    )
    assert message.endswith("most of it in prior")
    for _ in range(5):  # between two ranks, the faster is the measure
        told = Stragglers().note(["n1", "n1"], [fine, slow])
    assert told["time/spread"] == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_name(gpu: str, tflops: float | None) -> None:
    assert peak_tflops(gpu) == tflops


def test_flops_of_a_sample_are_those_of_its_convolutions(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, task="plain")
    task = tiny_task(run)
    macs = 0

    def add(conv: torch.nn.Conv2d, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * conv.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in task.modules() if isinstance(m, torch.nn.Conv2d)]
    flops = sample_flops(task, run, CPU)
    assert macs > 0 and flops == 3 * 2 * macs and task.training
    for hook in hooks:
        hook.remove()
    both = sample_flops(tiny_task(tiny_run(tmp_path)), tiny_run(tmp_path), CPU)
    assert both > 2 * flops  # the teacher is a student with units


STANDS_STILL = """
import sys, time
from pathlib import Path
from dist_train.spans import Spans
from dist_train.watchdog import Watchdog
from tests.helpers.tasks import tiny_run

spans = Spans()
run = tiny_run(Path(sys.argv[1]), engine={"hang_timeout_s": 1000.0, "slow_timeout_s": 0.5})
with Watchdog(run, spans) as watchdog:
    watchdog.expect("step 3")
    time.sleep(1.5)
    watchdog.expect("after step 3", slow=True)
    with spans("checkpoint"):
        time.sleep(1000)
"""


def test_a_rank_that_stands_still_ends_with_its_last_words(tmp_path: Path) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-c", STANDS_STILL, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and time.monotonic() - begun < 60, done.stderr
    (file,) = (tmp_path / "tiny/stacks").glob("*/rank0.txt")
    words, _, stack = file.read_text().partition("\n")
    assert words.endswith("after step 3, in checkpoint: this has taken more than 0.5 s (engine.slow_timeout_s)")
    assert words.startswith("rank 0 on ") and words in done.stderr
    assert 'File "<string>", line 15' in stack and stack in done.stderr

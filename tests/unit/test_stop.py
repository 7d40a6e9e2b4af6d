"""Whoever asks a run to stop is heard, and asked no more afterwards."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from dist_train.config import BatchPlan, DataConfig
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader
from dist_train.stop import StopRequests
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def test_the_file_is_seen_and_taken_away_once_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with StopRequests(tmp_path) as stop:
        assert not stop.agreed()
        (tmp_path / "stop").write_text("the power goes\n")
        assert stop.agreed() and "the power goes" in caplog.text
    assert not (tmp_path / "stop").exists()


def test_the_file_stays_when_the_run_could_not_save(tmp_path: Path) -> None:
    with pytest.raises(OSError), StopRequests(tmp_path) as stop:
        (tmp_path / "stop").touch()
        assert stop.agreed()
        raise OSError("disk full")
    assert (tmp_path / "stop").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["no text", "a folder"])
def test_a_file_that_cannot_be_read_asks_all_the_same(tmp_path: Path, content: bytes | None) -> None:
    with pytest.raises(OSError), StopRequests(tmp_path) as stop:
        (tmp_path / "stop").mkdir() if content is None else (tmp_path / "stop").write_bytes(content)
        assert stop.agreed()
        raise OSError  # nothing more to see


def test_whether_somebody_wants_it_to_rest_or_it_shall_go_on(tmp_path: Path) -> None:
    with StopRequests(tmp_path) as stop:
        assert not stop.agreed() and stop.ended == "finished"
        (tmp_path / "stop").touch()
        assert stop.agreed() and stop.ended == "stopped"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.ended == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_handled_as_before_later(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests(tmp_path) as stop:
        os.kill(os.getpid(), number)
        assert stop.agreed()
    assert signal.getsignal(number) == before


def test_a_rank_whose_launcher_dies_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    read, write = os.pipe()
    launcher = os.fork()  # rather than a new interpreter, which would take seconds to import torch
    if launcher == 0:
        if os.fork() == 0:
            with StopRequests(tmp_path) as stop:
                os.write(write, b"+" if stop.agreed() else b"-")
                deadline = time.monotonic() + 30
                while not stop.agreed() and time.monotonic() < deadline:
                    time.sleep(0.05)
                os.write(write, b"+" if stop.agreed() else b"-")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"-"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(read, 1) == b"+"


def test_sigterm_to_all_processes_leaves_the_loader_its_workers(tmp_path: Path) -> None:
    """A cluster sends it to them too, and the rank needs their batch to end its step."""
    write_pairs(make_pairs(tmp_path / "pairs", 4), tmp_path / "train")
    data = DataConfig(train=str(tmp_path / "train"), crop_px=16, workers=1)
    before = psutil.Process().children()
    with closing(training_batches(ShardReader(tmp_path / "train"), data, seed=0, plan=BatchPlan(2, 2, 1))) as batches:
        next(batches)
        (worker,) = set(psutil.Process().children()) - set(before)
        worker.terminate()
        for _ in range(5):  # more than lie ready
            next(batches)
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running()


RANK = """
import sys, time
import psutil
from dist_train.config import BatchPlan, DataConfig
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader

data = DataConfig(train=sys.argv[1], crop_px=128, workers=1)
batches = training_batches(ShardReader(sys.argv[1]), data, seed=0, plan=BatchPlan(4, 4, 1))
next(batches)
print(psutil.Process().children()[0].pid, flush=True)
time.sleep(60)
"""


def test_a_loaders_worker_ends_with_its_rank(tmp_path: Path) -> None:
    """Also while it holds more than fits on the way to a rank that fetches no more."""
    write_pairs(make_pairs(tmp_path / "pairs", 4, h=128, w=128), tmp_path / "train")
    command = [sys.executable, "-c", RANK, str(tmp_path / "train")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        worker = psutil.Process(int(rank.stdout.readline()))
        time.sleep(1)
        rank.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()

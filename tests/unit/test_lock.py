"""One writer for a run's folder: a living owner is named, a dead one replaced, a lost folder noticed."""

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from dist_train import lock
from dist_train.lock import RunLock

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "SILENT_S", 1.0)
    monkeypatch.setattr(lock, "WAIT_S", 2.0)


def owned_by(folder: Path, **owner: object) -> Path:
    folder.mkdir()
    path = folder / "lock"
    path.write_text(json.dumps({"host": "n7", "pid": 1, "job": "12", "since": "noon", "machine": "elsewhere", **owner}))
    return path


def test_a_living_owner_is_waited_for_and_named(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ValueError, match=rf"process {os.getpid()} on .*touch {tmp_path}/stop"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):  # and free afterwards
        pass
    assert not tmp_path.exists()  # it was empty


def test_an_owner_about_to_end_is_waited_for(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.__enter__()
    threading.Timer(0.5, first.__exit__, (None, None, None)).start()
    with RunLock(tmp_path) as second:
        second.check()


def test_an_owner_on_this_machine_is_dead_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 1000.0)
    ended = subprocess.Popen(["true"])
    for name in ("zombie", "gone"):
        owned_by(tmp_path / name, machine=lock._machine(), pid=ended.pid)
        with RunLock(tmp_path / name) as taken:
            taken.check()
        ended.wait()


def test_an_owner_elsewhere_is_dead_when_silent_and_alive_when_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owned_by(tmp_path / "run")
    with RunLock(tmp_path / "run") as taken:
        taken.check()
    assert "process 1 on n7, SLURM job 12" in caplog.text
    path = owned_by(tmp_path / "alive")
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(path)

    threading.Thread(target=beat).start()
    try:
        with pytest.raises(ValueError, match="SLURM job 12, since noon"):
            RunLock(tmp_path / "alive").__enter__()
    finally:
        over.set()


def test_an_owner_that_was_replaced_writes_no_more(tmp_path: Path) -> None:
    with RunLock(tmp_path) as mine:
        mine.check()
        other = (tmp_path / "lock").read_text().replace("{", '{"token": 1, ', 1)
        (tmp_path / "lock").write_text(other)
        with pytest.raises(ValueError, match="has been taken over by another start"):
            mine.check()
    assert (tmp_path / "lock").read_text() == other  # and does not take the other's away


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="set out=FOLDER"):
        RunLock(tmp_path / "file" / "run").__enter__()

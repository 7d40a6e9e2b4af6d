"""Checkpoints: whole or absent, and the newest whole one is found."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from dist_train import checkpoint
from dist_train.resume import load_model
from shards.schema import sha256_of

pytestmark = pytest.mark.unit


def save(folder: Path, step: int, *, keep: int = 2, psnr: float | None = None) -> Path:
    weight = torch.full((2, 3), float(step))
    return checkpoint.save(
        folder / "checkpoints",
        state={"step": step, "note": "x", "scores": {} if psnr is None else {"psnr": psnr}},
        model={"student.w": weight},
        ema={"w": weight + 1},
        moments={"step": step, "scaler": None, **{key: {"student.w": weight + 2} for key in ("exp_avg", "exp_avg_sq")}},
        keep=keep,
        best_by="psnr",
    )


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    found = checkpoint.find(tmp_path)
    assert found is not None
    loaded = checkpoint.load(found)
    assert loaded.state["step"] == 3 and loaded.model["student.w"][0, 0] == 3 and loaded.ema is not None
    assert loaded.moments["step"] == 3 and loaded.moments["exp_avg"]["student.w"].shape == (2, 3)


def test_the_best_one_stays(tmp_path: Path) -> None:
    def kept() -> list[int]:
        return sorted(checkpoint.steps_on_disk(tmp_path))

    for step, psnr, expected in (
        (1, 30.0, [1]), (2, 31.0, [1, 2]), (3, 29.0, [2, 3]), (4, None, [2, 3, 4]), (5, 31.0, [2, 4, 5]),
        (6, float("nan"), [2, 5, 6]), (7, 32.0, [6, 7]), (8, 30.0, [7, 8]), (9, 30.0, [7, 8, 9]),
    ):  # fmt: skip
        save(tmp_path, step, psnr=psnr)
        assert kept() == expected
    (tmp_path / "checkpoints/step-00000007/state.json").write_text("{")
    save(tmp_path, 10)
    assert kept() == [8, 9, 10]  # 8 and 9 are equally good
    save(tmp_path, 8, psnr=1.0)  # the run went back; what came after is no longer its own
    assert kept() == [8]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / "model.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "MANIFEST.json").unlink()
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000001"
    shutil.rmtree(found)
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* move the folder away"):
        checkpoint.find(tmp_path)


def test_a_disk_that_fails_at_an_old_one_is_no_reason_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, newest = save(tmp_path, 1), save(tmp_path, 2)

    def fails(path: Path, *more: object) -> str:
        if path.parent == newest or path == first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", fails)
        assert checkpoint.find(tmp_path) == first and "cannot be read" in caplog.text  # while reading the newest
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        saved = save(tmp_path, 3)  # and while removing the first
    assert checkpoint.find(tmp_path) == saved and f"{first} could not be removed" in caplog.text
    save(tmp_path, 4)
    assert checkpoint.steps_on_disk(tmp_path) == [3, 4]


def test_what_only_looks_like_one_is_let_alone(tmp_path: Path) -> None:
    copy = shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoints/step-00000001.bak")
    assert checkpoint.steps_on_disk(tmp_path) == [1]
    assert save(tmp_path, 2, keep=1) == checkpoint.find(tmp_path) and copy.is_dir()


def test_none_at_all_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path / "new") is None
    assert checkpoint.find(tmp_path / "step-decay") is None  # the name of a run
    damaged = save(tmp_path, 1)
    (damaged / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match="is damaged: no readable MANIFEST"):
        checkpoint.find(damaged)


def test_a_step_back_drops_what_came_after(tmp_path: Path) -> None:
    """Damaged newer ones must not crowd out the good one just written."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        (tmp_path / f"checkpoints/step-{step:08d}/model.safetensors").write_bytes(b"")
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000001"
    saved = save(tmp_path, 2)
    assert checkpoint.find(tmp_path) == saved
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_killed_at_any_moment_of_a_save_the_newest_whole_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 before the first file operation of a save, before the second, and so on to its end."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine goes on, and waiting for the disk takes seconds
    for step in (1, 2):
        save(tmp_path / "before", step)
    moments: list[str] = []
    done = False
    while not done:
        run = shutil.copytree(tmp_path / "before", tmp_path / str(len(moments)))
        done = not _killed_in_save(run, 3, before=len(moments))
        found = checkpoint.find(run)
        assert found is not None
        moments.append(found.name)
        assert save(run, int(found.name[-1]) + 1) == checkpoint.find(run)  # the run goes on
        assert len(list((run / "checkpoints").iterdir())) == 2
    old = moments.index("step-00000003")
    assert 10 < old < len(moments) - 3  # files are written, synced and hashed; later, the oldest is removed
    assert moments == ["step-00000002"] * old + ["step-00000003"] * (len(moments) - old)


def _killed_in_save(folder: Path, step: int, *, before: int) -> bool:
    """Save in a process that kills itself before a file operation of this number; whether there were so many."""
    process = os.fork()
    if process == 0:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event == "open" or event.split(".")[0] in ("os", "shutil"):
                count += 1
                if count > before:
                    signal.raise_signal(signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            save(folder, step)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_full_disk_loses_nothing_whenever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    save(tmp_path, 1)
    calls = 0
    sync = checkpoint.sync

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        with pytest.raises(OSError, match=r"step-00000002 was not written: .*No space left.*start again"):
            save(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))  # it may be what fills the disk
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name in ("step-00000001", "step-00000002")
    assert save(tmp_path, 2) == save(tmp_path, 2) == checkpoint.find(tmp_path)


def test_a_file_that_may_not_grow_loses_nothing(tmp_path: Path) -> None:
    """The system's own refusal, through safetensors' own error."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"step-00000002 was not written: .*model.safetensors"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000001"


def test_other_nets_and_formats_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"of other nets.*bias is missing.*student.w is not in this run"):
        load_model(net, checkpoint.load(path))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"format": "older"}))
    with pytest.raises(ValueError, match="its format is 'older', and this code reads 'restill-checkpoint-1'"):
        checkpoint.find(path)
    with pytest.raises(ValueError, match="none of the 1 checkpoints .* the newest because its format is 'older'"):
        checkpoint.find(tmp_path)
    assert path.is_dir()

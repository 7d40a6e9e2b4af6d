"""Checkpoints: whole or absent, and the newest whole one is found."""

import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from dist_train import checkpoint

pytestmark = pytest.mark.unit


def save(folder: Path, step: int, *, keep: int = 2) -> Path:
    weight = torch.full((2, 3), float(step))
    return checkpoint.save(
        folder / "checkpoints",
        state={"step": step, "note": "x"},
        model={"student.w": weight},
        ema={"w": weight + 1},
        moments={"step": step, "scaler": None, **{key: {"student.w": weight + 2} for key in ("exp_avg", "exp_avg_sq")}},
        keep=keep,
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
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.find(tmp_path)


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


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_full_disk_loses_nothing_whenever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    save(tmp_path, 1)
    calls = 0
    sync = checkpoint._sync

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
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
        checkpoint.load_model(net, checkpoint.load(path))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"format": "older"}))
    with pytest.raises(ValueError, match="its format is not 'restill-checkpoint-1'"):
        checkpoint.find(path)

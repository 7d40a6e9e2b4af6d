"""Checkpoints: whole or absent, and the newest whole one is found."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

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
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest", "step-00000002", "step-00000003",
    ]  # fmt: skip
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == (tmp_path / "checkpoints/latest").read_text().strip()
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


def test_none_at_all_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path / "new") is None


@pytest.mark.parametrize("where", ["save_tensors", "_sync"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    save(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        with pytest.raises(OSError, match=r"step-00000002 was not written: .*No space left.*free the disk"):
            save(tmp_path, 2)
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000001"
    assert save(tmp_path, 2).exists()  # what the failed one left does not stand in the way
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_other_nets_and_formats_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"of other nets.*bias is missing.*student.w is not in this run"):
        checkpoint.load_model(net, checkpoint.load(path))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"format": "older"}))
    with pytest.raises(ValueError, match="its format is 'older'"):
        checkpoint.find(path)

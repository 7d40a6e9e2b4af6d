"""The doctor finds what is wrong, says how to mend it, and survives it."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from launch import doctor

pytestmark = pytest.mark.unit


def found(check) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in check}


@pytest.fixture
def broken_import(monkeypatch):
    """Make the import of one package fail with a given error."""
    real = importlib.import_module

    def break_it(module: str, error: Exception) -> None:
        def import_module(name: str):
            if name == module:
                raise error
            return real(name)

        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(doctor, "PACKAGES", {module: doctor.PACKAGES[module], "torch": "torch"})

    return break_it


def test_missing_libgl_is_explained(broken_import):
    broken_import("cv2", ImportError("libGL.so.1: cannot open shared object file: No such file or directory"))
    findings = found(doctor.check_packages())
    assert findings["cv2"].status == "FAIL" and "apt-get install libgl1" in findings["cv2"].mend
    assert "opencv-python-headless" in findings["cv2"].mend
    assert findings["torch"].status == "ok"


def test_a_package_that_breaks_on_import_is_reported(broken_import):
    broken_import("torchvision", RuntimeError("operator torchvision::nms does not exist"))
    finding = found(doctor.check_packages())["torchvision"]
    assert finding.status == "FAIL" and "different releases" in finding.mend


@pytest.mark.parametrize(("torch_version", "status"), [("2.15.0+cpu", "ok"), ("2.14.1", "FAIL")])
def test_torch_and_torchvision_must_match(monkeypatch, torch_version, status):
    versions = {"torch": torch_version, "torchvision": "0.29.2"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch==2.15.0", "pillow>=5.3"])
    assert found(doctor.check_torch_pair())["torch pair"].status == status


def test_a_gpu_that_torch_does_not_see_is_a_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(doctor.check_gpus())["gpu"].status in ("ok", "FAIL")  # by whether this machine has one
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert found(doctor.check_gpus())["gpu"].status == "FAIL"


def test_runs_folder_that_cannot_be_written(tmp_path):
    assert found(doctor.check_runs_folder(tmp_path / "new" / "runs")).popitem()[1].status != "FAIL"
    assert not (tmp_path / "new").exists()  # looking is not making
    (tmp_path / "file").touch()
    assert found(doctor.check_runs_folder(tmp_path / "file" / "runs")).popitem()[1].status == "FAIL"


def test_paths_say_what_they_are(tmp_path):
    (tmp_path / "run.yaml").write_text(f"name: r\ndata: {{train: {tmp_path}/none}}\noptim: {{lrr: 1}}\n")
    (tmp_path / "weights.pth").write_bytes(b"")
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 1, 1, 768)}, tmp_path / "sam.pth")
    for name, status, words in [
        ("run.yaml", "FAIL", "did you mean lr"),
        ("weights.pth", "FAIL", "not a readable PyTorch file"),
        ("sam.pth", "ok", "SAM vit_b"),
        ("nowhere", "FAIL", "no such file"),
        (".", "FAIL", "neither shards"),
    ]:
        finding = next(iter(doctor.check_path(tmp_path / name)))
        assert finding.status == status and words in finding.detail, name
    (tmp_path / "run.yaml").write_text(f"name: r\ndata: {{train: {tmp_path}/none}}\n")
    assert [finding.status for finding in doctor.check_path(tmp_path / "run.yaml")] == ["ok", "FAIL"]


def test_a_check_that_breaks_does_not_stop_the_doctor(monkeypatch, capsys, tmp_path):
    def explode():
        raise KeyError("odd")
        yield

    monkeypatch.setattr(doctor, "check_backends", explode)
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "torch"})
    assert doctor.main(["--runs", str(tmp_path / "runs")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL  backends") and "KeyError" in line for line in lines)
    assert any(line.startswith("ok    cores") for line in lines)
    assert lines[-1].endswith("problems")


def test_doctor_lives_where_nothing_is_installed(tmp_path):
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({(*doctor.PACKAGES, 'numpy', 'yaml')}))\n"
        "from launch import doctor; sys.exit(doctor.main(['x.yaml']))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(f"FAIL  {module} " in done.stdout for module in doctor.PACKAGES)

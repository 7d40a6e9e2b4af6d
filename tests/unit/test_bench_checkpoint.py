"""`python -m launch.bench checkpoint`: a table of what was measured, and nothing left behind."""

import re
from pathlib import Path

import pytest

from launch.bench.__main__ import main

pytestmark = pytest.mark.unit


def test_a_checkpoint_is_written_verified_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("""
name: tiny
data: {train: unused}
student: {name: nafnet, width: 4, enc_blk_nums: [1], dec_blk_nums: [1]}
""")
    options = ["--folder", str(tmp_path / "disk"), "--rounds", "2", "--minutes", "0.5"]
    assert main(["checkpoint", str(config), "student.width=8", *options]) == 0
    said = capsys.readouterr().out
    rows = {what: float(seconds) for what, seconds in re.findall(r"^(write|verify|load) +([\d.]+)", said, re.MULTILINE)}
    assert rows.keys() == {"write", "verify", "load"}
    (share,) = re.findall(r"([\d.]+)%", said)
    assert float(share) / 100 == pytest.approx(rows["write"] / 30, abs=1e-4)
    assert not list((tmp_path / "disk").iterdir())
    assert main(["checkpoint", str(config), "--rounds", "0"]) == 2

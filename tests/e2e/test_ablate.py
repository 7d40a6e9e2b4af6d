"""The ladder with the real commands: two rungs are trained, compared, drawn, and not trained twice."""

import json
from pathlib import Path

import pytest

from shards.codec import decode_rgb
from tests.e2e.test_main_job import python
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.e2e


def test_two_rungs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_pairs(make_pairs(tmp_path / f"{split}_pairs", 4, h=40, w=48), tmp_path / split, split=split)
    (tmp_path / "run.yaml").write_text(f"""
name: full
data: {{train: {tmp_path}/train, val: {tmp_path}/val, crop_px: 32, workers: 0}}
student: {{name: nafnet, width: 4, enc_blk_nums: [1], dec_blk_nums: [1]}}
prior: {{name: regions, num_masks: 8, scale: 50, min_area_px: 16}}
loss: {{spd: {{weight: 0.05}}}}
optim: {{steps: 3, global_batch: 2, lr: 1e-3}}
track: {{every: 1, pictures_every: 0, progress: false}}
""")
    out = tmp_path / "ablation"
    command = ["launch.ablate", str(tmp_path / "run.yaml"), "--rungs", "plain", "teacher", "--out", str(out)]
    said = python(*command, "--jobs", "2")
    assert "| plain | student alone |" in said and "| teacher | + cascaded teacher |" in said
    rows = {row["variant"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    # Neither term is on, so that the teacher's student has learned what a plain one learns.
    assert rows["teacher"]["gains"]["student/psnr"]["mean"] == pytest.approx(0, abs=1e-4)
    assert rows["teacher"]["means"]["lead/psnr"]["mean"] == pytest.approx(
        rows["teacher"]["gains"]["teacher/psnr"]["mean"]
    )
    for name in ("ladder", "crops"):
        assert decode_rgb((out / f"{name}.png").read_bytes()).any()

    before = (out / "teacher-s0/metrics.jsonl").stat().st_mtime_ns
    assert "2 runs, 0 of them to be trained" in python(*command)
    assert (out / "teacher-s0/metrics.jsonl").stat().st_mtime_ns == before

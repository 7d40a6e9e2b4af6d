"""A student that sees masks, by the real commands: masks are stored, two ranks train, and all who score it agree."""

import json
from pathlib import Path

import pytest

from dist_train.track import read_metrics
from tests.e2e.test_main_job import LAUNCH, python, run
from tests.helpers.pairs import write_pairs
from tests.helpers.rectangles import make_rectangles

pytestmark = pytest.mark.e2e


def test_masks_are_stored_a_student_learns_with_them_and_its_score_stays_what_it_was(tmp_path: Path) -> None:
    write_pairs(make_rectangles(tmp_path / "pairs", 5), tmp_path / "plain")
    masks = ("--prior", "regions", "--with", "scale=50", "min_area_px=16", "num_masks=20")
    python("shards", "masks", str(tmp_path / "plain"), "--out", str(tmp_path / "set"), *masks)
    (tmp_path / "run.yaml").write_text(f"""
name: deblur
out: {tmp_path}/runs
task: conditioned
conditioning: {{method: map}}
data: {{train: {tmp_path}/set, val: {tmp_path}/set, crop_px: 24, workers: 1}}
student: {{name: efficientderain, base_width: 4}}
prior: {{name: stored, num_masks: 12}}
optim: {{steps: 2, global_batch: 4, lr: 1e-3, schedule: constant}}
track: {{every: 1, pictures_every: 2}}
""")
    run(*LAUNCH, "-m", "launch.train", str(tmp_path / "run.yaml"))
    record = read_metrics(tmp_path / "runs/deblur")
    validated = next(line for line in record if "val/rgb/psnr/student" in line)["val/rgb/psnr/student"]
    assert all(line["prior/masks_per_picture"] > 1 for line in record if "loss/total" in line)
    assert list((tmp_path / "runs/deblur/pictures").rglob("*.png"))
    python("launch.export", str(tmp_path / "runs/deblur"), str(tmp_path / "student.safetensors"))
    for weights in ("runs/deblur", "student.safetensors"):
        report = tmp_path / "report.json"
        python("launch.evaluate", str(tmp_path / weights), str(tmp_path / "set"), "--json", str(report))
        assert json.loads(report.read_text())["means"]["val/rgb/psnr/student"] == pytest.approx(validated, abs=1e-4)
    assert "--prior regions" in python("launch.evaluate", str(tmp_path / weights), str(tmp_path / "plain"), code=2)

"""The real command on a GPU, in every precision: losses stay finite and the step happens."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_train.track import read_metrics
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: half precision cannot be trained here"),
]


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2), ("fp16", 2), ("fp16", 3)])
def test_two_steps_that_move_the_losses(tmp_path: Path, precision: str, stage: int) -> None:
    write_pairs(make_pairs(tmp_path / "pairs", 8, h=40, w=48), tmp_path / "train")
    (tmp_path / "run.yaml").write_text(f"""
name: gpu
out: {tmp_path}
data: {{train: {tmp_path}/train, crop_px: 32}}
student: {{name: nafnet, width: 8, enc_blk_nums: [1, 1], dec_blk_nums: [1, 1]}}
prior: {{name: regions, num_masks: 8, scale: 50, min_area_px: 16}}
features: {{arch: vgg19_16x, weights: random, layer: relu2_2}}
loss: {{sgr: {{weight: 1.0, normalize: true}}}}
optim: {{steps: 40, global_batch: 4, lr: 1e-3}}
engine: {{device: cuda, precision: {precision}, zero_stage: {stage}}}
track: {{every: 1}}
""")
    subprocess.run([sys.executable, "-m", "launch.train", str(tmp_path / "run.yaml")], check=True, timeout=300)
    losses = [line["loss/total"] for line in read_metrics(tmp_path / "gpu") if "loss/total" in line]
    assert len(losses) > 20 and all(math.isfinite(loss) for loss in losses)  # fp16 may skip some while it seeks a scale
    assert losses[-1] < losses[0]

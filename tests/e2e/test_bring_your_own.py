"""README's "Bring your own net" to the letter: a net opened by spandrel is distilled, exported and restores."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from dist_train.config import NafnetConfig
from dist_train.nets import build_net
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def blocks() -> tuple[str, str]:
    """The section's Python and YAML."""
    section = (ROOT / "README.md").read_text().split("## Bring your own net")[1].split("\n## ")[0]
    python, settings = re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.S)
    return python, settings


def test_the_readme_needs_at_most_twenty_lines() -> None:
    assert sum(bool(line.strip()) for block in blocks() for line in block.splitlines()) <= 20


def test_a_net_loaded_by_spandrel_is_distilled_exported_and_restores(tmp_path: Path) -> None:
    pytest.importorskip("spandrel", reason="spandrel, which the README's example uses, is not installed")
    code, settings = blocks()
    (tmp_path / "my_nets.py").write_text(code)
    torch.manual_seed(0)
    net = build_net(NafnetConfig(width=4, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    write_pairs(make_pairs(tmp_path / "pairs", 4, h=40, w=48), tmp_path / "shards", split="train")
    run = yaml.safe_load(settings) | {
        "name": "mine",
        "out": str(tmp_path / "runs"),
        "data": {"train": str(tmp_path / "shards"), "crop_px": 32, "workers": 0},
        "prior": {"name": "regions", "num_masks": 4, "scale": 50, "min_area_px": 16},
        "loss": {"sgr": {"weight": 0}},
        "optim": {"steps": 2, "global_batch": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def python(*arguments: str) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    python("launch.train", "run.yaml")
    python("launch.export", "runs/mine", "mine.safetensors")
    picture = next((tmp_path / "pairs").rglob("*.png"))
    python("launch.restore", "mine.safetensors", str(picture), "out.png")
    assert cv2.imread(str(tmp_path / "out.png")).shape == (40, 48, 3)

"""Folders of runs that look trained: a checkpoint of random weights, a record, no training."""

import json
from pathlib import Path

import torch

from dist_train import checkpoint
from dist_train.config import dump_run
from tests.helpers.tasks import tiny_run, tiny_task

STEP = 8


def make_run(root: Path, name: str, *, val: Path | None, metrics: list[dict[str, float]], **sections: object) -> Path:
    """A run's folder with one checkpoint, whose averaged student is not its student; see `tiny_run`."""
    data = {"val": str(val) if val else None}
    run = tiny_run(root, **{"features": {}, "loss": {"sgr": {"weight": 0.0}}, "data": data, **sections})
    folder = root / name
    weights = {key: tensor.clone() for key, tensor in tiny_task(run).state_dict().items()}
    student = {key.removeprefix("student."): t for key, t in weights.items() if key.startswith("student.")}
    average = {
        key: t + 0.02 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for key, t in student.items()
    }
    checkpoint.save(
        folder / "checkpoints",
        state={"step": STEP, "samples_seen": 32, "config": run.model_dump(mode="json")},
        model=weights,
        ema=average,
        moments={"step": STEP, "scaler": None},
        keep=2,
    )
    (folder / "config.yaml").write_text(dump_run(run))
    (folder / "env.json").write_text(json.dumps([{"commit": "c0ffee", "world_size": 1, "parameters": {"student": 7}}]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder

"""What a run writes about itself before its first step, so that every result explains itself."""

import json
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_train import ranks
from dist_train.config import RunConfig, dump_run
from shards.files import write_whole

PACKAGES = (
    "torch", "torchvision", "deepspeed", "accelerate", "segment-anything", "webdataset", "wandb", "numpy", "scipy",
    "scikit-image", "opencv-python", "safetensors",
)  # fmt: skip


def environment(device: torch.device, **more: Any) -> dict[str, Any]:
    """Code, versions, machines and world of this run, and `more` on top. All ranks call."""
    return {
        "commit": commit(),
        "argv": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hosts": sorted(set(ranks.gather_objects(socket.gethostname()))),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": ranks.world_size(),
        "threads": torch.get_num_threads(),
        **more,
    }


def commit() -> str:
    """Git commit of the code, with `-dirty` if it was changed since; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def write_record(run: RunConfig, env: dict[str, Any]) -> None:
    """config.yaml (resolved, reloadable) and env.json in the run's folder; for the main rank.

    env.json is a list, one entry for each start of the run.

    Raises:
        OSError: the folder cannot be written.
    """
    path = run.dir / "env.json"
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
        write_whole(run.dir / "config.yaml", dump_run(run))
        write_whole(path, json.dumps([*starts, env], indent=1, default=str))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Mend it or move it away") from error
    except OSError as error:
        raise OSError(f"the run's folder {run.dir} cannot be written: {error}; mend it, or set out=FOLDER") from error


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"

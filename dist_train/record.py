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

PACKAGES = ("torch", "torchvision", "deepspeed", "accelerate", "segment-anything", "webdataset", "wandb", "numpy")


def environment(**more: Any) -> dict[str, Any]:
    """Code, versions, machine and world of this process, and `more` on top."""
    return {
        "commit": commit(),
        "argv": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
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
    """config.yaml (resolved, reloadable) and env.json in the run's folder. All ranks call, the main one writes.

    Raises:
        OSError: on every rank, if the folder cannot be written.
    """
    problem = None
    if ranks.is_main():
        try:
            run.dir.mkdir(parents=True, exist_ok=True)
            (run.dir / "config.yaml").write_text(dump_run(run))
            (run.dir / "env.json").write_text(json.dumps(env, indent=1, default=str))
        except OSError as error:
            problem = f"the run's folder {run.dir} cannot be written: {error}; mend it, or set out to another folder"
    if problem := ranks.broadcast_object(problem):
        raise OSError(problem)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"

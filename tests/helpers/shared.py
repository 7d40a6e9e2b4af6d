"""Fixtures that live beside the repository, not in it: official nets' outputs, real pictures, small real weights."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("RESTILL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def shared(*parts: str) -> Path:
    """Path of a shared fixture; skips the calling test, with the reason, where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here; set RESTILL_SHARED to the folder that holds {'/'.join(parts)}")
    return path


def parity(name: str) -> Path:
    """A fixture of the official nets or metrics: of the folder PARITY_DIR, or of shared/parity."""
    folder = os.environ.get("PARITY_DIR")
    if folder is None:
        return shared("parity", name)
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is not here; PARITY_DIR names the folder of fixtures")
    return path

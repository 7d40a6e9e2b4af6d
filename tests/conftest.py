"""One thread per process, the tier of a test told by its folder, and no tier that vanishes unseen."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

TIERS = ("unit", "multirank", "e2e")
ROOT = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(ROOT).parts[0]
        assert item.get_closest_marker(tier), f"{item.nodeid} lies in tests/{tier} and must be marked so"
    whole_suite = config.args in ([str(ROOT)], ["tests"]) and not config.getoption("-k") and not config.getoption("-m")
    if whole_suite:
        absent = [tier for tier in TIERS if not any(item.get_closest_marker(tier) for item in items)]
        if absent:
            raise pytest.UsageError(f"no test was collected in {', '.join(absent)}; a green run would mean nothing")

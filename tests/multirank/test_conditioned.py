"""A student that sees masks, some of them dropped, on gloo ranks with real DeepSpeed: their number is no matter."""

from typing import Any

import pytest

from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_engine as work

pytestmark = pytest.mark.multirank

SAM_DEBLUR: dict[str, Any] = {"task": "conditioned", "conditioning": {"method": "map", "mask_dropout": 0.5}}


def test_1_rank_of_4_samples_equals_2_ranks_of_2_though_masks_are_dropped() -> None:
    one, two = (run_ranks(work.losses_of_stages, world, [2], SAM_DEBLUR, 4)[0][2] for world in (1, 2))
    for a, b in zip(one.lines, two.lines, strict=True):
        assert a["student_rec"] == pytest.approx(b["student_rec"], rel=1e-4)
        assert a["masks_per_picture"] == b["masks_per_picture"] > 1
    first, other = one.moments["exp_avg"], two.moments["exp_avg"]
    largest = max(float(tensor.abs().max()) for tensor in first.values())
    assert all(float((tensor - other[name]).abs().max()) < 1e-4 * largest for name, tensor in first.items())
    assert float(first["student.pre_seg.weight"].abs().max()) > 0

"""`cached` on ranks that share the student's weights: none waits for another, and all see what one rank would."""

from pathlib import Path

import pytest

from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_cached as work

pytestmark = pytest.mark.multirank

TERMS = ("student_rec", "teacher_rec", "spd", "sgr", "total", "masks_per_picture", "mask_coverage")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    write_pairs(make_pairs(folder / "src", 6), folder / "shards")
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[int, list[dict]]:
    # Steps 1, 4 and 7 straddle epochs: one rank has masks to make, the other none. Were their passes of the student not
    # equally many, stage 3 would hang here.
    return run_ranks(work.stages, 2, folder, "two", timeout_s=200)[0]


def test_any_world_and_stage_sees_the_same_masks(folder: Path, two_ranks: dict[int, list[dict]]) -> None:
    alone = run_ranks(work.stages, 1, folder, "one")[0]
    for lines in (two_ranks[3], alone[0], alone[3]):
        for line, wanted in zip(lines, two_ranks[0], strict=True):
            assert line["mask_age_epochs"] == wanted["mask_age_epochs"] and line["masks_remade"] == 0
            assert {name: line[name] for name in TERMS} == pytest.approx(
                {name: wanted[name] for name in TERMS}, rel=1e-4
            )
    assert [line["mask_age_epochs"] for line in two_ranks[0]] == [0, 0.5, 1, 0, 0.5, 1, 0, 0.5, 1]


def test_resumed_equals_uninterrupted_bit_by_bit(folder: Path, two_ranks: dict[int, list[dict]]) -> None:
    assert run_ranks(work.halves, 2, folder)[0] == two_ranks[3][2:]

"""The engine on gloo ranks with real DeepSpeed: stages and world sizes agree, resume is exact, NaN harms nobody."""

from typing import Any

import pytest
import torch

from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_engine as work

pytestmark = pytest.mark.multirank

TERMS = ("student_rec", "teacher_rec", "spd", "sgr", "total")


def largest_gap(lines: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    return max(
        abs(a[name] - b[name]) / max(abs(a[name]), 1e-12) for a, b in zip(lines, others, strict=True) for name in TERMS
    )


@pytest.fixture(scope="module")
def by_world() -> dict[int, dict[int, Any]]:
    return {world: run_ranks(work.losses_of_stages, world, [0, 1, 2, 3], {})[0] for world in (1, 2)}


def test_zero_stages_agree(by_world: dict[int, dict[int, Any]]) -> None:
    for world in (1, 2):
        reference, weights, ema = by_world[world][0]
        for stage in (1, 2, 3):
            lines, other_weights, other_ema = by_world[world][stage]
            assert largest_gap(reference, lines) < 1e-6, (world, stage)
            assert all(torch.allclose(weights[name], other_weights[name], atol=1e-6) for name in weights)
            assert all(torch.allclose(ema[name], other_ema[name], atol=1e-6) for name in ema)


def test_one_rank_and_two_agree(by_world: dict[int, dict[int, Any]]) -> None:
    assert largest_gap(by_world[1][2][0], by_world[2][2][0]) < 1e-5


def test_accumulation_equals_one_pass(by_world: dict[int, dict[int, Any]]) -> None:
    accumulated = run_ranks(work.losses_of_stages, 2, [2], {"optim": {"batch_per_rank": 1}})[0]
    assert largest_gap(by_world[1][2][0], accumulated[2][0]) < 1e-5


def test_every_term_moves_and_gradients_are_measured(by_world: dict[int, dict[int, Any]]) -> None:
    lines, weights, ema = by_world[2][2]
    assert all(line[name] != 0 for line in lines for name in TERMS)
    assert {"gradient/student_rec", "gradient/spd", "gradient/sgr"} <= lines[0].keys()
    assert any(not torch.equal(ema[name], weights[f"student.{name}"]) for name in ema)


def test_resume_is_exact_and_crosses_stages_and_world_sizes() -> None:
    snapshot, uninterrupted = run_ranks(work.train_and_snapshot, 2, 2, {})[0]
    same_world = run_ranks(work.resume_everywhere, 2, [0, 1, 2, 3], snapshot, {})[0]
    assert same_world[2][1] == uninterrupted  # bit by bit
    for stage, (again, lines) in same_world.items():
        for key in ("exp_avg", "exp_avg_sq"):  # what was put in comes out, in every stage
            for name, moment in snapshot.moments[key].items():
                assert torch.equal(moment, again.moments[key][name]), (stage, key, name)
        assert again.moments["step"] == snapshot.moments["step"] == 2
        assert largest_gap(uninterrupted, lines) < 1e-6, stage
    alone = run_ranks(work.resume_everywhere, 1, [0, 1, 2, 3], snapshot, {})[0]
    for stage, (_, lines) in alone.items():
        assert largest_gap(uninterrupted, lines) < 1e-5, stage


@pytest.mark.parametrize("stage", [0, 2])
def test_a_nan_on_one_rank_moves_no_weight_anywhere(stage: int) -> None:
    for before, after, lines in run_ranks(work.nan_on_one_rank, 2, stage):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(torch.isfinite(torch.tensor(line["total"])) for line in lines)


def test_bf16_stages_agree() -> None:
    half = run_ranks(work.losses_of_stages, 2, [1, 3], {"engine": {"precision": "bf16"}})[0]
    assert largest_gap(half[1][0], half[3][0]) < 1e-2

"""The engine on gloo ranks with real DeepSpeed: stages and world sizes agree, resume is exact, NaN harms nobody."""

from typing import Any

import pytest
import torch

from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_engine as work

pytestmark = pytest.mark.multirank

STAGES = [0, 1, 2, 3]
TERMS = ("student_rec", "teacher_rec", "spd", "sgr", "total")


def largest_gap(lines: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    return max(
        abs(a[name] - b[name]) / max(abs(a[name]), 1e-12) for a, b in zip(lines, others, strict=True) for name in TERMS
    )


def agree(one: Any, other: Any, *, rel: float) -> bool:
    """Losses, and first moments too: Adam's steps alone would not notice gradients that are twice too large."""
    pairs = [(one.moments["exp_avg"][name], other.moments["exp_avg"][name]) for name in one.moments["exp_avg"]]
    largest = max(a.abs().max().item() for a, _ in pairs)
    gap = max((a - b).abs().max().item() for a, b in pairs)
    return largest_gap(one.lines, other.lines) < rel and gap < rel * largest


def equal(states: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(states[name], others[name]) for name in states)


@pytest.fixture(scope="module")
def by_world() -> dict[int, dict[int, Any]]:
    return {world: run_ranks(work.losses_of_stages, world, STAGES, {})[0] for world in (1, 2)}


def test_every_stage_equals_torch_alone(by_world: dict[int, dict[int, Any]]) -> None:
    plain = run_ranks(work.plain_loop, 1)[0]
    for stage in STAGES:
        assert agree(plain, by_world[1][stage], rel=1e-5), stage


def test_zero_stages_agree(by_world: dict[int, dict[int, Any]]) -> None:
    for world in (1, 2):
        reference = by_world[world][0]
        for stage in (1, 2, 3):
            assert agree(reference, by_world[world][stage], rel=1e-5), (world, stage)
            ema, other = reference.ema, by_world[world][stage].ema
            assert all(torch.allclose(ema[name], other[name], atol=1e-6) for name in ema)


def test_one_rank_and_two_agree_and_so_does_accumulation(by_world: dict[int, dict[int, Any]]) -> None:
    assert agree(by_world[1][2], by_world[2][2], rel=1e-4)
    accumulated = run_ranks(work.losses_of_stages, 2, STAGES, {"optim": {"batch_per_rank": 1}})[0]
    for stage in STAGES:
        assert agree(by_world[1][2], accumulated[stage], rel=1e-4), stage


def test_clipping_limits_the_joint_norm_alike_in_every_stage() -> None:
    clipped = run_ranks(work.losses_of_stages, 2, STAGES, {"optim": {"clip_norm": 0.01}})[0]
    for stage in STAGES:
        assert agree(clipped[0], clipped[stage], rel=1e-4), stage
        # After n steps of gradients of norm g, exp_avg has norm at most g (1 - 0.9^n).
        norm = torch.cat([moment.flatten() for moment in clipped[stage].moments["exp_avg"].values()]).norm()
        assert norm <= 0.0101 * (1 - 0.9**work.STEPS)


def test_every_term_moves_and_gradients_are_measured(by_world: dict[int, dict[int, Any]]) -> None:
    result = by_world[2][2]
    assert all(line[name] != 0 for line in result.lines for name in TERMS)
    assert {"gradient/student_rec", "gradient/spd", "gradient/sgr"} <= result.lines[0].keys()
    assert any(not torch.equal(result.ema[name], result.weights[f"student.{name}"]) for name in result.ema)


def test_resume_is_exact_and_crosses_stages_and_world_sizes() -> None:
    snapshot, uninterrupted = run_ranks(work.train_and_snapshot, 2, 2, {})[0]
    same_world = run_ranks(work.resume_everywhere, 2, STAGES, snapshot, {})[0]
    assert same_world[2][1] == uninterrupted  # bit by bit
    for stage, (again, lines) in same_world.items():
        for key in ("exp_avg", "exp_avg_sq"):  # what was put in comes out, in every stage
            assert equal(snapshot.moments[key], again.moments[key]), (stage, key)
        assert equal(snapshot.ema, again.ema)
        assert again.moments["step"] == snapshot.moments["step"] == 2
        assert largest_gap(uninterrupted, lines) < 1e-6, stage
    alone = run_ranks(work.resume_everywhere, 1, STAGES, snapshot, {})[0]
    for stage, (_, lines) in alone.items():
        assert largest_gap(uninterrupted, lines) < 1e-5, stage


@pytest.mark.parametrize(
    "sections",
    [{"optim": {"clip_norm": 0.01}}, {"optim": {"batch_per_rank": 1}}],
    ids=["one pass, clipped", "the first of two passes"],
)
def test_a_nan_on_one_rank_moves_nothing_on_any(sections: dict[str, Any]) -> None:
    for rank in run_ranks(work.nan_on_one_rank, 2, STAGES, sections):
        for stage, (before, after, nothing, lines) in rank.items():
            assert equal(before.model, after.model) and equal(before.ema, after.ema), stage
            for key in ("exp_avg", "exp_avg_sq"):
                assert equal(before.moments[key], after.moments[key]), (stage, key)
            assert nothing == {} and lines[0]["total"] == lines[0]["total"], stage


def test_nan_for_ever_stops_all_ranks() -> None:
    for said in run_ranks(work.nan_for_ever, 2):
        assert said.startswith("3 gradients were not finite in 3 steps in a row"), said


def test_fp16_lowers_a_scale_that_overflows_and_clips_unscaled_gradients() -> None:
    for stage, (first, scales, moved, moments) in run_ranks(work.fp16_overflow, 2, [1, 2, 3])[0].items():
        assert first == 0
        assert not moved[0] and scales[0] < 2.0**40 and moved[-1] and moved[-2], (stage, scales)
        assert moments["step"] == sum(moved)
        norm = torch.cat([moment.flatten() for moment in moments["exp_avg"].values()]).norm()
        assert 1e-4 < norm <= 0.011, (stage, norm)


def test_bf16_is_near_fp32_in_every_stage(by_world: dict[int, dict[int, Any]]) -> None:
    half = run_ranks(work.losses_of_stages, 2, [1, 2, 3], {"engine": {"precision": "bf16"}})[0]
    for stage in (1, 2, 3):
        assert largest_gap(half[1].lines, half[stage].lines) < 1e-2, stage
        gap = max(abs(a["total"] - b["total"]) for a, b in zip(by_world[2][2].lines, half[stage].lines, strict=True))
        assert 0 < gap < 0.5, stage  # in dB, of a loss near -4

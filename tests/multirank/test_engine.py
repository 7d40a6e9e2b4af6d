"""The engine on gloo ranks with real DeepSpeed: stages and world sizes agree, resume is exact, NaN harms nobody."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.spawn import run_ranks
from tests.multirank import ranks_of_engine as work

pytestmark = pytest.mark.multirank

STAGES = work.STAGES
WORLDS = [1, 2, 4]
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
    return {world: run_ranks(work.losses_of_stages, world, STAGES, {}, 10)[0] for world in WORLDS}


@pytest.fixture(scope="module")
def plain() -> Any:
    return run_ranks(work.plain_loop, 1, 10)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_ten_steps_equal_those_of_torch_alone(
    plain: Any, by_world: dict[int, dict[int, Any]], world: int, stage: int
) -> None:
    assert agree(plain, by_world[world][stage], rel=1e-5 if world == 1 else 1e-4)
    ema, other = by_world[1][0].ema, by_world[world][stage].ema
    assert all(torch.allclose(ema[name], other[name], atol=1e-6) for name in ema)


OPTIONS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "accumulation": (STAGES, {"optim": {"batch_per_rank": 1}}),
    "the teacher's blocks computed twice": (STAGES, {"engine": {"recompute_teacher": True}}),
    "Adam on the CPU": ([1, 2, 3], {"engine": {"offload_optimizer": True}}),
    "compiled": ([1], {"engine": {"compile": True}}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_engine_change_no_number(by_world: dict[int, dict[int, Any]], option: str) -> None:
    stages, sections = OPTIONS[option]
    for stage, result in run_ranks(work.losses_of_stages, 2, stages, sections)[0].items():
        reference = by_world[2][stage].lines[: work.STEPS]
        assert largest_gap(reference, result.lines) < 1e-4, stage
        if option != "compiled" and option != "accumulation":
            assert largest_gap(reference, result.lines) == 0, stage


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


def test_a_checkpoint_crosses_all_stages_and_world_sizes(tmp_path: Path) -> None:
    sections = {"task": "plain"}  # 144 crossings: the student alone will do
    saved = {world: run_ranks(work.save_in_every_stage, world, tmp_path / str(world), sections)[0] for world in WORLDS}
    files = {
        tmp_path / str(world) / f"stage-{stage}": lines for world in WORLDS for stage, lines in saved[world].items()
    }
    for world in WORLDS:
        gone_on = run_ranks(work.resume_from_files, world, list(files), sections)[0]
        assert len(gone_on) == len(WORLDS) * len(STAGES) ** 2
        for (folder, stage), lines in gone_on.items():
            for name in ("student_rec",):
                assert lines[0][name] == pytest.approx(files[folder][0][name], rel=1e-5), (folder, world, stage, name)


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


def test_nan_for_ever_stops_all_ranks(tmp_path: Path) -> None:
    for said in run_ranks(work.nan_for_ever, 2, tmp_path):
        assert said.startswith("3 gradients were not finite in 3 steps in a row"), said


def test_a_gradient_that_is_nan_while_losses_are_finite_is_named(tmp_path: Path) -> None:
    for rank in run_ranks(work.nan_gradient_for_ever, 2, STAGES, tmp_path):
        for stage in STAGES:
            assert rank[stage].startswith("2 gradients were not finite in 2 steps in a row"), (stage, rank)
            assert "rank 1 on " in rank[stage] and "the gradient of student.intro.weight" in rank[stage], (stage, rank)
            assert str(tmp_path / str(stage) / "tiny/bad_steps/step-00000002-rank1.safetensors") in rank[stage]


def test_deepspeeds_groups_wait_as_long_as_the_run_says() -> None:
    """Else NCCL ends a rank after ten minutes, before the watchdog has told of anybody."""
    for waits in run_ranks(work.patience, 2, STAGES):
        assert waits[0] == waits[1] == waits[2] == {77.0} and waits[3] <= {77.0}  # stage 3 has the run's own group


def test_fp16_lowers_a_scale_that_overflows_and_clips_unscaled_gradients() -> None:
    for stage, (first, scales, moved, moments) in run_ranks(work.fp16_overflow, 2, [1, 2, 3])[0].items():
        assert first == 0
        assert not moved[0] and scales[0] < 2.0**40 and moved[-1] and moved[-2], (stage, scales)
        assert moments["step"] == sum(moved)
        norm = torch.cat([moment.flatten() for moment in moments["exp_avg"].values()]).norm()
        assert 1e-4 < norm <= 0.011, (stage, norm)


def test_bf16_is_near_fp32_in_every_stage(by_world: dict[int, dict[int, Any]]) -> None:
    half = run_ranks(work.losses_of_stages, 2, [1, 2, 3], {"engine": {"precision": "bf16"}})[0]
    whole = by_world[2][2].lines[: work.STEPS]
    for stage in (1, 2, 3):
        assert largest_gap(half[1].lines, half[stage].lines) < 1e-2, stage
        gap = max(abs(a["total"] - b["total"]) for a, b in zip(whole, half[stage].lines, strict=True))
        assert 0 < gap < 0.5, stage  # in dB, of a loss near -4

"""Batch norm over gloo ranks; and RCDNet, 60 of them deep, through the real engine."""

from typing import Any

import pytest
import torch

from dist_train.config import RcdnetConfig
from tests.helpers.spawn import run_ranks
from tests.helpers.tasks import tiny_run, tiny_task
from tests.multirank import ranks_of_batch_norm as work
from tests.multirank import ranks_of_engine
from tests.multirank.test_engine import agree, equal, largest_gap

pytestmark = pytest.mark.multirank

STAGES = [0, 2, 3]
SECTIONS = {"student": RcdnetConfig(num_stages=3, num_m=3, num_z=4), "loss": {"rec": "rcdnet"}}


def test_two_ranks_equal_one_with_all_samples() -> None:
    (whole,) = run_ranks(work.normalise, 1, torch.float32)
    parts = run_ranks(work.normalise, 2, torch.float32)
    for name in ("y", "x"):
        assert torch.allclose(torch.cat([part[name] for part in parts]), whole[name], atol=1e-4), name
    for part in parts:
        for name, gradient in whole["gradients"].items():
            assert torch.allclose(part["gradients"][name], gradient, rtol=1e-4), name
        for name, tensor in whole["state"].items():
            assert torch.allclose(part["state"][name], tensor, rtol=1e-6), name
            assert torch.equal(part["state"][name], parts[0]["state"][name]), name


def test_half_precision_stays_half_and_its_statistics_do_not() -> None:
    (whole,) = run_ranks(work.normalise, 1, torch.bfloat16)
    parts = run_ranks(work.normalise, 2, torch.bfloat16)
    y = torch.cat([part["y"] for part in parts])
    assert y.dtype == whole["y"].dtype == torch.bfloat16
    assert torch.allclose(y, whole["y"], atol=0.05)
    assert torch.allclose(parts[0]["state"]["running_var"], whole["state"]["running_var"], rtol=1e-4)


@pytest.fixture(scope="module")
def trained() -> Any:
    return run_ranks(work.train_and_resume, 2, STAGES, SECTIONS)[0]


def test_stages_agree_and_resume(trained: Any) -> None:
    by_stage, again = trained
    for stage in STAGES:
        assert agree(by_stage[0], by_stage[stage], rel=1e-5), stage
    assert largest_gap(by_stage[0].lines[2:], again) < 1e-5


def test_one_rank_and_two_agree() -> None:
    # The student alone: through a second net that is as deep, 1e-7 in a pixel can turn over a ReLU that matters.
    sections = {**SECTIONS, "task": "plain"}
    (alone,) = run_ranks(ranks_of_engine.losses_of_stages, 1, [2], sections)
    both = run_ranks(ranks_of_engine.losses_of_stages, 2, [2], sections)[0]
    for line, other in zip(alone[2].lines, both[2].lines, strict=True):
        assert line["student_rec"] == pytest.approx(other["student_rec"], rel=1e-5)
    for name, moment in alone[2].moments["exp_avg"].items():
        assert torch.allclose(moment, both[2].moments["exp_avg"][name], atol=1e-4), name


def test_what_is_never_read_is_kept_and_not_trained(trained: Any) -> None:
    task = tiny_task(tiny_run(**SECTIONS))
    before = task.state_dict()
    unread = [name for name in before if name.endswith("eta1") or ".mnet." in name]
    for stage in STAGES:
        weights, moments = trained[0][stage].model, trained[0][stage].moments
        assert weights.keys() == before.keys()
        assert equal({name: before[name] for name in unread}, weights), stage
        rest = {name for name, _ in task.named_parameters()} - set(unread)
        assert moments["exp_avg"].keys() == moments["exp_avg_sq"].keys() == rest, stage
        read = next(name for name in before if "m_stage" in name and name.endswith("running_mean"))
        assert not torch.equal(before[read], weights[read]), stage


def test_a_step_that_does_not_happen_moves_no_statistics() -> None:
    for rank in run_ranks(ranks_of_engine.nan_on_one_rank, 2, [2], {**SECTIONS, "task": "plain"}):
        before, after, *_ = rank[2]
        assert equal(before.model, after.model) and equal(before.ema, after.ema)


def test_statistics_of_each_rank_are_saved_and_validated_as_the_main_ranks() -> None:
    student = RcdnetConfig(num_stages=3, num_m=3, num_z=4, batch_norm="rank")
    first, second = run_ranks(ranks_of_engine.losses_of_stages, 2, [2], {**SECTIONS, "student": student})
    assert equal(first[2].weights, second[2].weights) and equal(first[2].ema, second[2].ema)

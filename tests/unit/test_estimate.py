"""Estimates for a cluster: the cost model and its fit, bytes of the states, activations, and what --check prints."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config import SamConfig
from dist_train.room import LiveBytes
from launch.estimate import Cluster, describe_estimate, sample_work, step_cost
from launch.memory import (
    Activations,
    _followed,
    activation_bytes,
    build_sam,
    rank_bytes,
    sam_bytes,
    state_bytes,
    update_bytes,
)
from launch.step_time import (
    AllReduce,
    Link,
    StepCost,
    Steps,
    expected_max,
    fit_link,
    fit_step,
    strong_scaling,
    weak_scaling,
)
from launch.train import main
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit

LINK = Link(2e9, 1e-4)
COST = StepCost(0.2, 0.3, 0.01, num_bytes=4_000_000, calls=3)
MILLION = 10**6


def test_the_largest_of_n_normal_numbers() -> None:
    known = {1: 0, 2: np.pi**-0.5, 3: 1.5 * np.pi**-0.5, 10: 1.53875, 1000: 3.24144}
    assert {n: expected_max(n) for n in known} == pytest.approx(known, abs=1e-4)


def test_the_link_is_found_again() -> None:
    empty = COST._replace(calls=1)
    sent = [
        AllReduce(n, size, empty._replace(num_bytes=size).communication_s(n, LINK))
        for n in (1, 2, 4)
        for size in (2**16, 2**20, 2**22)
    ]
    assert fit_link(sent) == pytest.approx(LINK)
    for too_little in (sent[:3], sent[3:4], [one._replace(seconds=1.0) for one in sent[3:5]][:1]):
        with pytest.raises(ValueError, match="two sizes"):
            fit_link(too_little)


def drawn(ranks: int, *, count: int = 20_000) -> Steps:
    own_s = np.random.default_rng(ranks).normal(COST.compute_s, COST.spread * COST.compute_s, (count, ranks))
    return Steps(own_s.max(1) + COST.communication_s(ranks, LINK) + COST.fixed_s, own_s, calls=COST.calls)


def test_the_fit_to_1_and_2_ranks_finds_the_constants_and_foretells_8() -> None:
    cost = fit_step([drawn(1), drawn(2)], LINK, num_bytes=COST.num_bytes)
    assert cost.compute_s == pytest.approx(COST.compute_s, rel=0.01)
    assert cost.spread == pytest.approx(COST.spread, rel=0.01)
    assert cost.fixed_s == pytest.approx(COST.fixed_s, rel=0.1)
    for ranks in (1, 2, 4, 8):
        assert cost.seconds(ranks, LINK) == pytest.approx(float(drawn(ranks).wall_s.mean()), rel=0.01)


def test_efficiency_falls_with_ranks_and_strong_scaling_shares_one_batch() -> None:
    ranks = [1, 2, 4, 8, 16]
    weak = weak_scaling(COST, LINK, ranks, batch_per_rank=2)
    assert [row.batch_per_rank for row in weak] == [2] * 5
    assert [row.efficiency for row in weak] == sorted((row.efficiency for row in weak), reverse=True)
    assert weak[0].efficiency == 1 and weak[1].efficiency == COST.efficiency(2, LINK)
    strong = strong_scaling(COST, LINK, ranks, batch_per_rank=2, global_batch=8)
    assert [(row.ranks, row.batch_per_rank) for row in strong] == [(1, 8), (2, 4), (4, 2), (8, 1)]  # and no 16
    assert strong[2].seconds == pytest.approx(weak[2].seconds)
    assert strong[2].efficiency == pytest.approx((4 * COST.compute_s + COST.fixed_s) / 4 / strong[2].seconds)
    assert COST.with_batch(4).spread == COST.spread / 2  # of independent samples


@pytest.mark.parametrize(
    ("stage", "world", "wanted"),
    [
        (0, 8, {"parameters": 40, "gradients": 40, "optimizer": 80, "average": 16}),
        (1, 8, {"parameters": 40, "gradients": 5, "optimizer": 15, "average": 16, "bucket": 200}),
        (2, 1, {"parameters": 40, "gradients": 40, "optimizer": 120, "average": 16, "bucket": 200}),
        (3, 8, {"parameters": 5, "gradients": 5, "optimizer": 15, "average": 16, "bucket": 200, "gathered": 40}),
    ],
)
def test_states_are_counted_by_stage(stage: int, world: int, wanted: dict[str, int]) -> None:
    run = tiny_run(engine={"zero_stage": stage}, optim={"global_batch": 8})
    parts = state_bytes(run, student=4 * MILLION, trained=10 * MILLION, world=world)
    assert parts == {name: size * MILLION for name, size in wanted.items()}


def test_offloaded_moments_are_not_on_the_gpu() -> None:
    run = tiny_run(engine={"offload_optimizer": True})
    assert state_bytes(run, student=1, trained=2, world=1)["optimizer"] == 0
    assert update_bytes(run, trained=2, world=1) == 0


def test_a_net_of_many_weights_and_few_pixels_needs_most_in_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    run, update = tiny_run(engine={"zero_stage": 0}, loss={"sgr": {"weight": 0.0}}), "update, beyond what passes left"
    assert update not in rank_bytes(run, world=1)[0]
    monkeypatch.setattr("launch.memory.activation_bytes", lambda run, batch: Activations(1000, "as one pixel"))
    parts, notes = rank_bytes(run, world=1)
    assert parts[update] + 1000 == update_bytes(run, trained=parts["parameters"] // 4, world=1) == parts["optimizer"]
    assert "activations: as one pixel" in notes


def test_bytes_live_as_long_as_tensors() -> None:
    with LiveBytes() as live:
        kept = torch.ones(1000)
        torch.ones(500).mul(2)  # two at once, and none after
        kept.view(10, 100).add_(1)
    assert (live.now, live.peak) == (4000, 8000)


def test_activations_without_data_are_those_with() -> None:
    small_vgg = {"features": {"arch": "vgg19_16x"}}
    run = tiny_run(**small_vgg)
    found, small = activation_bytes(run, batch=4), activation_bytes(run, batch=2)
    assert "without data" in found.how
    assert found.num_bytes == pytest.approx(_followed(run, batch=4, crop_px=16, data=True), rel=0.02)
    assert 1.5 < found.num_bytes / small.num_bytes < 2
    less = activation_bytes(tiny_run(engine={"recompute_teacher": True}, **small_vgg), batch=4)
    assert less.num_bytes < 0.9 * found.num_bytes
    assert activation_bytes(tiny_run(engine={"precision": "bf16"}, **small_vgg), batch=4).num_bytes < found.num_bytes


def test_gradients_are_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"name": "nafnet", "width": 64, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    run = tiny_run(student=wide, task="plain")
    found = activation_bytes(run, batch=1)
    monkeypatch.setattr("launch.memory._forget", lambda parameter: None)  # leaves them to the end
    assert activation_bytes(run, batch=1).num_bytes > 1.2 * found.num_bytes


def test_sam_is_counted_by_its_published_net() -> None:
    fp32, half = (SamConfig(model="vit_b", dtype=dtype) for dtype in ("fp32", "auto"))
    parameters = sum(parameter.numel() for parameter in build_sam(fp32).parameters())
    assert parameters == 93_735_472
    alone, both = sam_bytes(fp32, batch=1), sam_bytes(half, batch=1)
    assert alone.weights == 4 * parameters and both.weights < alone.weights
    assert both.working == alone.working // 2 > 64 * 12 * MILLION
    run = tiny_run(prior={"name": "sam", "model": "vit_b", "points_per_side": 16})
    assert sample_work(run).sam == pytest.approx(2 * (0.487e12 + 256 * 0.695e9), rel=0.01)
    assert sample_work(tiny_run()).sam == 0
    parts, _ = rank_bytes(run, world=4)
    assert parts["sam"] == both.weights and parts["sam_working"] == both.working


def test_a_step_costs_what_its_samples_do() -> None:
    run = tiny_run(optim={"global_batch": 8})
    work = sample_work(run)
    four, one = (step_cost(run, Cluster(gpus, mfu=0.1), work) for gpus in (2, 8))
    assert one.compute_s == pytest.approx((work.nets + work.features) / (0.1 * 312e12))
    assert four.compute_s == pytest.approx(4 * one.compute_s) and four.spread == one.spread / 2
    accumulated = tiny_run(optim={"global_batch": 8, "batch_per_rank": 1})
    assert step_cost(accumulated, Cluster(2, mfu=0.1), work).compute_s == pytest.approx(four.compute_s)


def test_the_check_says_estimate_and_what_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: run\ndata: {train: none, crop_px: 32}\ntask: plain\nstudent: {name: nafnet, width: 4}\n")
    assert main([str(path), "--check", "--gpus", "8", "--nodes", "2", "--gpu", "L40S", "--mfu", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "# batch: 8 samples a step = 1 a pass x 1 passes x 8 ranks" in said
    for word in ("ESTIMATE for 8 x L40S on 2 nodes", "assumed: 362 TFLOP/s", "20% (--mfu)", "of 48 GiB, fits"):
        assert word in said, word
    for wrong, named in (
        (["--gpus", "3"], "cannot be shared by 3 ranks"),
        (["--gpus", "8", "--nodes", "3"], "--nodes 3"),
        (["--gpus", "8", "--gpu", "Abacus"], "--gpu Abacus"),
        (["--gpus", "8", "--mfu", "20"], "--mfu 20"),
    ):
        assert main([str(path), "--check", *wrong]) == 2
        assert named in capsys.readouterr().err
    assert main([str(path), "--gpus", "8"]) == 2 and "--check" in capsys.readouterr().err


def test_what_does_not_fit_is_said() -> None:
    run = tiny_run(student={"name": "nafnet", "width": 64}, data={"train": "-", "crop_px": 256})
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"global_batch": 16})})
    assert "DOES NOT FIT" in "\n".join(describe_estimate(run, Cluster(1, gpu="T4")))

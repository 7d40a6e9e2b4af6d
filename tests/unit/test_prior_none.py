"""Without a prior the teacher is the plain cascade, trained and scored like any other."""

from typing import Any

import pytest
import torch

from dist_train.config import BatchPlan, parse_run
from dist_train.evaluate import Row, means
from dist_train.priors import Priors, build_prior
from dist_train.tasks import build_task, count_parameters, sample_flops
from tests.helpers.tasks import tiny_batches, tiny_run

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def test_the_teacher_is_the_plain_net_on_the_students_output() -> None:
    run = tiny_run(prior={"name": "none"}, loss={"sgr": {"weight": 0}})
    task: Any = build_task(run)
    assert count_parameters(task)["teacher.units"] == 0
    assert task.teacher.net.state_dict().keys() == task.student.state_dict().keys()
    alone = tiny_run(task="plain")
    assert sample_flops(task, run, CPU) == 2 * sample_flops(build_task(alone), alone, CPU)
    batch = next(tiny_batches(BatchPlan(2, 2, 1), rank=0, world=1))
    priors = Priors(build_prior(run.prior, CPU))
    out = task.restore(batch, priors)
    assert out.keys() == {"student_out", "teacher_out"}  # no masks to draw
    assert torch.equal(out["teacher_out"], task.teacher.net(task.student(batch.lq)))
    terms = task(batch, priors)
    assert terms["masks_per_picture"] == terms["mask_coverage"] == 0
    terms["total"].backward()
    for net in (task.student, task.teacher):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_the_teacher_starts_as_the_one_that_sees_masks() -> None:
    states = []
    for prior, weight in (({"name": "none"}, 0), ({"name": "regions", "num_masks": 6}, 1)):
        torch.manual_seed(0)
        task: Any = build_task(tiny_run(prior=prior, loss={"sgr": {"weight": weight}}))
        states.append(task.teacher.net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_relations_of_no_masks_are_refused() -> None:
    tree = {"name": "x", "data": {"train": "-"}, "prior": {"name": "none"}}
    with pytest.raises(ValueError, match=r"prior\.name=none gives SGR no masks.*set it to 0"):
        parse_run(tree, source="run")
    parse_run(tree | {"task": "plain"}, source="run")


def test_the_lead_is_what_the_teacher_is_better_by() -> None:
    scores = {"input": (20.0, 0.5), "student": (30.0, 0.9), "teacher": (31.5, 0.92)}
    rows = [Row("a", "rgb", name, psnr, ssim) for name, (psnr, ssim) in scores.items()]
    found = means(rows)
    assert found["val/rgb/psnr/lead"] == pytest.approx(1.5) and found["val/rgb/ssim/lead"] == pytest.approx(0.02)
    assert not any(name.endswith("/lead") for name in means(rows[:2]))

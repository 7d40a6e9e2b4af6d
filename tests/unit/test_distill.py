"""The method: who sees what, and whose loss reaches whom (Eq. 1-8)."""

import copy
from typing import Any

import pytest
import torch

from dist_train.config import BatchPlan, SamConfig
from dist_train.data.batch import Batch
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam import SamPrior
from dist_train.tasks import build_task
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run, tiny_task
from tests.helpers.tiny_sam import LOOSE, tiny_sam

pytestmark = pytest.mark.unit


def one_batch() -> Batch:
    return next(tiny_batches(BatchPlan(2, 2, 1), rank=0, world=1))


def has_gradient(module: torch.nn.Module) -> bool:
    return any(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in module.parameters())


def test_a_new_teacher_equals_its_plain_net() -> None:
    run = tiny_run()
    task: Any = build_task(run)
    plain = copy.deepcopy(task.teacher.net)
    image = torch.rand(2, 3, 30, 37)  # padded inside
    masks = tiny_priors(run).masks(image, None)  # type: ignore[misc]
    assert torch.equal(task.teacher(image, masks), plain(image))


def test_a_teacher_that_starts_as_the_identity_hands_the_student_s_picture_on() -> None:
    run = tiny_run(teacher={"start": "identity"})
    task: Any = build_task(run)
    image = torch.rand(2, 3, 30, 37)
    assert torch.equal(task.teacher(image, tiny_priors(run).masks(image, None)), image)  # type: ignore[misc]
    terms = task(one_batch(), tiny_priors(run))
    assert terms["spd"] == terms["sgr"] == terms["lead/psnr"] == terms["lead/share"] == 0


def test_the_teacher_sees_the_masks() -> None:
    run = tiny_run()
    task: Any = tiny_task(run)
    image = torch.rand(2, 3, 32, 32)
    masks = tiny_priors(run).masks(image, None)  # type: ignore[misc]
    without = MaskSet(masks.masks, torch.zeros_like(masks.valid))
    assert not torch.allclose(task.teacher(image, masks), task.teacher(image, without))


@pytest.mark.parametrize(
    ("term", "student", "teacher"),
    [("student_rec", True, False), ("teacher_rec", False, True), ("spd", True, False), ("sgr", True, False)],
)
def test_each_loss_reaches_its_own_net_alone(term: str, student: bool, teacher: bool) -> None:
    run = tiny_run()
    task: Any = tiny_task(run)
    priors = tiny_priors(run)
    assert priors.features is not None
    task(one_batch(), priors)[term].backward()
    assert has_gradient(task.student) is student
    assert has_gradient(task.teacher) is teacher
    for conv in priors.features.convs:
        assert not conv.weight.requires_grad and conv.weight.grad is None


def test_an_attached_cascade_lets_the_teacher_s_loss_through() -> None:
    run = tiny_run(loss={"detach_cascade": False})
    task: Any = tiny_task(run)
    task(one_batch(), tiny_priors(run))["teacher_rec"].backward()
    assert has_gradient(task.student)


def test_total_and_measured_gradients_are_the_weighted_terms() -> None:
    run = tiny_run(loss={"spd": {"weight": 0.3}, "sgr": {"weight": 2.0}})
    task: Any = tiny_task(run)
    batch, priors = one_batch(), tiny_priors(run)
    terms = task(batch, priors, measure=True)
    wanted = terms["student_rec"] + 0.3 * terms["spd"] + 2.0 * terms["sgr"] + terms["teacher_rec"]
    assert terms["total"].item() == pytest.approx(wanted.item(), rel=1e-6)
    half = tiny_run(loss={"spd": {"weight": 0.15}, "sgr": {"weight": 2.0}})
    other: Any = tiny_task(half)
    again = other(batch, priors, measure=True)
    assert again["gradient/spd"].item() == pytest.approx(terms["gradient/spd"].item() / 2, rel=1e-4)
    assert again["gradient/sgr"].item() == pytest.approx(terms["gradient/sgr"].item(), rel=1e-4)


def test_masks_come_from_the_student_s_output_without_gradient() -> None:
    run = tiny_run()
    task: Any = tiny_task(run)
    priors = tiny_priors(run)
    seen = []

    def watched(images: torch.Tensor, batch: object, **_: object) -> MaskSet:
        seen.append(images)
        return priors.masks(images, batch)  # type: ignore[misc]

    batch = one_batch()
    task(batch, priors._replace(masks=watched))
    assert torch.equal(seen[0], task.student(batch.lq)) and not seen[0].requires_grad


def test_every_task_starts_the_student_from_the_same_weights() -> None:
    states = []
    for name in ("plain", "distill"):
        torch.manual_seed(3)
        task: Any = build_task(tiny_run(task=name))
        states.append(task.student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_sam_in_the_cascade_trains_both_nets() -> None:
    """The real segment_anything code on the student's output; only the weights are tiny and random."""
    config = SamConfig(model="vit_b", num_masks=6, **LOOSE)
    run = tiny_run(prior={"name": "regions", "num_masks": 6})
    task: Any = tiny_task(run)
    priors = tiny_priors(run)._replace(masks=SamPrior(tiny_sam(), config, weights="random, for a test"))
    pairs = next(tiny_batches(BatchPlan(2, 2, 1), rank=0, world=1, px=64))
    terms = task(pairs, priors)
    assert terms["masks_per_picture"] > 1 and terms["sgr"] > 0
    terms["total"].backward()
    assert has_gradient(task.student) and has_gradient(task.teacher)


def test_with_both_terms_off_the_student_learns_as_if_alone() -> None:
    """Nothing but SPD and SGR ties the student to the teacher: its gradients are the plain task's, bit by bit."""
    off = {"spd": {"weight": 0.0}, "sgr": {"weight": 0.0}}
    gradients = []
    for name in ("plain", "distill"):
        run = tiny_run(task=name, loss=off)
        torch.manual_seed(3)
        task: Any = build_task(run)
        task(one_batch(), tiny_priors(run))["total"].backward()
        gradients.append({key: parameter.grad for key, parameter in task.student.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])

"""What holds for every net: the border, the stages, the teacher's start, and a step of the whole method."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from dist_train.config import BatchPlan, NetConfig
from dist_train.nets import NETS, build_net
from dist_train.nets.fusion import Teacher
from dist_train.priors.masks import MaskSet
from dist_train.tasks import build_task, count_parameters
from tests.helpers.nets import TINY_NETS
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run

pytestmark = pytest.mark.unit


def new_net(name: str) -> Any:
    torch.manual_seed(0)
    return build_net(TypeAdapter(NetConfig).validate_python(TINY_NETS[name]))


def some_masks(height: int, width: int, *, num_masks: int = 3) -> MaskSet:
    return MaskSet(torch.rand(2, num_masks, height, width) > 0.5, torch.ones(2, num_masks, dtype=torch.bool))


def test_no_net_is_left_out() -> None:
    assert {config["name"] for config in TINY_NETS.values()} | {"custom"} == NETS.keys()


@pytest.mark.parametrize("name", TINY_NETS)
@pytest.mark.parametrize("size", [(32, 32), (45, 39), (17, 70)])
def test_any_size_goes_in_and_the_stages_are_as_stated(name: str, size: tuple[int, int]) -> None:
    net = new_net(name).eval()
    left, right, top, bottom = net.padding(*size)
    height, width = size[0] + top + bottom, size[1] + left + right
    seen = []

    def watch(index: int, features: torch.Tensor) -> torch.Tensor:
        stage = net.stages[index]
        assert features.shape == (2, stage.channels, -(-height // stage.stride), -(-width // stage.stride))
        seen.append(index)
        return features

    lq = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = net(lq, watch)
        assert torch.equal(out, net(lq)) and out.shape == lq.shape
    assert seen == list(range(len(net.stages)))


@pytest.mark.parametrize("name", TINY_NETS)
def test_every_stage_is_part_of_the_path(name: str) -> None:
    net = new_net(name).eval()
    for parameter in net.parameters():  # NAFNet's blocks start as identities
        torch.nn.init.normal_(parameter, 0, 0.2)
    lq = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        plain = net(lq)
        for stage in range(len(net.stages)):
            changed = net(lq, lambda index, x, stage=stage: x * 0 if index == stage else x)
            assert not torch.equal(changed, plain), net.stages[stage]


@pytest.mark.parametrize("name", TINY_NETS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_new_teacher_equals_its_plain_net_and_then_sees_the_masks(name: str, every: int) -> None:
    net = new_net(name).eval()
    keys = list(net.state_dict())
    teacher = Teacher(net, num_masks=3, every=every, max_channels=8).eval()
    assert len(teacher.units) == -(-len(net.stages) // every)
    assert list(net.state_dict()) == keys
    image, masks = torch.rand(2, 3, 45, 39), some_masks(45, 39)
    with torch.no_grad():
        assert torch.equal(teacher(image, masks), net(image))
        for unit in teacher.units.values():
            torch.nn.init.normal_(unit.fuse.weight, 0, 0.5)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
        assert not torch.allclose(teacher(image, masks), teacher(image, some_masks(45, 39)))


@pytest.mark.parametrize("name", TINY_NETS)
def test_the_whole_method_trains_it(name: str) -> None:
    net = TINY_NETS[name]
    rec = "rcdnet" if net["name"] == "rcdnet" else "charbonnier"
    run = tiny_run(student=net, teacher={"spf": {"every": 2}}, loss={"rec": rec}, data={"crop_px": 32})
    task: Any = build_task(run)
    keys = list(task.student.state_dict())
    batch = next(tiny_batches(BatchPlan(2, 2, 1), rank=0, world=1, px=32))
    terms = task(batch, tiny_priors(run))
    terms["total"].backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert {"student_rec", "teacher_rec", "spd", "sgr"} <= terms.keys()
    for part in (task.student, task.teacher):
        for parameter_name, parameter in part.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name
            else:
                assert parameter.grad is None, parameter_name
    assert list(task.student.state_dict()) == keys == list(build_net(run.student).state_dict())
    counts = count_parameters(task)
    assert counts["teacher"] == counts["student"] + counts["teacher.units"]


@pytest.mark.parametrize("name", TINY_NETS)
def test_a_net_that_starts_as_the_identity_learns_all_the_same(name: str) -> None:
    net, lq = new_net(name), torch.rand(2, 3, 37, 45)
    if TINY_NETS[name]["name"] == "rcdnet":
        with pytest.raises(ValueError, match="teacher.start=identity is for nets"):
            net.start_as_identity()
        return
    net.start_as_identity()
    if TINY_NETS[name].get("fit") != "resize":  # which shrinks and stretches
        assert torch.allclose(net.eval()(lq), lq, atol=1e-6)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.1)
    for _ in range(2):  # the last weights let a gradient through once they have moved
        optimizer.zero_grad()
        (net(lq) - torch.rand_like(lq)).square().mean().backward()
        optimizer.step()
    first = next(net.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0 and not torch.allclose(net.eval()(lq), lq, atol=1e-4)

"""What the teacher is shown of the masks: stack, idmap, pooled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.config import BatchPlan
from dist_train.nets.conditioned import mask_average
from dist_train.nets.fusion import Encoding, JointConv, SpfUnit, Teacher, encode, resize_map
from dist_train.nets.id_conv import conv_ids, one_hot
from dist_train.nets.nafnet import Nafnet
from dist_train.priors.masks import MaskSet
from dist_train.tasks import build_task
from tests.helpers.tasks import tiny_batches, tiny_priors, tiny_run

pytestmark = pytest.mark.unit

ENCODINGS: tuple[Encoding, ...] = ("stack", "idmap", "pooled")
NUM_MASKS = 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some_ids(height: int, width: int) -> torch.Tensor:
    """Two pictures; all of 0..K occur, at the border too."""
    return torch.randint(0, NUM_MASKS + 1, (2, height, width), generator=torch.Generator().manual_seed(1))


def overlapping(height: int, width: int) -> MaskSet:
    """Two pictures, three masks each, largest first, the smaller ones inside or across the larger; one is not valid."""
    masks = torch.zeros(2, NUM_MASKS, height, width, dtype=torch.bool)
    masks[:, 0, : height // 2] = True
    masks[:, 1, 2 : height - 4, : width // 3] = True
    masks[:, 2, 4:7, 3:6] = True
    masks[:, 3] = True  # not valid: counts for nothing
    valid = torch.tensor([True, True, True, False, False]).repeat(2, 1)
    return MaskSet(masks, valid)


def some_teacher(encoding: Encoding, net: nn.Module | None = None) -> Teacher:
    torch.manual_seed(0)
    net = net or Nafnet(width=4, middle_blk_num=1, enc_blk_nums=(1,), dec_blk_nums=(1,), tlc_train_px=0)
    return Teacher(net, num_masks=NUM_MASKS, every=1, max_channels=8, encoding=encoding)  # type: ignore[arg-type]


def shaken(teacher: Teacher) -> Teacher:
    """As if trained a little: the masks reach the output."""
    for name, parameter in teacher.named_parameters():
        if name.endswith((".beta", ".gamma", "fuse.weight")):
            nn.init.normal_(parameter, 0, 0.3)
    return teacher


def test_look_ups_equal_the_dense_convolution_and_so_do_their_gradients() -> None:
    ids, seen = some_ids(9, 14), random(2, 6, 9, 14, seed=2)
    results = []
    for conv in (conv_ids, lambda ids, weight: F.conv2d(one_hot(ids, NUM_MASKS).double(), weight, padding=1)):
        weight = random(6, NUM_MASKS, 3, 3).requires_grad_()
        out = conv(ids, weight)
        out.backward(seen)
        results.append((out.detach(), weight.grad))
    (fast, fast_grad), (dense, dense_grad) = results
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast_grad, dense_grad, rtol=0, atol=1e-12)


def test_ids_of_no_mask_give_nothing() -> None:
    assert conv_ids(torch.zeros(1, 4, 4, dtype=torch.long), random(6, NUM_MASKS, 3, 3)).abs().max() == 0


@pytest.mark.parametrize("size", [(12, 18), (6, 9), (5, 7), (24, 30)])
def test_a_unit_given_ids_equals_one_given_their_maps_side_by_side(size: tuple[int, int]) -> None:
    """At the ids' own size, smaller by a whole factor, smaller by none, larger."""
    torch.manual_seed(0)
    unit = SpfUnit(4, NUM_MASKS, max_channels=8)
    nn.init.normal_(unit.fuse.weight)
    ids = some_ids(12, 18)
    results = []
    for prior in (ids, one_hot(ids, NUM_MASKS)):
        features = random(2, 4, *size, dtype=torch.float32).requires_grad_()
        unit.zero_grad()
        fused, passed_on = unit(features, prior)
        (fused.square().mean() + passed_on.square().mean()).backward()
        results.append([fused, passed_on, features.grad, *(parameter.grad for parameter in unit.parameters())])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (4, 4)])
def test_the_joint_convolution_is_one_over_the_concatenation(size: tuple[int, int]) -> None:
    conv = JointConv(3, 2, 4).double()
    features, prior = random(1, 3, *size).requires_grad_(), random(1, 2, 8, 8, seed=1)
    whole = F.conv2d(torch.cat([features, resize_map(prior, size)], 1), conv.weight, padding=1)
    torch.testing.assert_close(conv((features, prior)), whole, rtol=0, atol=1e-12)


def test_the_idmap_is_the_stack_of_a_partition() -> None:
    masks, image = overlapping(12, 12), torch.rand(2, 3, 12, 12)
    of_ids = one_hot(encode(masks, image, "idmap"), NUM_MASKS)
    disjoint = MaskSet(of_ids.bool(), masks.valid)
    assert torch.equal(encode(disjoint, image, "stack"), of_ids)
    assert of_ids.sum(1).max() == 1 and of_ids[:, 3:].sum() == 0
    assert of_ids[0, :, 5, 4].tolist() == [0, 0, 1, 0, 0]  # the smallest of three
    stack, ids = (shaken(some_teacher(name)).eval() for name in ("stack", "idmap"))
    assert list(stack.state_dict()) == list(ids.state_dict())
    ids.load_state_dict(stack.state_dict())
    image = torch.rand(2, 3, 11, 12)  # padded inside
    masks = MaskSet(disjoint.masks[:, :, 1:], masks.valid)
    with torch.no_grad():
        torch.testing.assert_close(ids(image, masks), stack(image, masks), rtol=0, atol=1e-5)


def test_pooled_is_the_mean_colour_inside_each_mask() -> None:
    masks, image = overlapping(12, 12), torch.rand(2, 3, 12, 12)
    painted = encode(masks, image, "pooled")
    for b in range(2):
        wanted = torch.zeros(3, 12, 12)
        rest = torch.ones(12, 12, dtype=torch.bool)
        for mask in masks.masks[b][masks.valid[b]]:
            wanted += image[b][:, mask].mean(1)[:, None, None] * mask
            rest &= ~mask
        wanted += image[b][:, rest].mean(1)[:, None, None] * rest
        torch.testing.assert_close(painted[b], wanted)
    assert torch.allclose(painted, mask_average(image, masks.masks[:, :3]))


def test_the_order_of_the_masks_is_nothing_to_pooled() -> None:
    masks, image = overlapping(16, 16), torch.rand(2, 3, 16, 16)
    order = torch.tensor([2, 4, 3, 0, 1])
    other = MaskSet(masks.masks[:, order], masks.valid[:, order])
    for encoding in ENCODINGS:
        teacher = shaken(some_teacher(encoding)).eval()
        with torch.no_grad():
            same = torch.allclose(teacher(image, masks), teacher(image, other), atol=1e-5)
        assert same is (encoding == "pooled"), encoding


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_new_teacher_equals_its_plain_net_and_later_sees_the_masks(encoding: Encoding) -> None:
    teacher = some_teacher(encoding).eval()
    image, masks = torch.rand(2, 3, 17, 14), overlapping(17, 14)
    without = MaskSet(masks.masks, torch.zeros_like(masks.valid))
    with torch.no_grad():
        assert torch.equal(teacher(image, masks), teacher.net(image))
        shaken(teacher)
        assert not torch.allclose(teacher(image, masks), teacher(image, without), atol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_whole_method_trains_with_it(encoding: Encoding, dtype: torch.dtype | None) -> None:
    run = tiny_run(teacher={"spf": {"max_channels": 8, "encoding": encoding}})
    task: Any = build_task(run)
    assert shaken(task.teacher).encoding == encoding
    batch = next(tiny_batches(BatchPlan(2, 2, 1), rank=0, world=1))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        terms = task(batch, tiny_priors(run))
    terms["total"].backward()
    for name, parameter in task.teacher.units.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert task.teacher.units["0"].mix[0].weight.grad[:, 4:].abs().sum() > 0

"""Each vectorised loss against a loop written from its equation, and where gradients may and may not go."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_train import losses
from dist_train.config import LossConfig, SgrConfig, SpdConfig
from dist_train.priors.masks import MaskSet, from_masks
from tests.helpers.shared import parity

pytestmark = pytest.mark.unit


def some_masks() -> MaskSet:
    """Two pictures of 16 x 16: three masks (two overlap) and one; K = 4."""
    first = np.zeros((3, 16, 16), bool)
    first[0, :, :8] = True
    first[1, 4:12, 4:12] = True
    first[2, 0:3, 12:] = True
    second = np.zeros((1, 16, 16), bool)
    second[0, 5:, 5:] = True
    return from_masks([first, second], num_masks=4)


def features(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_sgr(student: torch.Tensor, teacher: torch.Tensor, masks: MaskSet, config: SgrConfig) -> float:
    small = masks.resize(8, 8).double()
    per_picture = []
    for b in range(2):
        if config.normalize:
            scale = teacher[b].square().mean().sqrt()
        else:
            scale = torch.tensor(1.0, dtype=torch.float64)

        def relation(f: torch.Tensor, i: int, j: int, b: int = b, scale: torch.Tensor = scale) -> torch.Tensor:
            masked = [f[b] / scale * small[b, k] for k in (i, j)]  # Eq. 5
            if config.relation == "map":
                return (masked[0] - masked[1]).square().mean()  # Eq. 6
            nodes = [m.sum((1, 2)) / small[b, k].sum() for m, k in zip(masked, (i, j), strict=True)]
            return (nodes[0] - nodes[1]).norm()

        count = int(masks.valid[b].sum())
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        per_picture.append(torch.zeros((), dtype=torch.float64))
        if pairs:
            gaps = [(relation(student, i, j) - relation(teacher, i, j)).square() for i, j in pairs]  # Eq. 7
            per_picture[-1] = torch.stack(gaps).mean()
    return torch.stack(per_picture).mean().item()


@pytest.mark.parametrize("relation", ["map", "pooled"])
@pytest.mark.parametrize("normalize", [False, True])
def test_sgr_equals_a_loop_over_pairs(relation: str, normalize: bool) -> None:
    config = SgrConfig(relation=relation, normalize=normalize)  # type: ignore[arg-type]
    student, teacher, masks = features(1), features(2), some_masks()
    fast = losses.sgr(student.float(), teacher.float(), masks, config).item()
    assert fast == pytest.approx(naive_sgr(student, teacher, masks, config), rel=1e-5)


@pytest.mark.parametrize("relation", ["map", "pooled"])
def test_sgr_gradient_is_finite_and_only_the_student_s(relation: str) -> None:
    config = SgrConfig(relation=relation)  # type: ignore[arg-type]
    student, teacher = features(1).float().requires_grad_(), features(2).float().requires_grad_()
    losses.sgr(student, teacher, some_masks(), config).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize("relation", ["map", "pooled"])
def test_sgr_of_coincident_nodes_and_of_no_masks(relation: str) -> None:
    config = SgrConfig(relation=relation)  # type: ignore[arg-type]
    flat = torch.ones(2, 5, 8, 8, requires_grad=True)
    losses.sgr(flat, features(2).float(), some_masks(), config).backward()
    assert flat.grad is not None and flat.grad.isfinite().all()
    none = MaskSet(torch.zeros(2, 4, 16, 16, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    student = features(1).float().requires_grad_()
    loss = losses.sgr(student, features(2).float(), none, config)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and (student.grad == 0).all()


def test_coincident_nodes_get_no_gradient_and_the_others_theirs() -> None:
    nodes = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [4.0, 6.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    relations = losses.pooled_relations(nodes)
    assert relations[0, 0].tolist() == pytest.approx([0, 0, 5, 5**0.5, 5**0.5])
    relations[0, [0, 3], [1, 4]].sum().backward(retain_graph=True)
    assert nodes.grad is not None and (nodes.grad == 0).all()
    relations[0, 0, 2].backward()
    assert nodes.grad[0, 2].tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("relation", ["map", "pooled"])
def test_what_a_padded_row_holds_counts_for_nothing_even_in_the_gradient(relation: str) -> None:
    config = SgrConfig(relation=relation)  # type: ignore[arg-type]
    masks, results = some_masks(), []
    twice = masks.masks.clone()
    twice[:, 1] = twice[:, 0]  # coincident too
    for padded in (False, True):
        held = twice | (padded & ~masks.valid[:, :, None, None])
        student = features(1).float().requires_grad_()
        loss = losses.sgr(student, features(2).float(), MaskSet(held, masks.valid), config)
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[0][1].isfinite().all() and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("relation", ["map", "pooled"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sgr_of_half_precision_features_is_that_of_their_values(
    relation: str, normalize: bool, dtype: torch.dtype
) -> None:
    config = SgrConfig(relation=relation, normalize=normalize)  # type: ignore[arg-type]
    student, teacher = ((200 * features(seed)).to(dtype) for seed in (1, 2))  # their squares are beyond fp16
    student.requires_grad_()
    loss = losses.sgr(student, teacher, some_masks(), config)
    loss.backward()
    assert loss.item() == pytest.approx(naive_sgr(student.double(), teacher.double(), some_masks(), config), rel=1e-4)
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_disjoint_masks_make_the_literal_relation_a_sum_of_energies() -> None:
    halves = np.zeros((2, 8, 8), bool)
    halves[0, :, :4], halves[1, :, 4:] = True, True
    masks = from_masks([halves, halves], num_masks=2)
    f = features(3)
    relations = losses.map_relations(f, masks.resize(8, 8).double())
    energies = [(f * masks.resize(8, 8)[:, k : k + 1]).square().mean((1, 2, 3)) for k in (0, 1)]
    assert torch.allclose(relations[:, 0, 1], energies[0] + energies[1])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_spd_equals_the_formula_and_stops_at_the_teacher(reduction: str) -> None:
    student = torch.rand(2, 3, 4, 5, requires_grad=True)
    teacher = (torch.rand(2, 3, 4, 5) * 4).requires_grad_()  # far enough for both branches of smooth L1
    loss = losses.spd(student, teacher, SpdConfig(reduction=reduction), gt=student.detach())  # type: ignore[arg-type]
    gap = (student - teacher).detach().abs()
    each = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5)
    wanted = each.sum() / 2 if reduction == "sum" else each.mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_spd_follows_only_a_better_teacher_where_it_is_told_to() -> None:
    gt = torch.rand(3, 3, 8, 8)
    student = (gt + 0.1).requires_grad_()
    teacher = gt + torch.tensor([0.01, 0.11, 0.2])[:, None, None, None]  # 20 dB ahead, 0.8 and 6 dB behind
    lead = losses.teacher_lead(student, teacher, gt)
    assert not lead.requires_grad
    assert torch.allclose(lead, torch.tensor([20.0, -0.8279, -6.0206]), atol=1e-3)
    losses.spd(student, teacher, SpdConfig(pictures="better"), gt=gt).backward()
    assert student.grad is not None
    assert student.grad[0].abs().sum() > 0 and not student.grad[1:].any()
    alone = losses.spd(student[:1], teacher[:1], SpdConfig(), gt=gt[:1])
    assert losses.spd(student, teacher, SpdConfig(pictures="better"), gt=gt).item() == pytest.approx(alone.item() / 3)


@pytest.mark.parametrize("reduction", ["sum", "relative"])
def test_a_control_is_spd_from_a_teacher_that_knows_the_truth_on_the_same_pictures(reduction: str) -> None:
    gt = torch.rand(2, 3, 8, 8)
    student = (gt + 0.1).requires_grad_()
    teacher = gt + torch.tensor([0.05, 0.2])[:, None, None, None]  # ahead, behind
    settings: Any = {"reduction": reduction, "pictures": "better"}
    found = losses.spd(student, teacher, SpdConfig(towards="gt", **settings), gt=gt)
    wanted = losses.spd(student, torch.stack([gt[0], teacher[1]]), SpdConfig(**settings), gt=gt)
    assert found.item() == pytest.approx(wanted.item()) != 0
    assert found.item() != pytest.approx(losses.spd(student, teacher, SpdConfig(**settings), gt=gt).item())


@pytest.mark.parametrize("error", [0.1, 0.003])
def test_relative_spd_beside_the_psnr_loss_aims_between_the_truth_and_the_teacher_at_any_error(error: float) -> None:
    gt, weight = torch.rand(2, 3, 8, 8, dtype=torch.float64), 0.5
    student = (gt + error * torch.randn_like(gt)).requires_grad_()
    teacher = gt + 0.7 * error * torch.randn_like(gt)
    spd = losses.spd(student, teacher, SpdConfig(reduction="relative"), gt=gt)
    total = losses.psnr_loss(student, gt) + weight * spd
    (found,) = torch.autograd.grad(total, student)
    aim = (gt + weight * teacher) / (1 + weight)
    cosine = torch.cosine_similarity(found.flatten(1), (student - aim).detach().flatten(1))
    assert torch.allclose(cosine, torch.ones(2, dtype=torch.float64), atol=1e-9)


def test_reconstruction_losses_equal_the_official_values() -> None:
    facts = torch.load(parity("metrics_losses.pt"), weights_only=True)
    gt, pred, values = facts["gt"], facts["pred"], facts["values"]
    assert losses.psnr_loss(pred, gt).item() == pytest.approx(values["nafnet.PSNRLoss"], abs=1e-4)
    assert losses.charbonnier(pred, gt).item() == pytest.approx(values["uformer.CharbonnierLoss"], abs=1e-7)
    assert losses.l1(pred, gt).item() == pytest.approx(values["efficientderain.L1"], abs=1e-7)
    assert losses.ssim_zero_padded(pred, gt).item() == pytest.approx(values["efficientderain.ssim"], abs=1e-6)
    assert losses.l1_ssim(pred, gt).item() == pytest.approx(values["efficientderain.loss"], abs=1e-6)
    given = facts["rcdnet"]  # on 0..255
    trace = {
        "backgrounds": [picture / 255 for picture in (given["B0"], *given["ListB"])],
        "rains": [picture / 255 for picture in given["ListR"]],
    }
    ours = losses.rcdnet_loss(trace, given["B"] / 255, given["O"] / 255).item()
    assert ours == pytest.approx(values["rcdnet.total_loss"], rel=1e-6)


def test_total_is_equation_8() -> None:
    config = LossConfig(spd=SpdConfig(weight=0.5), sgr=SgrConfig(weight=3.0))
    terms = {"student_rec": torch.tensor(1.0), "spd": torch.tensor(10.0), "sgr": torch.tensor(100.0)}
    assert losses.student_total(terms, config).item() == pytest.approx(1 + 5 + 300)
    assert F.relu(losses.student_total({"student_rec": terms["student_rec"]}, config)).item() == 1

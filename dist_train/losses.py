"""The losses: one pure function per equation, and Eq. 8 in `total`.

Images are (B,3,H,W) float32 RGB in [0,1]; features (B,C,h,w); every function returns a scalar, mean over pictures.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config import LossConfig, SgrConfig, SpdConfig
from dist_train.priors.masks import MaskSet


def l1(output: Tensor, gt: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(output, gt)


def charbonnier(output: Tensor, gt: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-6), Uformer's loss."""
    return ((output - gt).square() + 1e-6).sqrt().mean()


def psnr_loss(output: Tensor, gt: Tensor) -> Tensor:
    """Minus PSNR in dB, NAFNet's loss: (10 / ln 10) ln(mse + 1e-8) of each picture, mean over pictures."""
    mse = (output - gt).square().mean((1, 2, 3))
    return 10 / math.log(10) * (mse + 1e-8).log().mean()


def ssim_zero_padded(output: Tensor, gt: Tensor) -> Tensor:
    """SSIM as a loss takes it: Gaussian window of 11 px, sigma 1.5, zeros beyond the border, per channel, range 1."""
    offsets = torch.arange(11, dtype=output.dtype, device=output.device) - 5
    gauss = torch.exp(-offsets.square() / (2 * 1.5**2))
    gauss = gauss / gauss.sum()
    channels = output.shape[1]
    window = (gauss[:, None] * gauss).expand(channels, 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, padding=5, groups=channels)

    mean_a, mean_b = mean(output), mean(gt)
    var_a, var_b = mean(output.square()) - mean_a.square(), mean(gt.square()) - mean_b.square()
    covariance = mean(output * gt) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    return (luminance * (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)).mean()


def l1_ssim(output: Tensor, gt: Tensor) -> Tensor:
    """L1 - 0.2 SSIM, EfficientDerain's loss."""
    return F.l1_loss(output, gt) - 0.2 * ssim_zero_padded(output, gt)


def rcdnet_loss(trace: Mapping[str, list[Tensor]], gt: Tensor, lq: Tensor) -> Tensor:
    """RCDNet's loss, 2S + 3 mean squares on 0..255 over the pictures of all stages.

    0.1 (B_0 + sum over s = 1..S of (B_s + R_s)) + B_(S+1) + 0.9 R_S, each the mean square to gt or to the rain lq - gt.

    Args:
        trace: `backgrounds`: [B_0 and the S + 1 of the stages], `rains`: [R of the S stages], (B,3,H,W) in [0,1].
        gt: the clean picture.
        lq: what the net was given.
    """
    first, *backgrounds, last = trace["backgrounds"]
    rains = trace["rains"]

    def mse(x: Tensor, y: Tensor) -> Tensor:
        return 255**2 * F.mse_loss(x.float(), y)

    early = sum((mse(x, gt) for x in (first, *backgrounds)), start=gt.new_zeros(()))
    rain = sum((mse(x, lq - gt) for x in rains), start=gt.new_zeros(()))
    return 0.1 * (early + rain) + mse(last, gt) + 0.9 * mse(rains[-1], lq - gt)


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "charbonnier": charbonnier,
    "psnr": psnr_loss,
    "l1_ssim": l1_ssim,
}


def reconstruction(name: str, output: Tensor, gt: Tensor, *, lq: Tensor, trace: Mapping[str, list[Tensor]]) -> Tensor:
    """The loss `LossConfig.rec` names: of the restored picture, or of all that the net made on its way."""
    if name == "rcdnet":
        # The last background is the output: the loss must reach the net by it, where gradients are measured and hooked.
        return rcdnet_loss({**trace, "backgrounds": [*trace["backgrounds"][:-1], output]}, gt, lq)
    return RECONSTRUCTION[name](output, gt)


@torch.no_grad()
def teacher_lead(student_out: Tensor, teacher_out: Tensor, gt: Tensor) -> Tensor:
    """How far the teacher is ahead of its student: PSNR of its picture minus that of the student's, in dB, (B,)."""
    student, teacher = ((out - gt).square().mean((1, 2, 3)) + 1e-10 for out in (student_out, teacher_out))
    return 10 * torch.log10(student / teacher)


def spd(student_out: Tensor, teacher_out: Tensor, config: SpdConfig, *, gt: Tensor) -> Tensor:
    """Semantic priors distillation (Eq. 4): smooth L1 from the student's image to the teacher's.

    Args:
        student_out: (B,3,H,W), carries the gradient.
        teacher_out: (B,3,H,W), detached here: the teacher must not come down to the student.
        config: `reduction` is over the pixels of a picture, which the paper leaves open; `pictures` says of which.
        gt: (B,3,H,W), to which `relative` and `better` compare, and what a control is drawn to.
    """
    target = gt if config.towards == "gt" else teacher_out.detach()
    each = F.smooth_l1_loss(student_out, target, beta=config.beta, reduction="none").flatten(1)
    each = each.mean(1) if config.reduction == "mean" else each.sum(1)
    if config.reduction == "relative":
        error = (student_out.detach() - gt).square().flatten(1)
        each = each * 20 / math.log(10) / (error.sum(1) + 1e-8 * error.shape[1])  # as in `psnr_loss`
    if config.pictures == "better":
        better = teacher_lead(student_out, teacher_out, gt) > 0
        each = each * better  # of all pictures still the mean, so that it does not depend on how a batch is shared
    return each.mean()


def map_relations(features: Tensor, masks: Tensor) -> Tensor:
    """Relations between masked feature maps, Eq. 5-6 as written: S_ij = mean over c,h,w of (F M_i - F M_j)^2.

    With e the energy of the features at a pixel, sum over c of F^2, this is G_ii + G_jj - 2 G_ij with
    G = (M e) M^T / Chw: one bmm, no (B,K,C,h,w) tensor. Masks that do not overlap give G_ii + G_jj, so their relation
    holds energies alone.

    Args:
        features: (B,C,h,w).
        masks: (B,K,h,w) in [0,1].

    Returns:
        (B,K,K), symmetric, zero on the diagonal.
    """
    num_channels, height, width = features.shape[1:]
    energy = features.square().sum(1).flatten(1)[:, None]  # (B,1,hw)
    flat = masks.flatten(2)
    gram = (flat * energy) @ flat.mT / (num_channels * height * width)
    own = gram.diagonal(dim1=1, dim2=2)
    return own[:, :, None] + own[:, None, :] - 2 * gram


def pooled_relations(nodes: Tensor) -> Tensor:
    """L2 distances between the mean features of the masks: S_ij = ||h_i - h_j||.

    Args:
        nodes: (B,K,C), mean of the features inside each mask.

    Returns:
        (B,K,K). The gradient of coincident nodes is zero, never NaN.
    """
    squared = (nodes[:, :, None] - nodes[:, None]).square().sum(-1)
    apart = squared > 0
    return torch.where(apart, squared, 1).sqrt() * apart


def sgr(student_features: Tensor, teacher_features: Tensor, masks: MaskSet, config: SgrConfig) -> Tensor:
    """Semantic-guided relation (Eq. 5-7): the parts of both pictures relate to each other alike.

    Args:
        student_features: (B,C,h,w), carries the gradient.
        teacher_features: (B,C,h,w), detached here.
        masks: the same for both nets, resized here to h x w.
        config: which relation; see `SgrConfig`.

    Returns:
        Squared difference of the relations, mean over the pairs of valid masks of a picture, then over the pictures. A
        picture without a pair counts 0, so that the mean does not depend on how a batch is shared out.
    """
    # Energies over channels and pixels go beyond fp16.
    student_features, teacher_features = student_features.float(), teacher_features.detach().float()
    if config.normalize:
        scale = teacher_features.square().mean((1, 2, 3), keepdim=True).clamp_min(1e-12).rsqrt()
        student_features, teacher_features = student_features * scale, teacher_features * scale
    if config.relation == "pooled":
        student = pooled_relations(masks.pool(student_features))
        teacher = pooled_relations(masks.pool(teacher_features))
    else:
        small = masks.resize(*student_features.shape[-2:])
        student, teacher = map_relations(student_features, small), map_relations(teacher_features, small)
    valid = masks.valid
    pairs = valid[:, :, None] & valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    num_pairs = pairs.sum((1, 2))
    return (((student - teacher).square() * pairs).sum((1, 2)) / num_pairs.clamp_min(1)).mean()


def student_total(terms: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The student's loss, Eq. 8: reconstruction + lambda_1 SPD + lambda_2 SGR. Terms that are absent are off."""
    total = terms["student_rec"]
    if "spd" in terms:
        total = total + config.spd.weight * terms["spd"]
    if "sgr" in terms:
        total = total + config.sgr.weight * terms["sgr"]
    return total

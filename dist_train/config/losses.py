"""Terms of Eq. 8 and their weights."""

from typing import Literal

from dist_train.config.fields import NonNegative, Positive, Section


class SpdConfig(Section):
    """Semantic priors distillation (Eq. 4)."""

    weight: NonNegative = 0.005
    """lambda_1; 0 turns the term off."""
    reduction: Literal["sum", "mean", "relative"] = "sum"
    """Sum over the pixels and channels of a picture, mean over pictures: with the paper's 0.005 a mean over pixels
    would be inert (its gradient 1e-5 of the reconstruction's), the sum is of the right size.
    relative: the sum over the student's own squared error, times 20 / ln 10, which is how `rec: psnr` weighs pixels.
    Beside it the sum is strong while errors are large and fades as they fall; this stays: the two together aim at
    (gt + weight * teacher) / (1 + weight) at every step of the training."""
    pictures: Literal["all", "better"] = "all"
    """all: Eq. 4 as written. better: only where the teacher is closer to the ground truth than the student (bounded by
    the teacher, as Chen et al. 2017 do for detection). A new teacher adds noise to what it is given, and a student that
    follows it loses a hundred steps or more; see configs/LOG.md."""
    towards: Literal["teacher", "gt"] = "teacher"
    """What the student is drawn to. gt: the same term on the same pictures with nothing distilled. A control: of a gain
    over the plain student that this has too, the term's form is the cause and not what the teacher knows."""
    beta: Positive = 1.0
    """Where smooth L1 turns from quadratic to linear; on [0,1] images 1.0 is quadratic throughout."""


class SgrConfig(Section):
    """Semantic-guided relation (Eq. 5-7)."""

    weight: NonNegative = 200.0
    """lambda_2; 0 turns the term off."""
    relation: Literal["map", "pooled"] = "map"
    """map: mean square between the two masked feature maps, Eq. 5-6 as written. pooled: L2 between the features' means
    inside each mask (the co-author's earlier relation distillation), which carries direction too, and whose gradient
    is 100 times larger."""
    normalize: bool = False
    """Divide both nets' features by the teacher's root mean square first, so that the weight means the same for any
    network of features and any layer."""


class LossConfig(Section):
    """Terms of Eq. 8 and their weights. 0.005 and 200 are the paper's; which is which is read from its Table 6."""

    rec: Literal["psnr", "charbonnier", "l1", "l1_ssim", "rcdnet"] = "psnr"
    """The net's official reconstruction loss, for student and teacher alike: psnr is NAFNet's, charbonnier Uformer's,
    l1_ssim EfficientDerain's, and rcdnet RCDNet's over the pictures of all its stages."""
    spd: SpdConfig = SpdConfig()
    sgr: SgrConfig = SgrConfig()
    detach_cascade: bool = True
    """Whether the teacher's reconstruction loss stops at the student's output. The paper says that the student's loss
    is its own three terms, which only holds if it does."""

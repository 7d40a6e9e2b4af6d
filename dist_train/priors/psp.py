"""`psp`: the classes of a semantic segmentation by PSPNet (Zhao et al. 2017) as masks."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config import PspConfig
from dist_train.priors.masks import MaskSet, Restore, Samples, finite
from dist_train.priors.vgg import IMAGENET_MEAN, IMAGENET_STD
from dist_train.priors.weights import check_state, load_state
from shards.schema import sha256_of

log = logging.getLogger(__name__)


class PspPrior:
    """A frozen PSPNet whose classes become masks: all pixels of a class are one, wherever they lie.

    Such are the class maps that the papers put in the place of SAM's masks. The masks are disjoint.

    Args:
        net: pictures (B,3,H,W), normalised as ImageNet's, sides multiples of 8, to logits (B,classes,H,W). It is taken
            over: frozen, in evaluation mode.
        config: number and size of the masks.
        weights: where its weights come from, for the run record.
        sha256: of that file.
    """

    def __init__(self, net: nn.Module, config: PspConfig, *, weights: str, sha256: str | None = None):
        self.net = net.requires_grad_(False).eval()
        like = next(net.parameters(), torch.empty(0))  # on its device, beforehand: the host never waits
        self._mean, self._std = (like.new_tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        self._config, self._weights, self._sha256 = config, weights, sha256

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """The largest classes of each picture, none of one that is not finite; see `Prior`. The host never waits."""
        height, width = images.shape[-2:]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # whatever the step runs in
            u8 = (images.float().clamp(0, 1) * 255 + 0.5).floor()  # as `to_uint8` rounds
            padded = F.pad((u8 / 255 - self._mean) / self._std, (0, -width % 8, 0, -height % 8), mode="replicate")
            classes = self.net(padded)[..., :height, :width].argmax(1)
        found = largest_classes(classes, self._config)
        return MaskSet(found.masks, found.valid & finite(images))

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "name": self._config.name,
            "what": f"class regions of PSPNet ({self._config.encoder}, {self._config.num_classes} classes), not SAM"
            + ("; RANDOM weights, its masks mean nothing" if self._config.weights == "random" else ""),
            "parameters": self._config.model_dump(exclude={"name", "weights"}),
            "weights": self._weights,
            "sha256": self._sha256,
            "dtype": "fp32",
        }


def largest_classes(classes: Tensor, config: PspConfig) -> MaskSet:
    """The classes that take up most of each picture.

    Args:
        classes: (B,H,W) int64, below `config.num_classes`.
        config: how many masks (K), and how large they must be.
    """
    areas = torch.zeros(len(classes), config.num_classes, dtype=torch.long, device=classes.device)
    areas.scatter_add_(1, classes.flatten(1), torch.ones_like(classes).flatten(1))
    areas, order = (part[:, : config.num_masks] for part in areas.sort(dim=1, descending=True, stable=True))
    valid = areas >= max(config.min_area_px, 1)
    masks = (classes[:, None] == order[:, :, None, None]) & valid[:, :, None, None]
    missing = max(config.num_masks - config.num_classes, 0)
    return MaskSet(F.pad(masks, (0, 0, 0, 0, 0, missing)), F.pad(valid, (0, missing)))


def load_psp_prior(config: PspConfig, device: torch.device) -> PspPrior:
    """Build the prior from `config.weights`; nothing is downloaded.

    Raises:
        ValueError: segmentation_models_pytorch is missing, there is no such encoder, or the file is not the weights of
            this net.
    """
    path = Path(config.weights).expanduser()
    state = None if config.weights == "random" else load_state(path, setting="prior.weights")
    net = _build(config)
    if state is None:
        log.warning("prior.weights=random: PSPNet's weights are RANDOM, its masks mean nothing")
        return PspPrior(net.to(device), config, weights="random")
    wanted = {name: value.shape for name, value in net.state_dict().items()}
    what = f"PSPNet with prior.encoder={config.encoder} and prior.num_classes={config.num_classes}"
    check_state(state, wanted, setting=f"prior.weights={path}", what=what)
    net.load_state_dict({name: state[name] for name in wanted})
    return PspPrior(net.to(device), config, weights=str(path), sha256=sha256_of(path))


def _build(config: PspConfig) -> nn.Module:
    """With weights from a generator of its own: the same in every run and on every rank."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            f"prior.name=psp needs segmentation_models_pytorch ({error}): pip install 'restill[psp]'"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return smp.PSPNet(config.encoder, encoder_weights=None, classes=config.num_classes)
        except (KeyError, RuntimeError, ValueError) as error:  # of segmentation_models_pytorch, and of timm
            raise ValueError(f"prior.encoder={config.encoder}: PSPNet cannot be built on it ({error})") from error

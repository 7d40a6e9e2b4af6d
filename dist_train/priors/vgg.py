"""Frozen VGG-19 features for SGR (Eq. 5): a gradient to the pictures, none to itself."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train.config import VggConfig
from dist_train.priors.weights import VGG19, check_state, fetch, load_state
from shards.schema import sha256_of

logger = logging.getLogger(__name__)

NUM_CONVS = (2, 2, 4, 4, 4)  # of the five blocks, with 2x2 max pooling between them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Conv(NamedTuple):
    """One 3x3 convolution, followed by ReLU."""

    block: int
    weight: Tensor
    bias: Tensor


class _Arch(NamedTuple):
    widths: tuple[int, ...]
    padding: Literal["zeros", "reflect"]
    keys: dict[str, str]
    """Each convolution ("4_2": second of the fourth block) and its name in the file, in order."""
    preprocess: dict[str, torch.Size]
    """Name and shape, in the file, of the convolution before all others; none: ImageNet's mean and std."""


_NAMES = [f"{block}_{i}" for block, num in enumerate(NUM_CONVS, 1) for i in range(1, num + 1)]

ARCHS = {
    "vgg19": _Arch(
        (64, 128, 256, 512, 512),
        "zeros",
        # vgg19.features counts convolutions, ReLUs and poolings: two per convolution, one more per finished block.
        {name: f"features.{2 * index + int(name[0]) - 1}" for index, name in enumerate(_NAMES)},
        {},
    ),
    # Its features are small, 0.004 in root mean square at relu4_4: SGR wants loss.sgr.normalize with it.
    "vgg19_16x": _Arch(
        (16, 32, 64, 128, 128),
        "reflect",  # it is the encoder of a style-transfer net
        {name: f"conv{name.replace('_', '')}" for name in _NAMES if name <= "5_1"},
        # RGB in [0,1] to Caffe's BGR in [0,255] minus mean
        {"conv0.weight": torch.Size((3, 3, 1, 1)), "conv0.bias": torch.Size((3,))},
    ),
}


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one layer. Not a module, so that no engine shards it and no checkpoint holds it."""

    layer: str
    preprocess: tuple[Tensor, Tensor]
    """Weight (3,3,1,1) and bias (3,): what is done to RGB in [0,1] before the first convolution."""
    convs: tuple[Conv, ...]
    padding: Literal["zeros", "reflect"]
    record: dict[str, Any]

    @property
    def min_px(self) -> int:
        """Smallest side of a picture that has this layer: one pixel of it, two where borders are mirrored."""
        return 2 ** (self.convs[-1].block - 1) * (2 if self.padding == "reflect" else 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            images: (B,3,H,W) RGB, meant to be in [0,1], not clamped: a clamp would stop the gradient.

        Returns:
            (B,C,h,w), h = H // 2^(block-1).

        Raises:
            ValueError: the pictures are smaller than `min_px`.
        """
        if min(images.shape[-2:]) < self.min_px:
            height, width = images.shape[-2:]
            raise ValueError(
                f"features.layer={self.layer} needs pictures of {self.min_px} px or more, not {height}x{width}: "
                "raise data.crop_px or choose an earlier layer"
            )
        x, block = F.conv2d(images, *self.preprocess), 1
        for conv in self.convs:
            if conv.block > block:
                x, block = F.max_pool2d(x, 2), conv.block
            if self.padding == "reflect":
                x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight, conv.bias)
            else:
                x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            if conv is not self.convs[-1] or self.layer.startswith("relu"):
                x = F.relu(x)
        return x

    def describe(self) -> dict[str, Any]:
        """For the run record: name, what (in words), layer, weights, sha256."""
        return dict(self.record)


def load_features(config: VggConfig, device: torch.device) -> Features:
    """Build the features that the configuration names.

    Raises:
        ValueError: no such layer; a file of another net; no published file of this net.
        OSError: the download failed.
    """
    arch = ARCHS[config.arch]
    names = _convs_to(config.layer, arch, config.arch)
    record: dict[str, Any] = {"name": config.arch, "layer": config.layer}
    std = torch.tensor(IMAGENET_STD)
    preprocess = [torch.diag(1 / std)[:, :, None, None], -torch.tensor(IMAGENET_MEAN) / std]  # (x - mean) / std
    if config.weights == "random":
        logger.warning("features.weights=random: SGR compares RANDOM %s features, not learned ones", config.arch)
        state = _random_state(_shapes(arch, names))
        record |= {"what": "VGG-19 with RANDOM weights (seed 0), nothing learned", "weights": "random", "sha256": None}
    else:
        path = _weights_path(config)
        state = load_state(path, setting="features.weights")
        shapes = _shapes(arch, names) | arch.preprocess
        check_state(state, shapes, setting=f"features.weights={path}", what=f"{config.arch} (features.arch)")
        record |= {"what": "VGG-19 with learned weights", "weights": str(path), "sha256": sha256_of(path)}
        preprocess = [state[name] for name in arch.preprocess] or preprocess

    def frozen(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32).requires_grad_(False)

    return Features(
        layer=config.layer,
        preprocess=(frozen(preprocess[0]), frozen(preprocess[1])),
        convs=tuple(
            Conv(int(name[0]), frozen(state[f"{arch.keys[name]}.weight"]), frozen(state[f"{arch.keys[name]}.bias"]))
            for name in names
        ),
        padding=arch.padding,
        record=record,
    )


def _convs_to(layer: str, arch: _Arch, arch_name: str) -> list[str]:
    """Names of the convolutions up to and with that of `layer`, which is conv<block>_<n> or relu<block>_<n>."""
    names = list(arch.keys)
    kind, name = layer[:4], layer[4:]
    if kind not in ("conv", "relu") or name not in names:
        raise ValueError(
            f"features.layer={layer}: {arch_name} has no such layer; it has "
            f"{', '.join(f'relu{name}' for name in names)}, and conv... for each, before its ReLU"
        )
    return names[: names.index(name) + 1]


def _shapes(arch: _Arch, names: list[str]) -> dict[str, torch.Size]:
    shapes, num_in = {}, 3
    for name in names:
        width = arch.widths[int(name[0]) - 1]
        shapes[f"{arch.keys[name]}.weight"] = torch.Size((width, num_in, 3, 3))
        shapes[f"{arch.keys[name]}.bias"] = torch.Size((width,))
        num_in = width
    return shapes


def _random_state(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """He-initialised weights and no biases, from a generator of its own: the same in every run and on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if len(shape) == 4
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def _weights_path(config: VggConfig) -> Path:
    if config.weights != "download":
        return Path(config.weights).expanduser()
    if config.arch != "vgg19":
        raise ValueError(f"features.weights=download: {config.arch} has no published file here; give its path")
    return fetch(VGG19)

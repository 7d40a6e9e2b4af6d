"""RCDNet (Wang et al., "A Model-driven Deep Neural Network for Single Image Rain Removal", 2020).

A picture O is a background B under the rain C * M: a dictionary of kernels C, one for all stages, laid down where the
maps M say. Each of S stages is a proximal gradient step on M and one on B, the proximal operators being small residual
nets; Z are channels that the background nets hand on beside the picture. Inside, pictures are on 0..255.

Key-compatible with the official checkpoints of both layouts. Written from the formulae.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.nets.batch_norm import SyncedBatchNorm2d
from dist_train.nets.stages import AfterStage, RestorationNet, Stage, Trace, channels_last_on_cpu

Norm = Callable[[int], nn.BatchNorm2d]

NORMS: dict[str, Norm] = {"synced": SyncedBatchNorm2d, "rank": nn.BatchNorm2d}
KERNEL_PX = 9


class ResBlock(nn.Sequential):
    """relu(x + y), where y is x after conv, norm, relu, conv, norm; channels and size are kept."""

    def __init__(self, channels: int, norm: Norm):
        def conv() -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, padding=1)

        super().__init__(conv(), norm(channels), nn.ReLU(inplace=True), conv(), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return F.relu(super().forward(x) + x)  # in this order a sum keeps the layout of the convolution's


class RainProx(nn.Sequential):
    """Proximal net of the maps: residual blocks, then relu(out - tau) with a threshold per channel."""

    def __init__(self, blocks: OrderedDict[str, nn.Module], channels: int):
        super().__init__(blocks)
        self.tau = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w), none negative."""
        return F.relu(super().forward(x) - self.tau)


class Unfolding(NamedTuple):
    """What the computation reads, whatever a layout calls it. Kernels and steps are ten times what is used."""

    first_kernels: Tensor
    """(3,M,9,9), which give the maps their start."""
    kernels: Tensor
    """(3,M,9,9), the rain dictionary C."""
    lift: Tensor
    """(Z,3,3,3), from the picture to the first Z."""
    threshold: Tensor
    """(1,), of the first guess at the rain."""
    rain_steps: Tensor
    """(S-1,1), of the maps, after each stage but the last."""
    background_steps: Tensor
    """(S,1)."""
    first: nn.Module
    rain: nn.ModuleList
    background: nn.ModuleList
    last: nn.Module


class Rcdnet(RestorationNet):
    """The computation; a subclass is a layout, which says in `unfolding` where its parts are.

    A stage's features are its Z, (B,num_z,H,W): the picture beside it stays one. `trace` gets `backgrounds`, B_0, those
    of the S stages and the restored picture, and `rains`, those of the S stages, all in [0,1].
    """

    def unfolding(self) -> Unfolding:
        """The parts by their meaning."""
        raise NotImplementedError

    def restore(self, padded: Tensor, after_stage: AfterStage, trace: Trace | None) -> Tensor:
        """See `RestorationNet.restore`."""
        net = self.unfolding()
        kernels = net.kernels / 10
        observed = channels_last_on_cpu(255 * padded)
        background, z = _split(net.first(torch.cat([observed, F.conv2d(observed, net.lift, padding=1)], 1)))
        backgrounds, rains = [] if trace is None else [background], []
        maps = _spread(F.relu(observed - background - net.threshold), net.first_kernels / 10)
        for stage, (rain_prox, background_prox) in enumerate(zip(net.rain, net.background, strict=True)):
            maps = rain_prox(maps)
            rain = _collect(maps, kernels)
            background = background - net.background_steps[stage] / 10 * (background - (observed - rain))
            background, z = _split(background_prox(torch.cat([background, z], 1)))
            z = after_stage(stage, z)
            if stage < len(net.rain_steps):
                maps = maps - net.rain_steps[stage] / 10 * _spread(rain - (observed - background), kernels)
            if trace is not None:  # else each picture would keep alive the features that it is a view of
                backgrounds.append(background)
                rains.append(rain)
        restored = _split(net.last(torch.cat([background, z], 1)))[0] / 255
        if trace is not None:
            trace["backgrounds"] = [*(picture / 255 for picture in backgrounds), restored]
            trace["rains"] = [rain / 255 for rain in rains]
        return restored


class OfficialRcdnet(Rcdnet):
    """Keys of RCDNet's release, the unread ones too.

    `eta1` and `mnet` want no gradient, so that nothing trains them. Of `conv` index 1 alone is read; the gradient of
    the others is zero.
    """

    def __init__(self, *, num_stages: int, num_m: int, num_z: int, num_res_blocks: int, batch_norm: str):
        super().__init__()
        norm = NORMS[batch_norm]
        kernels = initial_kernels(num_m)

        def background_prox() -> nn.Module:
            return nn.Sequential(_blocks((f"resx{i}" for i in range(1, num_res_blocks + 1)), num_z + 3, norm))

        def rain_prox() -> RainProx:
            return RainProx(_blocks((f"resm{i}" for i in range(1, num_res_blocks + 1)), num_m, norm), num_m)

        self.eta1 = nn.Parameter(torch.ones(1), requires_grad=False)
        self.eta2 = nn.Parameter(torch.full((1,), 5.0))
        self.eta11 = nn.Parameter(torch.ones(num_stages - 1, 1))
        self.eta12 = nn.Parameter(torch.full((num_stages - 1, 1), 5.0))
        self.weight0 = nn.Parameter(kernels.clone())
        self.conv = nn.Parameter(kernels.repeat(num_stages - 1, 1, 1, 1, 1))
        self.w_z_f = nn.Parameter(torch.full((num_z, 3, 3, 3), 1 / 9))
        self.tau = nn.Parameter(torch.ones(1))
        self.xnet = background_prox()
        self.mnet = rain_prox().requires_grad_(False)
        self.x_stage = nn.ModuleList(background_prox() for _ in range(num_stages))
        self.m_stage = nn.ModuleList(rain_prox() for _ in range(num_stages))
        self.fxnet = background_prox()
        self.stages = tuple(Stage(f"x_stage.{i}", num_z, 1) for i in range(num_stages))

    def unfolding(self) -> Unfolding:
        """See `Rcdnet.unfolding`."""
        return Unfolding(
            first_kernels=self.weight0,
            kernels=self.conv[1],
            lift=self.w_z_f,
            threshold=self.tau,
            rain_steps=self.eta11,
            background_steps=torch.cat([self.eta2[None], self.eta12]),
            first=self.xnet,
            rain=self.m_stage,
            background=self.x_stage,
            last=self.fxnet,
        )


class SimpleRcdnet(Rcdnet):
    """Keys of the authors' later RCDNet_simple, which has no unread ones and any number of residual blocks."""

    def __init__(self, *, num_stages: int, num_m: int, num_z: int, num_res_blocks: int, batch_norm: str):
        super().__init__()
        norm = NORMS[batch_norm]
        kernels = initial_kernels(num_m)

        def layer(channels: int) -> OrderedDict[str, nn.Module]:
            return OrderedDict(layer=nn.Sequential(_blocks(map(str, range(num_res_blocks)), channels, norm)))

        self.etaM_S = nn.Parameter(torch.ones(num_stages - 1, 1))
        self.etaB_S = nn.Parameter(torch.full((num_stages, 1), 5.0))
        self.C0 = nn.Parameter(kernels.clone())
        self.C = nn.Parameter(kernels.clone())
        self.C_z = nn.Parameter(torch.full((num_z, 3, 3, 3), 1 / 9))
        self.tau = nn.Parameter(torch.ones(1))
        self.proxNet_B_0 = nn.Sequential(layer(num_z + 3))
        self.proxNet_B_S = nn.ModuleList(nn.Sequential(layer(num_z + 3)) for _ in range(num_stages))
        self.proxNet_M_S = nn.ModuleList(RainProx(layer(num_m), num_m) for _ in range(num_stages))
        self.proxNet_B_last_layer = nn.Sequential(layer(num_z + 3))
        self.stages = tuple(Stage(f"proxNet_B_S.{i}", num_z, 1) for i in range(num_stages))

    def unfolding(self) -> Unfolding:
        """See `Rcdnet.unfolding`."""
        return Unfolding(
            first_kernels=self.C0,
            kernels=self.C,
            lift=self.C_z,
            threshold=self.tau,
            rain_steps=self.etaM_S,
            background_steps=self.etaB_S,
            first=self.proxNet_B_0,
            rain=self.proxNet_M_S,
            background=self.proxNet_B_S,
            last=self.proxNet_B_last_layer,
        )


LAYOUTS: dict[str, Callable[..., Rcdnet]] = {"official": OfficialRcdnet, "simple": SimpleRcdnet}


def build_rcdnet(*, layout: str, **settings: Any) -> Rcdnet:
    """A new RCDNet.

    Args:
        layout: whose names the weights bear, of LAYOUTS.
        settings: the other fields of `RcdnetConfig`.
    """
    return LAYOUTS[layout](**settings)


def initial_kernels(count: int) -> Tensor:
    """Rain kernels to start from: upright Gaussian bars, each longer than the one before.

    A family of our own, of the kind of the official one: that is a table of fitted streaks without a licence.

    Returns:
        (3,count,9,9), the same for the three channels, none negative, each of sum 0.5.
    """
    offsets = torch.arange(KERNEL_PX) - KERNEL_PX // 2
    across = torch.exp(-0.5 * (offsets / 0.35).square())
    along = torch.exp(-0.5 * (offsets / torch.linspace(0.5, 6, count)[:, None]).square())
    bars = along[:, :, None] * across
    return (0.5 * bars / bars.sum((1, 2), keepdim=True)).repeat(3, 1, 1, 1)


def _blocks(names: Iterable[str], channels: int, norm: Norm) -> OrderedDict[str, nn.Module]:
    return OrderedDict((name, ResBlock(channels, norm)) for name in names)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Picture and Z of what a background net gave."""
    return x[:, :3], x[:, 3:]


def _collect(maps: Tensor, kernels: Tensor) -> Tensor:
    """The rain C * M: (B,M,H,W) maps and (3,M,k,k) kernels -> (B,3,H,W)."""
    return F.conv2d(maps, kernels, padding=KERNEL_PX // 2)


def _spread(rain: Tensor, kernels: Tensor) -> Tensor:
    """The adjoint of `_collect`, (B,3,H,W) -> (B,M,H,W): a transposed convolution, written as the plain one it equals.

    With so few channels a CPU takes 5 times as long over `conv_transpose2d`.
    """
    return F.conv2d(rain, kernels.flip(-2, -1).transpose(0, 1), padding=KERNEL_PX // 2)

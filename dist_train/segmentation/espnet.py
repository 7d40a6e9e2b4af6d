"""ESPNet (Mehta et al., ECCV 2018, arXiv 1803.06815) as its official Cityscapes weights are laid out."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of Cityscapes' training frames, in grey levels, RGB. The official program works on BGR; so do its weights.
MEAN = (73.15840149, 82.90893555, 72.3923111)
STD = (44.91483307, 46.15289307, 45.3192215)
SIZE_PX = (512, 1024)
_EPS = 1e-3


class EspNet(nn.Module):
    """ESPNet with its light decoder; state dict of the official `espnet_p_*_q_*.pth`.

    Args:
        classes: 20 for Cityscapes, the last of them what is not labelled.
        p, q: how many ESP modules the second and third level have.
    """

    def __init__(self, *, classes: int = 20, p: int = 2, q: int = 8):
        super().__init__()
        self.encoder = _Encoder(classes, p, q)
        self.level3_C = _Conv(131, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=_EPS)
        self.conv = _ConvNormAct(classes + 16, classes)
        self.up_l3 = nn.Sequential(_double(classes))
        self.combine_l2_l3 = nn.Sequential(_NormAct(2 * classes), _Esp(2 * classes, classes, residual=False))
        self.up_l2 = nn.Sequential(_double(classes), _NormAct(classes))
        self.classifier = _double(classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B,3,H,W) RGB in [0,1] -> (B,classes,H,W) logits.

        As officially, pictures are seen at 1024x512; the logits are brought back to the pictures' size bilinearly,
        where the official program repeats the pixels of its decision.
        """
        mean, std = (pictures.new_tensor(value)[:, None, None] for value in (MEAN, STD))
        seen = F.interpolate((pictures * 255 - mean) / std / 255, SIZE_PX, mode="bilinear")
        half, quarter, eighth = self.encoder(seen.flip(1))
        coarse = torch.cat([self.level3_C(quarter), self.up_l3(self.br(eighth))], 1)
        fine = torch.cat([self.up_l2(self.combine_l2_l3(coarse)), half], 1)
        return F.interpolate(self.classifier(self.conv(fine)), pictures.shape[-2:], mode="bilinear")


def espnet_like(state: Mapping[str, Tensor]) -> tuple[EspNet, str]:
    """The net that these weights are of, not filled with them, and its title."""
    classes = state["level3_C.conv.weight"].shape[0]
    p, q = (sum(name.startswith(f"encoder.{level}.") and name.endswith(".c1.conv.weight") for name in state)
            for level in ("level2", "level3"))  # fmt: skip
    return EspNet(classes=classes, p=p, q=q), f"ESPNet p{p} q{q}"


class _Encoder(nn.Module):
    def __init__(self, classes: int, p: int, q: int):
        super().__init__()
        self.level1 = _ConvNormAct(3, 16, stride=2)
        self.b1 = _NormAct(19)
        self.level2_0 = _EspDown(19, 64)
        self.level2 = nn.Sequential(*(_Esp(64, 64) for _ in range(p)))
        self.b2 = _NormAct(131)
        self.level3_0 = _EspDown(131, 128)
        self.level3 = nn.Sequential(*(_Esp(128, 128) for _ in range(q)))
        self.b3 = _NormAct(256)
        self.classifier = _Conv(256, classes, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at a half and a quarter of the size, class scores at an eighth."""
        halved = F.avg_pool2d(pictures, 3, stride=2, padding=1)
        quartered = F.avg_pool2d(halved, 3, stride=2, padding=1)
        half = self.level1(pictures)
        first = self.level2_0(self.b1(torch.cat([half, halved], 1)))
        quarter = self.b2(torch.cat([self.level2(first), first, quartered], 1))
        first = self.level3_0(quarter)
        return half, quarter, self.classifier(self.b3(torch.cat([first, self.level3(first)], 1)))


class _Conv(nn.Module):
    """A convolution without bias, padded to keep the size; with a name more, as in the official files."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _NormAct(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=_EPS)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class _ConvNormAct(_NormAct):
    def __init__(self, c_in: int, c_out: int, *, stride: int = 1):
        super().__init__(c_out)
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x))


class _Pyramid(nn.Module):
    """Reduce, five dilated convolutions in parallel, and hierarchical fusion: the sums of the first ones, joined."""

    def __init__(self, c_in: int, c_out: int, *, kernel: int, stride: int):
        super().__init__()
        width = c_out // 5
        self.c1 = _Conv(c_in, width, kernel, stride=stride)
        self.d1 = _Conv(width, c_out - 4 * width)
        self.d2, self.d4, self.d8, self.d16 = (_Conv(width, width, dilation=dilation) for dilation in (2, 4, 8, 16))

    def spread(self, x: Tensor) -> Tensor:
        reduced = self.c1(x)
        parts = [self.d1(reduced), self.d2(reduced)]
        for dilated in (self.d4, self.d8, self.d16):
            parts.append(parts[-1] + dilated(reduced))
        return torch.cat(parts, 1)


class _Esp(_Pyramid):
    def __init__(self, c_in: int, c_out: int, *, residual: bool = True):
        super().__init__(c_in, c_out, kernel=1, stride=1)
        self.bn = _NormAct(c_out)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x + self.spread(x) if self.residual else self.spread(x))


class _EspDown(_Pyramid):
    """Halves the size. That its norm lies one name higher than in `_Esp` is the official files' way."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, kernel=3, stride=2)
        self.bn = nn.BatchNorm2d(c_out, eps=_EPS)
        self.act = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.spread(x)))


def _double(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)

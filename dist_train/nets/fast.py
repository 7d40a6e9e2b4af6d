"""Nets that restore the same, faster, where that was measured: `python -m launch.bench nets --variant plain fast`."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dist_train.nets.efficientderain import EfficientDerain
from dist_train.nets.rcdnet import Rcdnet, ResBlock
from dist_train.nets.stages import RestorationNet

Rewrite = Callable[[nn.Module], None]
"""Changes a net in eval mode in place, but not what it computes, rounding excepted."""


def prepare_for_inference(net: RestorationNet, *, device: torch.device | str, compile: bool = False) -> nn.Module:
    """A net for restoring on `device`: the fastest that is known to equal this one.

    Args:
        net: any net of `NETS`; left as it is.
        device: what it will run on, and is moved to.
        compile: also hand it to torch.compile, which takes a minute or more at the first picture and some at the
            second size, and then pays off only on many pictures.

    Returns:
        A copy in eval mode without gradients, (B,3,H,W) -> (B,3,H,W), equal to `net` but for rounding (1e-6 of the
        largest value). Its weights are not for saving.
    """
    fast = copy.deepcopy(net).eval().requires_grad_(False).to(device)
    for rewrite in rewrites(net, device):
        rewrite(fast)
    return torch.compile(fast) if compile else fast


def rewrites(net: nn.Module, device: torch.device | str) -> tuple[Rewrite, ...]:
    """What is done to a net of this kind on this kind of device; nothing if nothing is known to help."""
    kind = torch.device(device).type
    return next((steps[kind] for of, steps in FAST.items() if isinstance(net, of) and kind in steps), ())


def lay_channels_last(net: nn.Module) -> None:
    """Store pictures and the weights of convolutions channels last; the features are then laid out so too."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    net.register_forward_pre_hook(_picture_channels_last)


def _picture_channels_last(net: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])


def fold_batch_norm(net: nn.Module) -> None:
    """Put `FoldedResBlock` in the place of every `ResBlock`."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ResBlock):
                setattr(parent, name, FoldedResBlock(child))


class FoldedResBlock(nn.Module):
    """A `ResBlock` in eval mode: its batch norms are factors and offsets of the convolutions before them."""

    def __init__(self, block: ResBlock):
        super().__init__()
        conv1, norm1, _, conv2, norm2 = block
        self.conv1 = fuse_conv_bn_eval(conv1, norm1)
        self.conv2 = fuse_conv_bn_eval(conv2, norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        # A sum of two layouts takes 5 times as long as one of the same.
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu_(self.conv2(F.relu_(self.conv1(x))).add_(x))


# Behind it, how many times faster restoring was on a CPU core: the interleaved run in configs/RESULTS.md.
FAST: dict[type[nn.Module], dict[str, tuple[Rewrite, ...]]] = {
    Rcdnet: {"cpu": (fold_batch_norm, lay_channels_last)},  # 1.07 at 256 px, 1.26 at 96 px
    EfficientDerain: {"cpu": (lay_channels_last,)},  # 1.10 at 256 px
    # NAFNet and Uformer are channels last already: 1.0.
}
"""Kind of net -> type of device -> what makes it faster. What is not here was not faster, or not tried (no GPU was)."""

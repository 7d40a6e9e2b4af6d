"""What a net costs on paper: parameters and multiplications, counted on tensors without data."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import NetConfig, RegionsConfig, SpfConfig
from dist_train.nets import build_net
from dist_train.nets.fusion import Teacher
from dist_train.priors.masks import MaskSet


class Cost(NamedTuple):
    """Of one pass over one picture."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and matrix products; sums, norms and activations do not count, as usual."""


def net_cost(config: NetConfig, *, height: int, width: int) -> Cost:
    """Cost of a net as it is deployed."""
    with torch.device("meta"):
        return _cost(build_net(config).eval(), torch.empty(1, 3, height, width))


def spf_cost(config: NetConfig, *, height: int, width: int, every: int) -> Cost:
    """Cost of the SPF units alone, which a teacher of this kind has beside its net.

    Args:
        every: a unit after every n-th stage. Their width and the number of masks are the defaults of the configuration.
    """
    num_masks = RegionsConfig().num_masks
    with torch.device("meta"):
        net = build_net(config).eval()
        teacher = Teacher(net, num_masks=num_masks, every=every, max_channels=SpfConfig().max_channels)
        lq = torch.empty(1, 3, height, width)
        masks = MaskSet(lq.new_empty(1, num_masks, height, width, dtype=torch.bool), lq.new_empty(1, num_masks) > 0)
        whole, alone = _cost(teacher, lq, masks), _cost(net, lq)
    return Cost(whole.parameters - alone.parameters, whole.macs - alone.macs)


def _cost(net: nn.Module, *inputs: object) -> Cost:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    return Cost(sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2)

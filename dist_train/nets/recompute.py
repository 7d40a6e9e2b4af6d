"""Activation checkpointing: less memory in training for about a third more time in the net that does it."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_train.nets.efficientderain import ConvTriple
from dist_train.nets.nafnet import NafBlock
from dist_train.nets.uformer import LeWinBlock

BLOCKS = (NafBlock, LeWinBlock, ConvTriple)


def recompute_blocks(net: nn.Module) -> None:
    """Let every block keep its input alone in training, and compute the rest again in the backward pass.

    The same numbers come out bit by bit, dropped paths included; keys of the state dict do not change. Only blocks that
    give the same numbers twice may do this: RCDNet's batch norms would count each picture twice.

    Args:
        net: NAFNet, Uformer or EfficientDerain, or a module that holds one.
    """
    blocks = [module for module in net.modules() if isinstance(module, BLOCKS)]
    assert blocks, "the configuration allows this for nets with such blocks alone"
    for block in blocks:
        block.forward = partial(_twice, block, block.forward)  # type: ignore[method-assign]


def _twice(block: nn.Module, forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if block.training else forward(*inputs)

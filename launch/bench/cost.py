"""What nets cost on paper: parameters, multiplications and numbers moved, counted on tensors without data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import NetConfig, RegionsConfig, SpfConfig
from dist_train.nets import build_net
from dist_train.nets.fusion import Teacher
from dist_train.priors.automatic import AutomaticMasks, Frame
from dist_train.priors.masks import MaskSet
from dist_train.priors.sam_decoder import share
from dist_train.priors.sam_resize import logit_taps, picture_taps


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


class Spent(NamedTuple):
    """By some computation."""

    macs: float
    """Multiply-accumulates of convolutions and matrix products; all else has next to none."""
    numbers: float
    """That operations read and write, each operation by itself, fused attention as one; of whatever type. What a
    compiler fuses, or a cache holds, need not come from the memory."""

    def __add__(self, other: "Spent") -> "Spent":  # type: ignore[override]
        return Spent(self.macs + other.macs, self.numbers + other.numbers)

    def __mul__(self, times: float) -> "Spent":  # type: ignore[override]
        return Spent(self.macs * times, self.numbers * times)


class SamCost(NamedTuple):
    """Of SAM's automatic mode, by generator.

    Not in it: resizing a picture; the reference's filters, which come after its masks have their size; and what is made
    of the masks that are left, of which ours decodes all `num_masks` once more.
    """

    per_picture: dict[str, Spent]
    per_prompt: dict[str, Spent]


_PROMPTS = 64  # at a time, who share what is read of the weights


def sam_cost(build: Callable[[], Any], *, height: int = 256, width: int = 256) -> SamCost:
    """Count what a picture and a prompt cost."""
    with torch.random.fork_rng():
        sam = build().to("meta").eval()
    side, meta = sam.image_encoder.img_size, torch.device("meta")
    picture = torch.empty(1, 3, side, side, device=meta)
    positions = sam.prompt_encoder.get_dense_pe()
    prompts = positions.new_empty(_PROMPTS, 2, positions.shape[1])  # a point, and the padding that stands for no box
    used = [round(length * side / max(height, width)) for length in (height, width)]
    encoder, embedding = _counted(lambda: sam.image_encoder(picture))

    def ask() -> Tensor:
        logits, _ = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=positions,
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=embedding.expand(_PROMPTS, -1, -1, -1),
            multimask_output=True,
        )
        return sam.postprocess_masks(logits, used, (height, width))

    asking, _ = _counted(ask)
    ours, logits = AutomaticMasks(sam), 4 * embedding.shape[-1]
    frame = Frame(
        size=(height, width),
        input_size=(used[0], used[1]),
        rows=picture_taps(height, used[0]).to(meta),
        columns=picture_taps(width, used[1]).to(meta),
        logit_rows=logit_taps(logits, side, used[0], height).to(meta),
        logit_columns=logit_taps(logits, side, used[1], width).to(meta),
        prompts=prompts[None],
        positions=positions,
        dense=torch.empty_like(positions),
    )
    fused, embedding = _counted(lambda: sam.image_encoder(picture) + frame.dense)
    sharing, shared = _counted(lambda: share(sam.mask_decoder, embedding, positions))
    scoring, _ = _counted(lambda: ours._score_some(shared, frame.prompts, frame))
    needed = fused._replace(macs=encoder.macs)  # and not what our attention does to spare the memory
    return SamCost(
        {"reference": encoder, "batched": needed + sharing},
        {"reference": asking * (1 / _PROMPTS), "batched": scoring * (1 / _PROMPTS)},
    )


def _counted(compute: Callable[[], Any]) -> tuple[Spent, Any]:
    with FlopCounterMode(display=False) as counter, _Numbers() as moved, _AttentionAsOne(moved), torch.no_grad():
        found = compute()
    return Spent(counter.get_total_flops() / 2, moved.num), found


class _Numbers(TorchDispatchMode):
    """Counts what operations read and write; those that only look at a tensor otherwise do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.num, self.within = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count."""
        out = func(*args, **(kwargs or {}))
        looks = func.is_view or func is torch.ops.aten._unsafe_view.default
        if not looks and not self.within:
            self.count(args, kwargs, out)
        return out

    def count(self, *of: Any) -> None:
        """Numbers of all tensors in it; of one that is expanded those that it has."""
        for x in tree_leaves(of):
            if isinstance(x, Tensor):
                self.num += min(x.numel(), x.untyped_storage().nbytes() // x.element_size())


class _AttentionAsOne(TorchFunctionMode):
    """Counts attention as a kernel does it that keeps its scores to itself."""

    def __init__(self, numbers: _Numbers):
        super().__init__()
        self._numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; in attention nothing is counted but what goes in and out."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._numbers.within = True
        out = func(*args, **(kwargs or {}))
        self._numbers.within = False
        self._numbers.count(args, kwargs, out)
        return out

"""Students that see masks beside the picture: CAT and MAP of SAM-Deblur (Li et al. 2023), on any net.

Masks become groups: one number per pixel, 0 in none. CAT shows the net a grey picture of them. MAP, mask average
pooling, gives each group the mean of a small encoder's features, and the rest of the picture theirs:

    a_k = sum(E m_k) / sum(m_k);  rest = 1 - min(sum_k m_k, 1);  MAP = sum_k a_k m_k + a_rest rest

NAFNet takes these channels as the official nets do, and its weights keep the official names. Any other net gets them
through a convolution in front of it that starts at zero.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config import ConditioningConfig, Grouping
from dist_train.nets.nafnet import Nafnet
from dist_train.nets.stages import AfterStage, RestorationNet, Trace
from dist_train.priors.masks import MaskSet

NUM_GREYS = 256


def mask_average(features: Tensor, masks: Tensor) -> Tensor:
    """Mask average pooling of masks that may overlap, where they add up; `group_average` is for those that do not.

    Computed in float32 whatever autocast says, since areas of a picture are summed.

    Args:
        features: (B,S,H,W).
        masks: (B,K,H,W), float or bool; rows of zeros change nothing.

    Returns:
        (B,S,H,W) float32.
    """
    with _without_autocast(features):
        regions = masks.float()
        regions = torch.cat([regions, 1 - regions.sum(1, keepdim=True).clamp(0, 1)], 1).flatten(2)
        sums = features.float().flatten(2) @ regions.mT  # (B,S,K+1)
        means = sums / (regions.sum(2)[:, None] + 1e-8)
        return (means @ regions).view(features.shape)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where there is such a thing: tensors without data know none."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class Groups(NamedTuple):
    """Masks of a batch that do not overlap."""

    ids: Tensor
    """(B,H,W) int64 in 0..num; 0: in no group, the rest."""
    num: int
    """How many there may be; those that are absent cost next to nothing."""


def group_average(features: Tensor, groups: Groups, *, value: float = 1.0) -> Tensor:
    """Mask average pooling of groups, of all pictures in one sum and one look-up.

    Summed in float64, whatever autocast says: one accumulator takes a whole picture.

    Args:
        features: (B,S,H,W), any float; the gradient flows to them.
        groups: of the same pictures.
        value: what a group's pixel counts for, in (0,1]; the rest has the remaining share of it.

    Returns:
        (B,S,H,W) float32.
    """
    with _without_autocast(features):
        index, flat = groups.ids.flatten(1)[:, None], features.flatten(2).double()  # (B,1,HW), (B,S,HW)
        where = index.expand_as(flat)
        area = flat.new_zeros(len(flat), 1, groups.num + 1).scatter_add_(2, index, torch.ones_like(flat[:, :1]))
        sums = flat.new_zeros(*flat.shape[:2], groups.num + 1).scatter_add(2, where, flat)
        # The rest: pixels of no group, and what `value` leaves of the others.
        share = flat.new_full((groups.num + 1,), 1 - value)
        share[0] = 1
        rest = (sums @ share / (area @ share + 1e-8))[..., None]
        means = value * sums[..., 1:] / area[..., 1:].clamp(min=1) + (1 - value) * rest
        return torch.cat([rest, means], 2).gather(2, where).view(features.shape).float()


def group_masks(masks: MaskSet, grouping: Grouping) -> Groups:
    """Masks that may overlap as groups that do not, which cover the whole picture; see `ConditioningConfig.grouping`.

    Returns:
        grey: ids are 1 + the grey value. idmap: 1 where there is no mask, 2 + k where the k-th largest is the smallest
        that covers.
    """
    if grouping == "grey":
        return Groups(1 + grey_sum(masks), NUM_GREYS)
    return Groups(1 + masks.idmap(), 1 + masks.masks.shape[1])


def grey_values(num_masks: int, *, device: torch.device | str) -> Tensor:
    """Grey value of each mask in the official preparation, (K,) int32: 2, 4, .. 254, then 255, 253, .. down."""
    number = torch.arange(num_masks, dtype=torch.int32, device=device)
    return torch.where(number < 127, 2 * (number + 1), 2 * (255 - number) - 1)


def grey_sum(masks: MaskSet) -> Tensor:
    """The official grey picture of masks: the sum of their values, cut to 0..255; (B,H,W) int64."""
    shown = masks.masks & masks.valid[:, :, None, None]
    grey = torch.zeros_like(shown[:, 0], dtype=torch.int32)
    for mask, value in zip(shown.unbind(1), grey_values(shown.shape[1], device=grey.device), strict=True):
        grey += mask * value
    return grey.clamp(0, NUM_GREYS - 1).long()


def drop_groups(groups: Groups, *, order: Tensor, share: float) -> Groups:
    """Mask dropout (training): of the M groups that a picture holds exactly int(share * M) become part of the rest.

    Args:
        groups: of a batch.
        order: (B,N) int64, N >= groups.num: a permutation of 0..N-1 per picture, in which group id g is g - 1; those
            that come first are dropped.
        share: 0.5 in the official model, 0 in its MAP without dropout.
    """
    index = groups.ids.flatten(1)
    there = order.new_zeros(len(order), order.shape[1] + 1, dtype=torch.bool).scatter_(1, index, True)[:, 1:]
    num_dropped = (there.sum(1, keepdim=True).double() * share).long()
    in_order = there.gather(1, order)
    kept = ~(in_order & (in_order.cumsum(1) <= num_dropped))
    keeps = F.pad(torch.zeros_like(there).scatter_(1, order, kept), (1, 0))  # by id
    return groups._replace(ids=groups.ids * keeps.gather(1, index).view(groups.ids.shape))


class SeesMasks(nn.Module):
    """A net that restores pictures with their masks, by CAT or MAP: `groups` of masks, and `channels` made of them."""

    wants_masks = True

    def _see(self, conditioning: ConditioningConfig) -> None:
        """Set up; the official files have the encoder's weights before the net's."""
        self.conditioning = conditioning
        if conditioning.method == "map":
            self.pre_seg = nn.Conv2d(3, conditioning.map_channels, 3, padding=1)
            self.pre_seg_in = nn.Conv2d(conditioning.map_channels, conditioning.map_channels, 1)

    def forward(
        self,
        lq: Tensor,
        masks: MaskSet,
        after_stage: AfterStage | None = None,
        trace: Trace | None = None,
        *,
        drop_order: Tensor | None = None,
    ) -> Tensor:
        """Restore a batch of any size.

        Args:
            lq: (B,3,H,W) float RGB in [0,1].
            masks: of these pictures.
            after_stage, trace: see `RestorationNet.forward`.
            drop_order: for training with mask dropout; see `drop_groups`.

        Returns:
            (B,3,H,W), not clamped.
        """
        raise NotImplementedError

    def groups(self, masks: MaskSet, drop_order: Tensor | None = None) -> Groups:
        """What the net sees of masks, without those that `drop_order` drops; see `drop_groups`."""
        groups, share = group_masks(masks, self.conditioning.grouping), self.conditioning.mask_dropout
        return groups if drop_order is None else drop_groups(groups, order=drop_order, share=share)

    def channels(self, image: Tensor, groups: Groups) -> Tensor:
        """(B,3,H,W) and its groups -> (B,num_channels,H,W) float32."""
        if self.conditioning.method == "map":
            features = self.pre_seg_in(self.pre_seg(image))
            return group_average(features, groups, value=self.conditioning.mask_value)
        grey = (groups.ids - 1).clamp(min=0)
        if self.conditioning.grouping == "idmap":  # which has numbers of masks, not greys
            grey = F.pad(grey_values(groups.num - 1, device=grey.device), (1, 0))[grey].clamp(min=0)
        return grey[:, None].float() / (NUM_GREYS - 1)


class ConditionedNafnet(Nafnet, SeesMasks):
    """NAFNet with a wider first convolution: the official MaskNAFNet (CAT) and SegNAFNet (MAP).

    Args:
        conditioning: what it sees of the masks.
        nafnet: arguments of `Nafnet`, but for extra_channels.
    """

    def __init__(self, *, conditioning: ConditioningConfig, **nafnet: Any):
        super().__init__(extra_channels=conditioning.num_channels, **nafnet)
        behind = list(self.named_children())
        for name, _ in behind:
            delattr(self, name)
        self._see(conditioning)
        for name, module in behind:
            setattr(self, name, module)

    def forward(  # type: ignore[override]
        self,
        lq: Tensor,
        masks: MaskSet,
        after_stage: AfterStage | None = None,
        trace: Trace | None = None,
        *,
        drop_order: Tensor | None = None,
    ) -> Tensor:
        """See `SeesMasks.forward`."""
        return self.restore_groups(lq, self.groups(masks, drop_order), after_stage, trace)

    def restore_groups(
        self, lq: Tensor, groups: Groups, after_stage: AfterStage | None = None, trace: Trace | None = None
    ) -> Tensor:
        """`forward` with groups instead of masks; what is padded is in no group, as in the official net."""
        height, width = lq.shape[-2:]
        padding = self.padding(height, width)
        image, groups = F.pad(lq, padding), groups._replace(ids=F.pad(groups.ids, padding))
        seen = torch.cat([image, self.channels(image, groups).to(image.dtype)], 1)
        return super().forward(seen, after_stage, trace)[..., :height, :width]


class ConditionedNet(SeesMasks):
    """Any other net behind a convolution of picture and mask channels, added to the picture, that starts at zero.

    So it starts as the plain net, whose weights keep their names, under `net.`.

    Args:
        net: maps (B,3,H,W) to the same.
        conditioning: what it sees of the masks.
    """

    def __init__(self, net: RestorationNet, *, conditioning: ConditioningConfig):
        super().__init__()
        self._see(conditioning)
        self.front = nn.Conv2d(3 + conditioning.num_channels, 3, 3, padding=1)
        nn.init.zeros_(self.front.weight)
        assert self.front.bias is not None
        nn.init.zeros_(self.front.bias)
        self.net = net

    def forward(
        self,
        lq: Tensor,
        masks: MaskSet,
        after_stage: AfterStage | None = None,
        trace: Trace | None = None,
        *,
        drop_order: Tensor | None = None,
    ) -> Tensor:
        """Restore a batch of any size; see `SeesMasks.forward`."""
        seen = self.channels(lq, self.groups(masks, drop_order))
        return self.net(lq + self.front(torch.cat([lq, seen.to(lq.dtype)], 1)), after_stage, trace)

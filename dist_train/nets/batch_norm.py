"""Batch norm over the ranks: 1 rank with 4 samples equals 2 ranks with 2.

torch's own SyncBatchNorm refuses the CPU, where our ranks speak gloo.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import ranks


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics, in training, are those of the pass on all ranks together.

    Every rank must bring as many samples of the same size. The running statistics are then equal on all ranks, bit by
    bit. Statistics are float32 whatever the features are. Alone, or in eval mode, it is `nn.BatchNorm2d`.

    With `nn.BatchNorm2d` itself every rank follows its own samples, and the main rank's running statistics are the ones
    that are saved, as the official DataParallel keeps those of its first replica.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w) of the same dtype."""
        if not self.training or ranks.world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        num_values = x.numel() // x.shape[1] * ranks.world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * num_values / (num_values - 1), self.momentum)
        self.num_batches_tracked += 1
        return y


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over all ranks.

    One all-reduce each way. Ranks average their gradients, so what comes back for `weight` and `bias` is this rank's
    part, and for `x` the gradient of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise; the mean and the biased variance, (C,), come back too, without a gradient."""
        every = x.new_zeros((ranks.world_size(), 2, x.shape[1]), dtype=torch.float32)
        every[ranks.rank()] = torch.stack(torch.var_mean(x.float(), (0, 2, 3), correction=0))
        dist.all_reduce(every)  # of zeros and one rank's own: a gather that gloo and NCCL both know
        variances, means = every.unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)  # no difference of large squares
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients to x, weight and bias."""
        x, weight, mean, variance = ctx.saved_tensors
        rstd = torch.rsqrt(variance + ctx.eps)
        # As if mean and variance were constants ...
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, rstd, False, ctx.eps, [True, True, True]
        )
        # ... and what goes through them.
        both = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(both)
        of_mean, of_variance = both * weight * rstd / (x.numel() // x.shape[1] * ranks.world_size())
        slope = of_variance * rstd
        offset = of_mean - slope * mean
        through = torch.addcmul(offset[:, None, None], slope[:, None, None], x)
        return grad_x - through, grad_weight, grad_bias, None

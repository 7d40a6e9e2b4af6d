"""The learning rate as a pure function of the step, so that resuming has no scheduler to restore."""

import math

from dist_train.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Rate of the optimizer step that follows `step` finished ones: linear warm-up, then the schedule."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "step":
        return max(optim.lr * optim.step_gamma ** (step // optim.step_every), optim.min_lr)
    start = max(optim.warmup_steps, optim.decay_from if optim.schedule == "linear" else 0)
    done = min(max(step - start, 0) / max(optim.steps - start, 1), 1.0)
    if optim.schedule == "linear":
        return optim.lr + (optim.min_lr - optim.lr) * done
    if optim.schedule == "cosine":
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done)) / 2
    return optim.lr

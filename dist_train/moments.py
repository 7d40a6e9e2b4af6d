"""Adam's moments under DeepSpeed: gathered from the ranks, and handed out again at any world size and ZeRO stage.

DeepSpeed's own ways do not serve: its checkpoints cross neither world sizes nor stages, and its setter of a whole
moment fails in stage 3 where the size is no multiple of the world, as the three biases of an RGB output are. Where each
stage keeps a parameter's moments:

- 0: with the parameter, whole on every rank.
- 1, 2: all parameters laid end to end, one slice per rank (`_hp_mapping` tells which part of which); one parameter
  group, hence one slice.
- 3: each parameter cut into equal parts, one per rank, the last padded.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train import ranks

KEYS = ("exp_avg", "exp_avg_sq")


def read_moments(engine: Any, task: nn.Module) -> dict[str, Any]:
    """Gather Adam's state. All ranks call; all get it.

    Args:
        engine: DeepSpeed's, with one parameter group.
        task: the module it wraps.

    Returns:
        `exp_avg` and `exp_avg_sq`, each {name of parameter: float32 of its shape, on the CPU}, zero before the first
        step; and `step`, how often Adam has stepped.
    """
    stage, state, named = engine.zero_optimization_stage(), _torch_optimizer(engine).state, _trained(task)
    owners = _owners(engine, task)
    if not state.get(owners[0]):
        zero = {name: torch.zeros(_shape(parameter)) for name, parameter in named.items()}
        return {"step": 0} | {key: dict(zero) for key in KEYS}
    result: dict[str, Any] = {"step": int(state[owners[0]]["step"])}
    for key in KEYS:
        if stage == 0:
            whole = {name: state[parameter][key] for name, parameter in named.items()}
        elif stage == 3:
            whole = {name: engine.optimizer.get_full_hp_param(parameter, key) for name, parameter in named.items()}
        else:
            whole = {name: _join(parameter, state[owners[0]][key]) for name, parameter in named.items()}
        result[key] = {name: tensor.detach().float().cpu().clone() for name, tensor in whole.items()}
    return result


def write_moments(engine: Any, task: nn.Module, moments: dict[str, Any]) -> None:
    """Give each rank its part of what `read_moments` returned, at whatever world size and stage that was."""
    stage, state = engine.zero_optimization_stage(), _torch_optimizer(engine).state
    owners = _owners(engine, task)
    for owner in owners:
        state[owner] = {key: torch.zeros_like(owner) for key in KEYS}
        state[owner]["step"] = torch.tensor(float(moments["step"]))
    for name, parameter in _trained(task).items():
        for key in KEYS:
            whole = moments[key][name].to(owners[0].device)
            if stage == 0:
                state[parameter][key].copy_(whole)
            elif stage == 3:
                part, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
                start = part.numel() * ranks.rank()
                mine = whole.flatten()[start : start + part.numel()]
                part[: mine.numel()].copy_(mine)
            elif (held := parameter._hp_mapping) is not None:  # this rank owns a part of it
                here, there = held.hp_fragment_address, held.lp_fragment_address
                target = state[owners[0]][key].narrow(0, here.start, here.numel)
                target.copy_(whole.flatten().narrow(0, there.start, there.numel))


def _join(parameter: Any, flat: Tensor) -> Tensor:
    """Stages 1, 2: each rank puts its part of the parameter into zeros; the sum is the whole."""
    whole = torch.zeros(parameter.numel(), device=parameter.device)  # not the moments': they may be offloaded
    if (held := parameter._hp_mapping) is not None:
        here, there = held.hp_fragment_address, held.lp_fragment_address
        whole.narrow(0, there.start, there.numel).copy_(flat.narrow(0, here.start, here.numel))
    dist.all_reduce(whole)
    return whole.view_as(parameter)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's own optimizer under DeepSpeed's."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _owners(engine: Any, task: nn.Module) -> list[Any]:
    """The tensors that torch's optimizer knows, under which its state is kept on this rank."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_trained(task).values())
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    (flat,) = engine.optimizer.single_partition_of_fp32_groups
    return [flat]


def _trained(task: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty parameter behind

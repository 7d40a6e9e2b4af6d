"""The training engine: DeepSpeed ZeRO behind a few calls, and the only home of deepspeed in the library.

accelerate (or torchrun, or nothing) starts the processes; `deepspeed.initialize` is called here directly with a
configuration built from the run, so there is no second file of settings that could drift. DeepSpeed as it really
behaves:

- `gradient_clipping` is always written: its default of 1.0 would couple student and teacher through one joint norm.
- one parameter group: with more, moments are lost (stages 1, 2) and learning rates mixed up (stage 3).
- half precision is `torch_autocast`: parameters and moments stay float32, stages 1-3 agree, nothing is cast unasked.
- the rate is set from a pure function of the step before each step, so resuming has no scheduler to restore.
- its checkpoints cross neither world sizes nor stages; `weights` and `moments` gather everything instead, bit by bit
  the same on resume at the same size, and loadable at any other.
"""

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train import ranks
from dist_train.config import BatchPlan, OptimConfig, RunConfig
from dist_train.data.batch import Batch
from dist_train.priors import Priors
from dist_train.tasks import build_task

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Resumable(Protocol):
    """What the engine takes on from a checkpoint (`dist_train.checkpoint.Checkpoint`)."""

    @property
    def state(self) -> dict[str, Any]:
        """Holds `step`."""

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """State dict of the averaged student."""

    @property
    def moments(self) -> dict[str, Any]:
        """What `Engine.moments` gave."""


def start_ranks(run: RunConfig) -> torch.device:
    """Join the process group (of one, if unlaunched) and pick this rank's device.

    Raises:
        ValueError: CUDA is wanted and absent, or the launcher asks for another ZeRO stage than the run.
    """
    if run.engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda, but torch sees no GPU; set engine.device=cpu, or run launch.doctor")
    on_cuda = run.engine.device != "cpu" and torch.cuda.is_available()
    if run.engine.precision == "fp16" and not on_cuda:
        raise ValueError("engine.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    _check_launcher(run)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(ranks.local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # unlaunched: DeepSpeed still wants a group and the variables of a launcher
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        timeout = timedelta(seconds=run.engine.hang_timeout_s)
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout)
    return torch.device("cuda", ranks.local_rank()) if on_cuda else torch.device("cpu")


def _check_launcher(run: RunConfig) -> None:
    """accelerate hands its DeepSpeed settings down in variables; where they contradict the run, neither may win."""
    said = {
        "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "engine.zero_stage", str(run.engine.zero_stage)),
        "mixed_precision": (
            "ACCELERATE_MIXED_PRECISION",
            "engine.precision",
            run.engine.precision.replace("fp32", "no"),
        ),
        "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "optim.clip_norm", str(run.optim.clip_norm)),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "the run's own settings", "none"),
    }
    for setting, (variable, key, wanted) in said.items():
        launched = os.environ.get(variable, "none")
        # accelerate always says mixed_precision, and "no" where nobody asked
        if launched not in (wanted, "none", "no"):
            raise ValueError(
                f"the launcher says {setting}={launched} and the run {key}={wanted}; leave {setting} out of the "
                "accelerate file and command, since the run decides"
            )


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_config(run: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run; every value that matters is written, none is left to a default."""
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.batch_per_rank,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": run.optim.clip_norm,
        "zero_optimization": {
            "stage": run.engine.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,  # torch's own Adam
        "steps_per_print": 2**31,
    }
    if run.engine.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[run.engine.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return config


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


class Engine:
    """A task under DeepSpeed: micro-batches in, all-reduced means out.

    Args:
        run: the run.
        task: `forward(batch, priors, measure=...) -> losses`, with the weights to start from; its child `student` is
            what the moving average follows.
        plan: how the global batch is shared out.
        device: of this rank.
        resumed: the checkpoint whose weights the task already holds: its step, moments and average are taken on.
    """

    def __init__(
        self,
        run: RunConfig,
        task: nn.Module,
        plan: BatchPlan,
        device: torch.device,
        *,
        resumed: "Resumable | None" = None,
    ):
        deepspeed = _import_deepspeed()
        self.run, self.task, self.plan, self.device = run, task.to(device), plan, device
        self.step_count: int = resumed.state["step"] if resumed else 0
        self._gathered = deepspeed.zero.GatheredParameters
        optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[run.optim.name]
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        optimizer = optimizer_class(
            trained, lr=run.optim.lr, betas=run.optim.betas, weight_decay=run.optim.weight_decay, eps=1e-8
        )
        self._ema: dict[str, Tensor] | None = None
        if run.optim.ema_decay > 0:
            average = (resumed.ema if resumed else None) or self._student.state_dict()
            self._ema = {name: tensor.detach().to(device, copy=True) for name, tensor in average.items()}
        self._engine, *_ = deepspeed.initialize(
            model=self.task, optimizer=optimizer, config=deepspeed_config(run, plan), dist_init_required=False
        )
        if resumed:
            self._set_moments(resumed.moments)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bad_steps_in_a_row = 0

    @property
    def _student(self) -> nn.Module:
        student = self.task.student
        assert isinstance(student, nn.Module)
        return student

    def step(self, batches: Iterator[Batch], priors: Priors, *, measure: bool = False) -> None:
        """One optimizer step: `grad_accum` micro-batches on every rank.

        If a total is not finite on any rank, no rank uses that micro-batch: all run the same pass on a grey picture
        with weight 0 instead, which keeps DeepSpeed's hooks and collectives in step, and the step's learning rate
        becomes 0, so that the weights stay as they are.

        Raises:
            RuntimeError: on all ranks, after `engine.max_bad_steps` such steps in a row, or if the weights are broken.
        """
        self._set_rate(learning_rate(self.run.optim, self.step_count))
        # Nets that draw (dropped paths) draw the same after a resume; no random state has to be kept.
        torch.manual_seed((self.run.seed << 40) + (self.step_count << 16) + ranks.rank())
        bad = False
        for _ in range(self.plan.grad_accum):
            batch = next(batches).to(self.device)
            terms = self._engine(batch, priors, measure=measure)
            total = terms["total"]
            if ranks.agree(bool(torch.isfinite(total))):
                self._add(terms)
            else:
                if not torch.isfinite(total):
                    values = {name: float(value) for name, value in terms.items()}
                    log.warning("step %d is skipped, a loss is not finite: %s %s", self.step_count, batch.keys, values)
                bad = True
                self._set_rate(0.0)
                total = 0.0 * self._engine(batch.grey(), priors)["total"]
                if not ranks.agree(bool(torch.isfinite(total))):
                    raise RuntimeError(
                        f"the weights are no longer finite at step {self.step_count}; resume from the last checkpoint "
                        "with a smaller optim.lr, or set optim.clip_norm"
                    )
            self._engine.backward(total)
            self._engine.step()  # DeepSpeed acts on the last micro-batch only
        self.step_count += 1
        self._bad_steps_in_a_row = self._bad_steps_in_a_row + 1 if bad else 0
        if self._bad_steps_in_a_row >= self.run.engine.max_bad_steps:
            raise RuntimeError(
                f"the loss was not finite in {self._bad_steps_in_a_row} steps in a row (engine.max_bad_steps); "
                "the log names the samples; a smaller optim.lr or optim.clip_norm may help"
            )
        if not bad:
            self._update_ema()

    def _set_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _update_ema(self) -> None:
        if self._ema is None:
            return
        # Early on the average follows fast, so that it forgets the random start.
        decay = min(self.run.optim.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        with self._whole(self._student), torch.no_grad():
            for name, tensor in self._student.state_dict().items():
                average = self._ema[name]
                if average.is_floating_point():
                    average.lerp_(tensor.to(average.dtype), 1 - decay)
                else:
                    average.copy_(tensor)

    # --------------------------------------------------------------------------------------------- what is logged

    def _add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self.device)) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """Means of all terms since the last call, over micro-batches and ranks. All ranks call."""
        means = {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}
        self._sums, self._counts = {}, {}
        return ranks.mean_dict(means) if means else {}

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        return self._engine.optimizer.param_groups[0]["lr"]

    # --------------------------------------------------------------------------- everything in one place, for files

    @contextlib.contextmanager
    def _whole(self, module: nn.Module) -> Iterator[None]:
        """Parameters of `module` in full on every rank (stage 3 shards them); others are whole anyway."""
        if self.run.engine.zero_stage < 3:
            yield
            return
        with self._gathered(list(module.parameters())):
            yield

    def weights(self) -> dict[str, Tensor]:
        """Full state dict of the task in float32, copied to the CPU. All ranks call; all get it."""
        with self._whole(self.task):
            return {name: tensor.detach().cpu().clone() for name, tensor in self.task.state_dict().items()}

    def ema_weights(self) -> dict[str, Tensor] | None:
        """State dict of the averaged student on the CPU, or None if the run keeps none."""
        return None if self._ema is None else {name: tensor.cpu().clone() for name, tensor in self._ema.items()}

    def whole_task(self) -> nn.Module:
        """A plain copy of the task with whole weights and the averaged student, in eval mode, on this rank's device.

        It has no hooks of DeepSpeed, so ranks may run it by themselves and each as often as it likes. All ranks call.
        """
        view = build_task(self.run)
        view.load_state_dict(self.weights())
        if (ema := self.ema_weights()) is not None:
            view.get_submodule("student").load_state_dict(ema)
        return view.to(self.device).eval()

    def moments(self) -> dict[str, Any]:
        """Adam's state, whole. All ranks call; all get it.

        Returns:
            `exp_avg` and `exp_avg_sq`, each {name of parameter: (shape of parameter) float32 on the CPU}; `step`, how
            often Adam has stepped; `scaler`, the state of the fp16 loss scale or None.
        """
        state = self._optimizer.state
        named = self._named_parameters()
        first = next(iter(state.values()), None)
        result: dict[str, Any] = {"step": int(first["step"]) if first else 0, "scaler": None}
        if (scaler := self._scaler) is not None:
            result["scaler"] = scaler.state_dict()
        for key in MOMENTS:
            if self.run.engine.zero_stage == 0:
                full = {name: state[parameter][key] for name, parameter in named.items()}
            elif self.run.engine.zero_stage == 3:
                gather = self._engine.optimizer.get_full_hp_param
                full = {name: gather(parameter, key) for name, parameter in named.items()}
            else:
                full = self._gather_fragments(state[self._flat_partition][key])
            result[key] = {name: tensor.detach().float().cpu().clone() for name, tensor in full.items()}
        return result

    def _set_moments(self, moments: dict[str, Any]) -> None:
        state, named, stage = self._optimizer.state, self._named_parameters(), self.run.engine.zero_stage
        owners = {
            0: lambda: list(named.values()),
            1: lambda: [self._flat_partition],
            2: lambda: [self._flat_partition],
            3: lambda: self._engine.optimizer.fp32_partitioned_groups_flat,
        }[stage]()
        for owner in owners:
            state[owner] = {key: torch.zeros_like(owner) for key in MOMENTS}
            state[owner]["step"] = torch.tensor(float(moments["step"]))
        for key in MOMENTS:
            for name, parameter in named.items():
                full = moments[key][name].to(self.device)
                if stage == 0:
                    state[parameter][key].copy_(full)
                elif stage == 3:
                    self._set_partition(parameter, full, key)
                elif (fragment := parameter._hp_mapping) is not None:  # this rank owns a part of it
                    here, there = fragment.hp_fragment_address, fragment.lp_fragment_address
                    target = state[self._flat_partition][key].narrow(0, here.start, here.numel)
                    target.copy_(full.flatten().narrow(0, there.start, there.numel))
        if moments["scaler"] is not None and self._scaler is not None:
            self._scaler.load_state_dict(moments["scaler"])

    def _set_partition(self, parameter: Any, full: Tensor, key: str) -> None:
        # DeepSpeed's own setter of a whole moment fails where the size is no multiple of the world, as 3 biases are.
        part, _ = self._engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        start = part.numel() * ranks.rank()
        mine = full.flatten()[start : start + part.numel()]
        part[: mine.numel()].copy_(mine)

    def _gather_fragments(self, flat: Tensor) -> dict[str, Tensor]:
        """Stages 1, 2: each rank holds a slice of all parameters laid end to end; their sum is the whole."""
        full = {}
        for name, parameter in self._named_parameters().items():
            whole = torch.zeros(parameter.numel(), device=flat.device)
            if (fragment := parameter._hp_mapping) is not None:
                here, there = fragment.hp_fragment_address, fragment.lp_fragment_address
                source = flat.narrow(0, here.start, here.numel)
                whole.narrow(0, there.start, there.numel).copy_(source)
            dist.all_reduce(whole)
            full[name] = whole.view_as(parameter)
        return full

    def _named_parameters(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.task.named_parameters() if parameter.requires_grad}

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimizer under DeepSpeed's."""
        outer = self._engine.optimizer
        return outer if self.run.engine.zero_stage == 0 else outer.optimizer

    @property
    def _flat_partition(self) -> Tensor:
        (flat,) = self._engine.optimizer.single_partition_of_fp32_groups  # one, because there is one parameter group
        return flat

    @property
    def _scaler(self) -> Any:
        """fp16's loss scaler, if any."""
        if self.run.engine.zero_stage == 0:
            return self._engine.torch_autocast_z0_gradscaler
        return getattr(self._engine.optimizer, "torch_autocast_gradscaler", None)

    def close(self) -> None:
        """Take DeepSpeed's hooks off."""
        self._engine.destroy()


def _import_deepspeed() -> Any:
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as ops

    # Compiled at first use with g++ (25 s, and a killed compile leaves a lock); only inference uses it.
    ops["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed

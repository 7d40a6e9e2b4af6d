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
- its groups of ranks give up after torch's defaults, 10 minutes with NCCL, before the watchdog can tell who hangs.
- stages 1 to 3 skip a step whose gradients are not finite, stage 0 does not; under fp16 the loss scale never falls, and
  clipping sees gradients that still carry it. `Engine` mends these.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_train import ranks
from dist_train.config import BatchPlan, RunConfig
from dist_train.data.batch import Batch
from dist_train.data.order import NETS, draws
from dist_train.meters import RunningMeans
from dist_train.moments import read_moments, write_moments
from dist_train.nets.recompute import recompute_blocks
from dist_train.nonfinite import StepGuard
from dist_train.priors import Priors
from dist_train.schedule import learning_rate
from dist_train.spans import Span, no_span, spend_in
from dist_train.tasks import build_task

log = logging.getLogger(__name__)

COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
)  # fmt: skip
"""Methods of DeepSpeed's backend. Its own way to time them waits for the GPU after each."""


class Resumable(Protocol):
    """What the engine takes on from a checkpoint (`dist_train.checkpoint.Checkpoint`)."""

    @property
    def state(self) -> dict[str, Any]:
        """Holds `step`, `skipped_steps`, `unlogged` and `env`."""

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """State dict of the averaged student."""

    @property
    def moments(self) -> dict[str, Any]:
        """What `Engine.moments` gave."""


def deepspeed_config(run: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run; every value that matters is written, none is left to a default."""
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.batch_per_rank,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": run.optim.clip_norm if run.engine.zero_stage else 0.0,  # stage 0: see `_before_update`
        "zero_optimization": {
            "stage": run.engine.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,  # torch's own Adam
        "steps_per_print": 2**31,
    }
    if run.engine.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's Adam there too: its own would be compiled
    if run.engine.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[run.engine.precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return config


class Engine:
    """A task under DeepSpeed: micro-batches in, all-reduced means out.

    Args:
        run: the run.
        task: `forward(batch, priors, measure=...) -> losses`, with the weights to start from; its child `student` is
            what the moving average follows.
        plan: how the global batch is shared out.
        device: of this rank.
        resumed: the checkpoint whose weights the task already holds: its step, moments and average are taken on.
        span: held around the parts of a step: backward, communication, update.
    """

    def __init__(
        self,
        run: RunConfig,
        task: nn.Module,
        plan: BatchPlan,
        device: torch.device,
        *,
        resumed: "Resumable | None" = None,
        span: Span = no_span,
    ):
        deepspeed = _import_deepspeed()
        self.run, self.task, self.plan, self.device = run, task.to(device), plan, device
        self.step_count: int = resumed.state["step"] if resumed else 0
        self._gathered = deepspeed.zero.GatheredParameters
        optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[run.optim.name]
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        torch_optimizer = optimizer_class(
            trained, lr=run.optim.lr, betas=run.optim.betas, weight_decay=run.optim.weight_decay, eps=1e-8
        )
        self._ema: dict[str, Tensor] | None = None
        if run.optim.ema_decay > 0:
            average = (resumed.ema if resumed else None) or self._student.state_dict()
            self._ema = {name: tensor.detach().to(device, copy=True) for name, tensor in average.items()}
        if run.engine.recompute_teacher:
            recompute_blocks(task.get_submodule("teacher"))
        if run.engine.compile:
            for net in self.task.children():
                net.compile()
        self._engine, *_ = deepspeed.initialize(
            model=self.task, optimizer=torch_optimizer, config=deepspeed_config(run, plan), dist_init_required=False
        )
        ranks.set_patience(self._engine.data_parallel_group, run.engine.slow_timeout_s)
        self._span = span
        spend_in(span, "communication", deepspeed.comm.comm.cdb, COLLECTIVES)
        if resumed:
            write_moments(self._engine, self.task, resumed.moments)
            if self._scaler is not None and resumed.moments["scaler"] is not None:
                self._scaler.load_state_dict(resumed.moments["scaler"])
        self._losses = RunningMeans()
        if resumed and "unlogged" in resumed.state:
            passes = plan.grad_accum / resumed.state["env"]["batch"]["grad_accum"]
            self._losses.load(resumed.state["unlogged"], passes=passes)
        self._buffers = list(self.task.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self._skipped = False
        self._guard = StepGuard(run, task, num_skipped=resumed.state.get("skipped_steps", 0) if resumed else 0)

    @property
    def _student(self) -> nn.Module:
        student = self.task.student
        assert isinstance(student, nn.Module)
        return student

    def step(self, batches: Iterator[Batch], priors: Priors, *, measure: bool = False) -> None:
        """One optimizer step: `grad_accum` micro-batches on every rank.

        If any gradient of any rank is not finite, the step does not happen: weights, moments and average stay as they
        are on all ranks, and what it would have logged is dropped.

        Raises:
            TrainingError: on all ranks, after `engine.max_bad_steps` such steps in a row.
        """
        self._set_rate(learning_rate(self.run.optim, self.step_count))
        # Nets that draw (dropped paths) draw the same after a resume; no random state has to be kept.
        draw = draws(self.run.seed, self.step_count * ranks.world_size() + ranks.rank(), NETS, 1)[0]
        torch.manual_seed(draw >> 1)
        # Batch norm's statistics move in the forward pass: if the step does not happen, they go back.
        _copy(self._buffers, self._buffers_before)
        self._guard.begin()
        for micro_step in range(self.plan.grad_accum):
            batch = next(batches).to(self.device)
            terms = self._engine(batch, priors, measure=measure)
            self._guard.see(batch, terms)
            with self._span("backward"):
                self._engine.backward(terms["total"])
            with self._span("update"):
                if micro_step == self.plan.grad_accum - 1:
                    self._before_update()
                self._engine.step()  # DeepSpeed acts on the last micro-batch only
        self.step_count += 1
        if self.run.engine.zero_stage > 0:
            self._skipped = bool(self._engine.optimizer.overflow)  # the ranks have agreed on it
        if self._skipped:
            _copy(self._buffers_before, self._buffers)
            if not self._lower_scale():
                self._guard.skipped(self.step_count)
            return
        self._guard.passed()
        for _, terms in self._guard.seen:
            self._losses.add(terms)
        with self._span("update"):
            self._update_ema()

    def _before_update(self) -> None:
        """Mend what DeepSpeed leaves out between the last gradient and the update."""
        if self.run.engine.zero_stage == 0:
            # Stages 1 to 3 look for gradients that are not finite and skip the step; stage 0 does not. They are
            # all-reduced by now, so every rank finds the same. Without gradients Adam touches nothing.
            parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            self._skipped = not bool(torch.isfinite(norm))
            if self._skipped:
                for parameter in parameters:
                    parameter.grad = None
            elif self.run.optim.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip_norm, norm)
        elif (scaler := self._scaler) is not None:
            # DeepSpeed clips while the gradients still carry the loss scale.
            self._engine.optimizer.clip_grad = self.run.optim.clip_norm * scaler.get_scale()

    def _lower_scale(self) -> bool:
        """Whether the step was skipped in fp16's search for a loss scale. It falls, which DeepSpeed never lets it."""
        scaler = self._scaler
        if scaler is None or not self._guard.losses_are_finite() or scaler.get_scale() <= 1:
            return False
        scaler.update(scaler.get_scale() / 2)
        log.info("step %d is skipped: fp16's loss scale falls to %g", self.step_count, scaler.get_scale())
        return True

    @property
    def num_skipped(self) -> int:
        """Steps of the run that did not happen, for a number was not finite."""
        return self._guard.num_skipped

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

    def drain(self) -> dict[str, float]:
        """Means of all terms since the last call, over micro-batches and ranks. All ranks call."""
        return self._losses.drain()

    def unlogged(self) -> list[dict[str, tuple[float, float]]]:
        """What `drain` has not given yet, for `state` of a checkpoint. All ranks call."""
        return self._losses.state()

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
            state = {name: tensor.detach().cpu().clone() for name, tensor in self.task.state_dict().items()}
        return state | _statistics_of_main(self.task, state)

    def ema_weights(self) -> dict[str, Tensor] | None:
        """State dict of the averaged student on the CPU, or None if the run keeps none. All ranks call; all get it."""
        if self._ema is None:
            return None
        state = {name: tensor.cpu().clone() for name, tensor in self._ema.items()}
        return state | _statistics_of_main(self._student, state)

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
        """Adam's state, whole, on the CPU; see `dist_train.moments`. All ranks call; all get it."""
        scaler = self._scaler
        return read_moments(self._engine, self.task) | {"scaler": scaler.state_dict() if scaler else None}

    @property
    def _scaler(self) -> Any:
        """fp16's loss scaler, or None."""
        return self._engine.optimizer.torch_autocast_gradscaler if self.run.engine.precision == "fp16" else None

    def close(self) -> None:
        """Take DeepSpeed's hooks off."""
        self._engine.destroy()


def _copy(tensors: list[Tensor], to: list[Tensor]) -> None:
    if tensors:  # torch refuses none
        torch._foreach_copy_(to, tensors)


def _statistics_of_main(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main rank's running statistics. Where each rank's batch norm follows its own samples they differ, and what is
    saved and validated must not depend on who looks."""
    names = [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    return ranks.broadcast_object({name: state[name] for name in names}) if names else {}


def _import_deepspeed() -> Any:
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as ops

    # Compiled at first use with g++ (25 s, and a killed compile leaves a lock); only inference uses it.
    ops["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed

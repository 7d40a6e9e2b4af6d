"""A step that is skipped because a number is not finite: which rank, which samples, which number."""

import json
import logging
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_train import ranks
from dist_train.config import RunConfig
from dist_train.data.batch import Batch
from dist_train.ranks import TrainingError

log = logging.getLogger(__name__)

NAMED = 3
"""Ranks that a message names."""


@dataclass(frozen=True)
class Finding:
    """The first number of a rank that is not finite."""

    rank: int
    host: str
    what: str
    """For example `sgr is nan`."""
    keys: tuple[str, ...]
    positions: list[int]
    """Of the samples in the global stream."""

    def __str__(self) -> str:
        samples = ", ".join(f"{key} (position {at})" for key, at in zip(self.keys, self.positions, strict=True))
        return f"rank {self.rank} on {self.host}: {self.what}; its samples: {samples}"


class StepGuard:
    """Keeps what a step has computed until it is known to have happened, and tells why it has not.

    Losses name themselves. Gradients are looked at one by one, which costs a pass over each, only while the step before
    was skipped too (or `max_bad_steps` is 1): the first that is not finite, in the order in which they are computed,
    is nearest to the cause.

    Args:
        run: names the folder, RUN/bad_steps, and `engine.max_bad_steps`.
        task: what is trained.
        num_skipped: steps skipped before.

    Attributes:
        seen: the micro-batches of the step and their terms.
        num_skipped: steps skipped so far.
    """

    def __init__(self, run: RunConfig, task: nn.Module, *, num_skipped: int = 0) -> None:
        self._folder, self._limit = run.dir / "bad_steps", run.engine.max_bad_steps
        self._parameters = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
        self.seen: list[tuple[Batch, dict[str, Tensor]]] = []
        self.num_skipped, self._in_a_row = num_skipped, 0
        self._hooks: list[RemovableHandle] = []
        self._gradients: list[tuple[Batch, str, Tensor]] = []
        if self._limit == 1:
            self._look_at_gradients()

    def begin(self) -> None:
        """A step begins."""
        self.seen, self._gradients = [], []

    def see(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """One micro-batch's terms, before the backward pass."""
        self.seen.append((batch, {name: value.detach().float() for name, value in terms.items()}))

    def losses_are_finite(self) -> bool:
        """Whether they are on all ranks. All ranks call."""
        return ranks.agree(all(bool(terms["total"].isfinite()) for _, terms in self.seen))

    def passed(self) -> None:
        """The step has happened."""
        self._in_a_row = 0
        if self._hooks and self._limit > 1:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def skipped(self, step: int) -> None:
        """The step has not happened, on any rank. All ranks call.

        Raises:
            TrainingError: on all ranks, after `engine.max_bad_steps` such steps in a row; the first rank that found
                something has written its micro-batch.
        """
        self.num_skipped += 1
        self._in_a_row += 1
        mine = self._find()
        findings = [finding for finding in ranks.gather_objects(mine and mine[0]) if finding]
        found = "\n".join(str(finding) for finding in findings[:NAMED]) or "a gradient, though all losses are finite"
        if len(findings) > NAMED:
            found += f"\nand {len(findings) - NAMED} more ranks"
        if ranks.is_main():
            log.warning("step %d is skipped, for something is not finite:\n%s", step, found)
        if self._in_a_row >= self._limit:
            writes = mine is not None and findings[0].rank == ranks.rank()
            written = ranks.gather_objects(self._dump(step, *mine) if mine and writes else "")
            raise TrainingError(
                f"gradients were not finite in {self._in_a_row} steps in a row (engine.max_bad_steps), up to step "
                f"{step}. The last of them, on {len(findings)} of {ranks.world_size()} ranks:\n{found}\n"
                f"{''.join(written)}A smaller optim.lr or optim.clip_norm may help"
            )
        if not self._hooks:
            self._look_at_gradients()

    def _look_at_gradients(self) -> None:
        for name, parameter in self._parameters:
            self._hooks.append(parameter.register_hook(partial(self._look, name)))

    def _look(self, name: str, gradient: Tensor) -> None:
        self._gradients.append((self.seen[-1][0], name, gradient.isfinite().all()))

    def _find(self) -> tuple[Finding, Batch] | None:
        """What this rank has computed that is not finite."""
        for batch, terms in self.seen:
            for name, value in terms.items():
                if not value.isfinite():
                    return _finding(batch, f"{name} is {value.item()}"), batch
        for batch, name, finite in self._gradients:
            if not finite:
                return _finding(batch, f"the gradient of {name}, the losses being finite"), batch
        return None

    def _dump(self, step: int, finding: Finding, batch: Batch) -> str:
        """Write a micro-batch; tells where it is."""
        path = self._folder / f"step-{step:08d}-rank{finding.rank}"
        (terms,) = [terms for seen, terms in self.seen if seen is batch]
        told = {
            "step": step,
            **vars(finding),
            "geometry": batch.geometry.tolist(),
            "terms": {name: value.item() for name, value in terms.items()},
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"lq": batch.lq.cpu().contiguous(), "gt": batch.gt.cpu().contiguous()}, f"{path}.safetensors")
            Path(f"{path}.json").write_text(json.dumps(told, indent=1) + "\n")
        except (SafetensorError, OSError) as error:
            return f"{path} could not be written: {error}. "
        return f"Its pictures, lq and gt, are in {path}.safetensors, all else in {path}.json. "


def _finding(batch: Batch, what: str) -> Finding:
    return Finding(ranks.rank(), socket.gethostname(), what, batch.keys, batch.positions.tolist())

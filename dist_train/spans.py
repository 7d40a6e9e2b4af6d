"""Where the time of a step goes: a clock that is always in exactly one phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch

Span = Callable[[str], AbstractContextManager[None]]
"""Given a phase's name, the block in which it lasts: a `Spans`, or `no_span`."""

OTHER = "other"
"""The phase outside all others."""
ASIDE = ("validation", "pictures", "checkpoint", "trace")
"""Phases that are no part of a step. What lies inside one is of it."""
OWN = ("data", "student", "prior", "teacher", "features", "losses")
"""Phases in which a rank waits for no other, but for synced batch norms and ZeRO-3's weights."""
OPEN_MARKS = 512
"""Marks that wait to be read. Those behind are old enough for a GPU to have passed them."""


def no_span(phase: str) -> AbstractContextManager[None]:
    """For code whose time nobody wants to know."""
    return nullcontext()


def spend_in(span: Span, phase: str, owner: object, methods: Iterable[str]) -> None:
    """Let each call of these methods of an object be a phase, and no longer that of an earlier `spend_in`."""
    for name in methods:
        setattr(owner, name, _spent_in(span, phase, getattr(type(owner), name).__get__(owner)))


def _spent_in(span: Span, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with span(phase):
            return method(*args, **options)

    return call


class Spent(NamedTuple):
    """What a phase took."""

    seconds: float
    times: int
    """How often it began."""


class Spans:
    """Adds up the time of phases: `with spans("teacher"): ...`.

    Inside another phase, a phase takes its time away from that one, so that the phases and `other` add up to the time
    that has passed. On a GPU it is the time of the GPU's queue, read when it is asked for: nothing waits for it, and
    what the host does while the queue is busy counts for nothing. What runs beside the queue, on another stream, counts
    where the queue waits for it. In a profiler's trace each phase is a range of its name.

    Args:
        device: whose time.

    Attributes:
        broke_in: the innermost phase that an exception has left; for last words.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._phases = [OTHER]
        self.broke_in: str | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._times: dict[str, int] = defaultdict(int)
        self._marks = [(OTHER, self._now())]

    @property
    def phase(self) -> str:
        """The innermost phase that lasts."""
        return self._phases[-1]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The block is this phase."""
        self._times[phase] += 1
        self._phases.append(phase)
        self._mark()
        try:
            with torch.profiler.record_function(phase):
                yield
        except BaseException:
            self.broke_in = self.broke_in or phase
            raise
        finally:
            self._phases.pop()
            self._mark()

    def take(self, phases: Collection[str] | None = None) -> dict[str, Spent]:
        """What was spent since the last call, by phase; waits until a GPU has come here.

        Args:
            phases: only these; if none of them has begun, nothing waits. None: all, `other` among them.
        """
        if phases is not None and not any(phase in self._times for phase in phases):
            return {}
        self._mark()
        self._read(len(self._marks) - 1)
        wanted = [phase for phase in self._seconds if phases is None or phase in phases]
        return {phase: Spent(self._seconds.pop(phase), self._times.pop(phase, 0)) for phase in wanted}

    def _mark(self) -> None:
        aside = next((phase for phase in self._phases if phase in ASIDE), self.phase)
        self._marks.append((aside, self._now()))
        if len(self._marks) > OPEN_MARKS:
            self._read(OPEN_MARKS // 2)

    def _now(self) -> Any:
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.default_stream(self._gpu))
        return event

    def _read(self, count: int) -> None:
        for (phase, begun), (_, ended) in pairwise(self._marks[: count + 1]):
            if self._gpu is None:
                self._seconds[phase] += ended - begun
            else:
                ended.synchronize()
                self._seconds[phase] += begun.elapsed_time(ended) / 1000
        del self._marks[:count]

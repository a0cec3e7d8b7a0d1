"""What a rank counts about its own pipeline, and the samples and summaries made of it."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

_KEPT_OBSERVATIONS = 10_000


@dataclass
class PipelineCounters:
    """Totals since the start of the process.

    Attributes:
        completed: Inversions whose results this rank received, by method (courier ranks only).
        inversion_seconds: (method, seconds) of results not yet reported; the newest, where nobody asks.
        step_seconds: (phase, seconds) of steps not yet reported; likewise.
        adoptions: Versions swapped in.
        fallbacks: Block-steps in which no usable snapshot or the staleness policy changed the update, by reason.
        staleness: Per step, the largest staleness over the groups.
        bytes: Payload bytes by purpose, this rank's share.
        phase_seconds: Host seconds of the last step by phase.
    """

    completed: Counter[str] = field(default_factory=Counter)
    inversion_seconds: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_OBSERVATIONS))
    step_seconds: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_OBSERVATIONS))
    adoptions: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    staleness: list[int] = field(default_factory=list)
    bytes: Counter[str] = field(default_factory=Counter)
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase of the step on the host."""
        begun = perf_counter()
        try:
            yield
        finally:
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + perf_counter() - begun


class LateTotal:
    """A sum of counts that live on the device, as of a little earlier: reading them now would wait for it."""

    def __init__(self) -> None:
        self._known = 0.0
        self._copy: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def latest(self, counts: Iterable[torch.Tensor]) -> float:
        """Returns the newest total that has reached the host, and sends for a newer one; 0 where there are none."""
        if self._copy is not None and self._event is not None:
            if not self._event.query():
                return self._known
            self._known = float(self._copy)
        scalars = [count.double() for count in counts]
        if not scalars:
            return self._known
        total = torch.stack(scalars).sum()
        if total.device.type != "cuda":
            return float(total)
        self._copy = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
        self._copy.copy_(total, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return self._known

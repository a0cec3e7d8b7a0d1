"""What a rank counts about its own pipeline, and the samples and summaries made of it."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

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

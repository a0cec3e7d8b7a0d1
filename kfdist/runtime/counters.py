"""What a rank counts about its own pipeline."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from kfdist.comm.host_copy import LateTotal
from kfdist.telemetry.durations import Durations

_KEPT_OBSERVATIONS = 10_000
_EXACT_BITS = 10


class Histogram:
    """Counts whole numbers in bounded memory: exact below 1024, to 0.2 % above.

    Attributes:
        count: How many there were.
        largest: The largest, exactly; 0 before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0
        self._counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        """Counts a number, at least 0."""
        dropped_bits = max(value.bit_length() - _EXACT_BITS, 0)
        self._counts[value >> dropped_bits << dropped_bits] += 1
        self.count += 1
        self.largest = max(self.largest, value)

    def quantile(self, q: float) -> int:
        """Returns the number that a share `q` of all is at most; 0 before the first."""
        left = min(int(q * self.count), self.count - 1)
        for value, count in sorted(self._counts.items()):
            left -= count
            if left < 0:
                return value
        return 0


@dataclass
class PipelineCounters:
    """Totals since the start of the process.

    Attributes:
        steps: Steps made.
        completed: Inversions whose results this rank received, by method (courier ranks only).
        inversion_seconds: (method, seconds) of results not yet reported; the newest, where nobody asks.
        step_seconds: (phase, seconds) of steps not yet reported; likewise.
        inversions: By method, the seconds of results since they were last taken by `take_inversions`.
        adoptions: Versions swapped in.
        outgrown: Inversions out of turn, because damping had fallen below what the inverse in use was made for.
        failures: Adopted results without a preconditioner, by reason.
        degraded: Adopted blocks whose inversion didn't go as configured, by outcome.
        resent: Broadcasts that reached some rank with a wrong digest and were made again; the same on all ranks.
        fallbacks: Block-steps in which no usable snapshot or the staleness policy changed the update, by reason.
        staleness: The largest staleness over the groups, one number a step.
        phase_seconds: Host seconds of the last step by phase.
        waited_seconds: Seconds of the last step spent in agreed waits.
        adoption_waits: Those of the steps that waited, not yet reported; the newest, where nobody asks.
        kl_clip_factor: nu of the newest step that clipped, a scalar on the device; None before one.
        kl_clip: Brings it to the host.
        trust_ratio: The reduction ratio that an AdaptiveStep last measured; None without one.
        adaptive_damping: lambda of an AdaptiveStep, in whose place `settings.damping` has no effect.
        drops: Batches dropped as non-finite; lives on the device.
        replaced: Directions that methods replaced, by reason; live on the device.
    """

    steps: int = 0
    completed: Counter[str] = field(default_factory=Counter)
    inversion_seconds: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_OBSERVATIONS))
    step_seconds: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_OBSERVATIONS))
    inversions: defaultdict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))
    adoptions: int = 0
    outgrown: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    staleness: Histogram = field(default_factory=Histogram)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    waited_seconds: float = 0.0
    adoption_waits: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_OBSERVATIONS))
    kl_clip_factor: Tensor | None = None
    kl_clip: LateTotal = field(default_factory=LateTotal)
    trust_ratio: float | None = None
    adaptive_damping: float | None = None
    drops: LateTotal = field(default_factory=LateTotal)
    replaced: defaultdict[str, LateTotal] = field(default_factory=lambda: defaultdict(LateTotal))

    def late_kl_clip_factor(self) -> float | None:
        """Returns the factor of the KL clip as of a little earlier; None where it hasn't clipped."""
        if self.kl_clip_factor is None:
            return None
        factor = self.kl_clip.latest([self.kl_clip_factor])
        return factor if self.kl_clip.arrived else None

    def begin_step(self) -> None:
        """Forgets what was measured of the last step."""
        self.phase_seconds = {}
        self.waited_seconds = 0.0

    def end_step(self, staleness: int) -> None:
        """Counts a step.

        Args:
            staleness: The largest over the groups.
        """
        self.steps += 1
        self.staleness.add(staleness)
        self.step_seconds.extend(self.phase_seconds.items())
        if self.waited_seconds:
            self.adoption_waits.append(self.waited_seconds)

    def inverted(self, method: str, seconds: float) -> None:
        """Counts an inversion whose result this rank received."""
        self.completed[method] += 1
        self.inversion_seconds.append((method, seconds))
        self.inversions[method].add(seconds)

    def take_inversions(self) -> dict[str, Durations]:
        """Returns the seconds of inversions by method since the last call."""
        taken = dict(self.inversions)
        self.inversions.clear()
        return taken

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase of the step on the host."""
        begun = perf_counter()
        try:
            yield
        finally:
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + perf_counter() - begun

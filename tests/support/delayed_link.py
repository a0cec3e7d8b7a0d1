"""A real local link whose results come late, in another order, or twice, and whose settings a test controls."""

import random
import time
from collections.abc import Callable, Sequence

from kfdist.links.local import LocalLink
from kfdist.types import JobResult, RunSettings, Sample


class DelayedLink(LocalLink):
    """Inverts as `LocalLink` does and hands results over late.

    A result becomes visible after a random number of polls, of which a rank makes one per step or round of a wait, so
    the scenario doesn't depend on how fast the machine is; random pauses shift the ranks against each other on top.

    Args:
        seed: Seeds every delay; give each rank its own.
        longest_polls: Longest delay of a result; a later one may overtake an earlier one of another group.
        longest_pause_seconds: Longest pause at a poll.
        twice: Deliver every result a second time, later.

    Attributes:
        wanted: What `settings` returns; a test may replace it at any time.
        withhold: Results for which this is true are kept back until it is replaced.
        told: The (step, phase) that the rank told.
    """

    def __init__(
        self, *, seed: int = 0, longest_polls: int = 0, longest_pause_seconds: float = 0.0, twice: bool = False
    ) -> None:
        super().__init__()
        self.wanted = RunSettings()
        self.withhold: Callable[[JobResult], bool] = lambda _: False
        self.told: list[tuple[int, str]] = []
        self._random = random.Random(seed)
        self._longest_polls = longest_polls
        self._longest_pause_seconds = longest_pause_seconds
        self._twice = twice
        self._polls = 0
        self._on_the_way: list[tuple[int, JobResult]] = []

    def poll(self) -> list[JobResult]:
        """Returns the results whose time has come."""
        self._polls += 1
        if self._longest_pause_seconds:
            time.sleep(self._random.uniform(0.0, self._longest_pause_seconds))
        for result in super().poll():
            self._send(result)
            if self._twice:
                self._send(result)
        arrived = [each for due, each in self._on_the_way if due <= self._polls and not self.withhold(each)]
        self._on_the_way = [(due, each) for due, each in self._on_the_way if each not in arrived or due > self._polls]
        return arrived

    def wait(self, seconds: float) -> None:
        """Waits a little: what comes next may depend on the number of polls alone."""
        super().wait(min(seconds, 0.002))

    def settings(self) -> RunSettings:
        """Returns what the test wants."""
        return self.wanted

    def beat(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Notes where the rank says it stands."""
        del samples
        self.told.append((step, phase))

    def _send(self, result: JobResult) -> None:
        self._on_the_way.append((self._polls + self._random.randint(0, self._longest_polls), result))

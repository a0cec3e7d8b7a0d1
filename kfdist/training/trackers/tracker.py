"""What a tracker is, and how a run speaks to several: from a thread of their own, so that none holds a step up."""

import logging
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from kfdist.errors import ConfigError

_LOG = logging.getLogger(__name__)

_MOST_WAITING = 1_000
_CLOSE_SECONDS = 10.0
"""How long a finished run waits for all of its trackers together."""
_HURRIED_CLOSE_SECONDS = 2.0
"""The same for one that stopped or failed, whose ranks are soon killed."""
Numbers = tuple[int, Mapping[str, float]]
"""Steps that are done, and finite numbers by name, such as "loss" or "staleness/max"."""

_PREFIXES = {"trained": "test_", "averaged": "averaged_test_"}


class Tracker(Protocol):
    """Somewhere that numbers go. Its methods are called from one thread, not that of the training, and may raise."""

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Begins, or goes on with what it has of this run.

        Args:
            config: The run's settings by dotted key.
            step: Steps that are done; what it has of later ones is of a past that was lost.
        """

    def log(self, numbers: Sequence[Numbers]) -> None:
        """Takes all numbers that have come since the last call, oldest first."""

    def close(self, status: str) -> None:
        """Ends.

        Args:
            status: "finished", "stopped" or "failed".
        """


def check_installed(trackers: Iterable[str]) -> None:
    """Checks that the packages of trackers are installed, without importing them.

    Args:
        trackers: Their names, which are those of the packages and of the extras.

    Raises:
        ConfigError: One isn't.
    """
    missing = [name for name in trackers if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"has {', '.join(map(repr, missing))}, which isn't installed here: "
            f"pip install 'kfdist[{','.join(missing)}]', or leave it out",
            path="run.trackers",
        )


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns what trackers are told of a line of `metrics.jsonl`; nothing of most events."""
    match line["event"]:
        case "step":
            found = _flat({key: value for key, value in line.items() if key not in ("step", "time")})
        case "evaluation":
            prefix = _PREFIXES.get(line.get("weights", "trained"), "test_")
            found = ((f"{prefix}{key.removeprefix('test_')}", line[key]) for key in line if key.startswith("test_"))
        case _:
            return {}
    return {key: float(value) for key, value in found if isinstance(value, int | float) and math.isfinite(value)}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{inner}", each) for inner, each in value.items())
        else:
            yield key, value


@dataclass(eq=False)
class _Told:
    """One tracker with its thread; the first thing that goes wrong is told, and is the last that it is told."""

    name: str
    tracker: Tracker
    waiting: queue.Queue[Numbers | str] = field(default_factory=lambda: queue.Queue(_MOST_WAITING))
    failed: bool = False

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        self.thread = threading.Thread(target=self._run, args=(config, step), name=f"tracker {self.name}", daemon=True)
        self.thread.start()

    def put(self, item: Numbers | str) -> None:
        if self.failed:
            return
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self._give_up(f"{_MOST_WAITING} values wait for it")

    def wait(self, seconds: float, limit: float) -> None:
        if not self.failed:
            self.thread.join(seconds)
        if self.thread.is_alive() and not self.failed:
            self._give_up(f"it took more than {limit:g} s to end")

    def _run(self, config: Mapping[str, Any], step: int) -> None:
        try:
            self.tracker.start(config, step)
            status = ""
            while not status:
                numbers, status = self._next()
                if self.failed:
                    return
                if numbers:
                    self.tracker.log(numbers)
            self.tracker.close(status)
        except BaseException as error:  # whatever a library raises, SystemExit too, a run goes on without it
            self._give_up(f"{type(error).__name__}: {error}")

    def _next(self) -> tuple[list[Numbers], str]:
        """Takes all that waits, at least one thing; the second is how the run ended, empty if it goes on."""
        numbers: list[Numbers] = []
        item = self.waiting.get()
        while not isinstance(item, str):
            numbers.append(item)
            try:
                item = self.waiting.get_nowait()
            except queue.Empty:
                return numbers, ""
        return numbers, item

    def _give_up(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            _LOG.warning("%s gets no more of the run's numbers (%s); metrics.jsonl has them all", self.name, reason)


class TrackerFeed:
    """Tells a run's numbers to all of its trackers; never waits for them but when it ends, and never raises.

    They begin with the first numbers: a run that makes no step leaves nothing with them.

    Args:
        trackers: By name.
        config: The run's settings by dotted key.
        step: Steps that are done.
    """

    def __init__(self, trackers: Mapping[str, Tracker], config: Mapping[str, Any], step: int) -> None:
        self._trackers = trackers
        self._config, self._step = config, step
        self._told: list[_Told] = []

    def tell(self, line: Mapping[str, Any]) -> None:
        """Passes the numbers of a line of `metrics.jsonl` on."""
        if not self._trackers or not (values := numbers_of(line)):
            return
        if not self._told:
            self._told = [_Told(name, tracker) for name, tracker in self._trackers.items()]
            for each in self._told:
                each.begin(self._config, self._step)
        for each in self._told:
            each.put((line["step"], values))

    def close(self, status: str) -> None:
        """Ends; waits some seconds for what is still on its way.

        Args:
            status: As for `Tracker`.
        """
        limit = _CLOSE_SECONDS if status == "finished" else _HURRIED_CLOSE_SECONDS
        deadline = time.monotonic() + limit
        for each in self._told:
            each.put(status)
        for each in self._told:
            each.wait(max(deadline - time.monotonic(), 0.0), limit)

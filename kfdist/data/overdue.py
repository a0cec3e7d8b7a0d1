"""Tells of a batch that doesn't come: a read that hangs can't be broken off, and all ranks wait for the one with it."""

import logging
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress

from kfdist.data.reading import Batch

_LOG = logging.getLogger(__name__)

OVERDUE_SECONDS = 10.0
"""How long a batch is waited for before that is told, and then between two messages; as of jobs without an owner."""


class Overdue:
    """Watches one rank's waits from a thread of its own, which ends with `close` and with an object that is forgotten.

    Args:
        worker_rank: The rank, for messages.
        loader_processes: How many processes read for it, for messages; 0: it reads itself.
        seconds: As `OVERDUE_SECONDS`.
    """

    def __init__(self, *, worker_rank: int, loader_processes: int, seconds: float = OVERDUE_SECONDS) -> None:
        self._wait = _Wait()
        self._told = (
            f"rank {worker_rank} has waited %.0f s for a batch (data.loader_processes is {loader_processes}), and all "
            "ranks wait with it: the data set hangs or is slow, or a disk or a network file system doesn't answer"
        )
        self._seconds = seconds
        self._end = weakref.finalize(self, self._wait.ended.set)
        self._begun = False

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields batches, and watches the wait for each. What that costs a batch is a look at the clock."""
        if not self._begun:
            self._begin()
        source = iter(batches)
        while True:
            self._wait.since = time.monotonic()
            try:
                batch = next(source, None)
            finally:
                self._wait.since = None
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        self._end()

    def _begin(self) -> None:
        self._begun = True
        thread = threading.Thread(
            target=_watch, args=(self._wait, self._told, self._seconds), name="kfdist-overdue", daemon=True
        )
        with suppress(RuntimeError):  # no more threads; it reads as well without
            thread.start()


class _Wait:
    """What the two threads share."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.ended = threading.Event()


def _watch(wait: _Wait, told: str, seconds: float) -> None:
    # Signals belong to the thread that trains; taken here, they would not wake it from its waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not wait.ended.wait(seconds):
        since = wait.since
        if since is not None and (waited := time.monotonic() - since) >= seconds:
            _LOG.warning(told, waited)

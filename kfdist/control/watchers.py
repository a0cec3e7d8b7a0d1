"""Watches of runs. Each has a bounded queue: a slow reader loses its watch instead of growing a queue."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kfdist.rpc._generated.kfdist.v1 import run_pb2
from kfdist.rpc.status import Refusal

QUEUED_CHANGES = 256
"""Changes that a watch may leave unread."""

MAX_WATCHERS = 256
"""Concurrent watches of one run."""


class Watch:
    """One reader's queue."""

    def __init__(self, limit: int) -> None:
        """Begins empty and holds at most `limit` changes."""
        self._queue: asyncio.Queue[run_pb2.Run] = asyncio.Queue(limit)
        self._overflowed = False

    def push(self, run: run_pb2.Run) -> None:
        """Adds a change; if there is no room, the watch ends once its queue is read."""
        if self._overflowed or self._queue.full():
            self._overflowed = True
        else:
            self._queue.put_nowait(run)

    async def next(self) -> run_pb2.Run:
        """Waits for the next change and returns it.

        Raises:
            Refusal: RESOURCE_EXHAUSTED: changes came faster than the caller read them.
        """
        if self._overflowed and self._queue.empty():
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"more than {self._queue.maxsize} changes were unread; watch again from the last revision you saw",
            )
        return await self._queue.get()


class Watchers:
    """All watches, by run."""

    def __init__(self, *, queued_changes: int = QUEUED_CHANGES) -> None:
        """Begins with none; each watch may hold `queued_changes`."""
        self._queued_changes = queued_changes
        self._by_run: dict[str, set[Watch]] = {}

    @contextmanager
    def watch(self, run: str) -> Iterator[Watch]:
        """Queues every change of a run published while the context lasts.

        Raises:
            Refusal: RESOURCE_EXHAUSTED: the run has too many watches.
        """
        watches = self._by_run.setdefault(run, set())
        if len(watches) >= MAX_WATCHERS:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"run {run!r} has {MAX_WATCHERS} watches already; end one of them"
            )
        made = Watch(self._queued_changes)
        watches.add(made)
        try:
            yield made
        finally:
            watches.discard(made)
            if not watches:
                self._by_run.pop(run, None)

    def publish(self, run: run_pb2.Run) -> None:
        """Queues a run's new record for each of its watches."""
        for watch in self._by_run.get(run.name, ()):
            watch.push(run)

"""Who is let in next where there isn't room for all: runs take turns, so that one that sends much holds up no other."""

import asyncio
from collections import OrderedDict, deque


class FairRoom:
    """Room for so much at a time, given to runs in turn and within a run in the order of asking.

    Whoever is next waits until there is room, and nobody overtakes it: before it goes in, at most one of each other run
    does. Lives in one event loop.
    """

    def __init__(self, limit: int) -> None:
        """Begins empty.

        Args:
            limit: How much may be inside; more than that may be alone.
        """
        self._limit = limit
        self._held = 0
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    async def enter(self, run: str, size: int) -> None:
        """Waits for room; whoever was let in must `leave`."""
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run, deque()).append((size, admitted))
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                self._admit()  # others may fit where this one didn't
            else:
                self.leave(size)  # let in and cancelled at once
            raise

    def leave(self, size: int) -> None:
        """Gives back what `enter` took."""
        self._held -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            run, queue = next(iter(self._waiting.items()))
            size, admitted = queue[0]
            if not admitted.done():
                if self._held and self._held + size > self._limit:
                    return
                self._held += size
                admitted.set_result(None)
                self._waiting.move_to_end(run)
            queue.popleft()
            if not queue:
                del self._waiting[run]

"""What the thread that trains and the link's background thread share."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kfdist.types import Job, JobResult, Sample

Call = Job | tuple[int, str, Sequence[Sample]] | None
"""A job, a (step, phase, samples) to tell, or None for the end."""


@dataclass(kw_only=True)
class Mailbox:
    """Calls one way, results the other. Appending to a deque is atomic, so no lock is needed.

    A lock would do harm: a signal handler that raises (Ctrl-C) may interrupt the thread that holds it.

    Attributes:
        inbox: Calls, in order.
        results: Verified results.
        wake: An eventfd that wakes the background thread.
        arrived: An eventfd that is readable while results (or a fault) may be there.
        closed: Whether the eventfds were given back.
    """

    wake: int
    arrived: int
    inbox: deque[Call] = field(default_factory=deque)
    results: deque[JobResult] = field(default_factory=deque)
    closed: bool = False

    def close(self) -> None:
        """Gives the eventfds back; called when the background thread has ended; safe to call twice."""
        if not self.closed:
            self.closed = True
            os.close(self.wake)
            os.close(self.arrived)

"""The jobs of one rank that have no verified result yet, and the shared memory that belongs to them."""

import os
import time
from collections import deque
from dataclasses import dataclass, field

from kfdist.links.shared_memory import create_input, create_output, mapped
from kfdist.links.socket_messages import Submit
from kfdist.types import Job


@dataclass(kw_only=True, eq=False)
class HeldJob:
    """One job.

    Attributes:
        job: What is to be done.
        submitted_ns: When it was, in nanoseconds since 1970.
        ticket: Names the hand-over to the courier in charge; None while it waits for one.
        input: Descriptor of the sealed memfd with its payload; made once, passed to every courier.
        output: Descriptor of the memfd for the result; a new one for every hand-over, so that nothing that an earlier
            courier wrote is ever taken for a result.
    """

    job: Job
    submitted_ns: int = field(default_factory=time.time_ns)
    ticket: int | None = None
    input: int | None = None
    output: int | None = None

    def drop_output(self) -> None:
        """Lets go of the result's memory."""
        if self.output is not None:
            os.close(self.output)
        self.output = self.ticket = None

    def close(self) -> None:
        """Lets go of all its memory."""
        self.drop_output()
        if self.input is not None:
            os.close(self.input)
        self.input = None


class Handover:
    """Knows for each job whether it waits or is with the courier."""

    def __init__(self) -> None:
        self._waiting: deque[HeldJob] = deque()
        self._handed: dict[int, HeldJob] = {}
        self._last_ticket = 0

    @property
    def handed_over(self) -> int:
        """How many jobs the courier has."""
        return len(self._handed)

    def add(self, job: Job) -> None:
        """Takes a job over, behind those that wait."""
        self._waiting.append(HeldJob(job=job))

    def next_waiting(self) -> HeldJob | None:
        """Returns the job that is to be handed over next, if one waits."""
        return self._waiting[0] if self._waiting else None

    def prepare(self, entry: HeldJob) -> tuple[Submit, tuple[int, int]]:
        """Puts a job into shared memory; returns its message and descriptors, which stay open here."""
        digest = entry.job.digest
        if entry.input is None:
            entry.input = create_input(*entry.job.content.parts)
            if entry.job.content.size:
                entry.job.content.move_to(mapped(entry.input))  # the bytes are there once, not in this process too
        if entry.output is None:
            entry.output = create_output()
        if entry.ticket is None:
            self._last_ticket += 1
            entry.ticket = self._last_ticket
        submit = Submit(
            ticket=entry.ticket,
            group=entry.job.group,
            version=entry.job.version,
            digest=digest,
            deadline_seconds=entry.job.deadline_seconds,
            fingerprint=entry.job.fingerprint,
            payload_bytes=entry.job.content.size,
            submitted_ns=entry.submitted_ns,
        )
        return submit, (entry.input, entry.output)

    def hand_over(self, entry: HeldJob) -> None:
        """Notes that a prepared job, the next that waited, is with the courier."""
        assert entry.ticket is not None and self._waiting[0] is entry
        self._handed[entry.ticket] = self._waiting.popleft()

    def handed(self, ticket: int) -> HeldJob | None:
        """Returns the job of a ticket; None for one that was handed over again since."""
        return self._handed.get(ticket)

    def finish(self, entry: HeldJob) -> None:
        """Forgets a job that has a verified result."""
        del self._handed[entry.ticket or 0]
        entry.close()

    def requeue(self, entry: HeldJob) -> None:
        """Puts a job that is with the courier in front of those that wait."""
        del self._handed[entry.ticket or 0]
        entry.drop_output()
        self._waiting.appendleft(entry)

    def requeue_all(self) -> int:
        """Does so for all jobs that a lost courier had, in their old order; returns how many there were."""
        lost = list(self._handed.values())
        for entry in reversed(lost):
            self.requeue(entry)
        return len(lost)

    def close(self) -> None:
        """Forgets everything."""
        for entry in [*self._waiting, *self._handed.values()]:
            entry.close()
        self._waiting.clear()
        self._handed.clear()

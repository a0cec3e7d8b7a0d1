"""The courier rank's jobs: shipped inputs, frozen results, and back-pressure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kfdist.curvature.jobs import chain_jobs, job_after
from kfdist.links.link import AbstractLink
from kfdist.policies.adoption import NO_VERSION
from kfdist.types import GroupName, Job, JobResult, LateBytes


@dataclass
class JobLine:
    """One group's jobs on its courier rank, from shipping to adoption; empty on other ranks.

    Attributes:
        queued: Whether every job runs, in order (fixed-lag). Else (asap) one runs at a time, and a newer one replaces
            the one that waits.
        online: Whether each job goes on from the state that the one before left behind: they run one at a time, in
            order, and where a newer one would replace the one that waits, the two are joined to one that does both.
        running: Submitted jobs without a result, by version.
        waiting: Jobs to be submitted after those, oldest first.
        results: Frozen results, not yet released, by version.
        head: Version and newest result of an online group, which the next job goes on from.
        replaced: How many jobs never ran because a newer one took their place.
        merged: How many jobs were done together with a newer one.
    """

    queued: bool
    online: bool
    running: dict[int, Job] = field(default_factory=dict)
    waiting: list[Job] = field(default_factory=list)
    results: dict[int, JobResult] = field(default_factory=dict)
    head: tuple[int, bytes] | None = None
    replaced: int = 0
    merged: int = 0
    _released: int = NO_VERSION

    def ship(self, job: Job) -> Job | None:
        """Takes a job over; returns it where it is to be submitted now, None where it waits."""
        if self.running and (self.online or not self.queued):
            self._wait_in_line(job)
            return None
        return self._start(job)

    def next(self) -> Job | None:
        """Returns the job whose turn it is after `finish`."""
        return self._start(self.waiting.pop(0)) if self.waiting else None

    def finish(self, result: JobResult) -> Job | None:
        """Takes in the result of a running job.

        Returns:
            The job; None where no such job runs (its result came twice, say), and the result is dropped: its slot may
            be free again already, and nothing is adopted that was not asked for.
        """
        job = self.running.pop(result.version, None)
        if job is None:
            return None
        if result.version > self._released:
            self.results[result.version] = result
        self.remember(result.version, result.payload)
        return job

    def put(self, result: JobResult) -> None:
        """Takes in a result that needed no inversion, or one from a checkpoint."""
        self.results[result.version] = result
        self.remember(result.version, result.payload)

    def remember(self, version: int, payload: bytes) -> None:
        """Notes a result as what an online group's next job goes on from, unless a newer one is known."""
        if self.online and (self.head is None or version >= self.head[0]):
            self.head = (version, payload)

    def release(self, version: int) -> None:
        """All ranks hold this version or a newer one: frees its slot and the older ones, now and when they come."""
        self._released = max(version, self._released)
        for held in [held for held in self.results if held <= version]:
            del self.results[held]

    @property
    def unanswered(self) -> dict[int, Job]:
        """Jobs without a result, by version."""
        return {**self.running, **{job.version: job for job in self.waiting}}

    @property
    def newest(self) -> JobResult | None:
        """The newest frozen result."""
        return self.results[max(self.results)] if self.results else None

    def holds(self, version: int) -> bool:
        """Says whether this version's result is here or will come."""
        return version in self.results or version in self.unanswered

    def _wait_in_line(self, job: Job) -> None:
        if not self.queued and self.waiting:
            older = self.waiting.pop()
            if self.online:
                self.merged += 1
                job = _chained(older, job)
            else:
                self.replaced += 1
        self.waiting.append(job)

    def _start(self, job: Job) -> Job:
        if self.head is not None:
            job = _following(job, self.head[1])
        self.running[job.version] = job
        return job


class JobBook:
    """The job lines of all groups, and the link that carries their jobs.

    Args:
        link: Carries the jobs.
        lines: One per group, by the group's name.

    Attributes:
        bytes_sent: Payload bytes of the jobs that came back.
    """

    def __init__(self, link: AbstractLink, lines: Mapping[GroupName, JobLine]) -> None:
        self._link = link
        self._lines = lines
        self._news: list[JobResult] = []
        self.bytes_sent = 0

    def ship(self, job: Job) -> None:
        """Takes a job over: submits it, or lets it wait behind the one that runs."""
        self._submit(self._lines[job.group].ship(job))

    def collect(self) -> None:
        """Takes in what the link brought, and starts the jobs that waited for it."""
        for result in self._link.poll():
            line = self._lines[result.group]
            job = line.finish(result)
            if job is not None:
                self.bytes_sent += job.content.size
                self._news.append(result)
                self._submit(line.next())

    def take_news(self) -> list[JobResult]:
        """Returns the results that came since the last call."""
        news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> None:
        """Blocks until `collect` may bring something, at most `seconds`."""
        self._link.wait(seconds)

    def _submit(self, job: Job | None) -> None:
        if job is not None:
            self._link.submit(job)


def _chained(older: Job, newer: Job) -> Job:
    """Joins two jobs of an online group to one that does both."""
    return replace(newer, content=LateBytes(lambda: chain_jobs([older.payload, newer.payload])))


def _following(job: Job, result: bytes) -> Job:
    """Has a job go on from what the result before it left behind."""
    return replace(job, content=LateBytes(lambda: job_after(job.payload, result)))

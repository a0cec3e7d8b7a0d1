"""The courier rank's jobs: shipped inputs, frozen results, and back-pressure."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from kfdist.curvature.jobs import chain_jobs, job_after
from kfdist.links.link import AbstractLink
from kfdist.policies.adoption import NO_VERSION
from kfdist.types import Job, JobResult


class JobBook:
    """Jobs of the groups this rank is the courier rank of, from shipping to adoption.

    The jobs of an online group run one at a time, in order, each on the state that the one before left behind.

    Args:
        link: Carries the jobs.
        queued: Whether every job runs, in order (fixed-lag). Else (asap) one of a group runs at a time, and a newer one
            replaces the one that waits; those of an online group are joined to one that does them all.
        online: Names of the online groups.

    Attributes:
        replaced: Jobs that never ran because a newer one took their place.
        merged: Jobs of online groups that were done together with a newer one.
        bytes_shipped: Payload bytes submitted.
    """

    def __init__(self, link: AbstractLink, *, queued: bool, online: Collection[str] = ()) -> None:
        self._link = link
        self._queued = queued
        self._online = frozenset(online)
        self._inputs: dict[tuple[str, int], Job] = {}
        self._running: dict[str, set[int]] = {}
        self._waiting: dict[str, list[Job]] = {}
        self._states: dict[str, tuple[int, bytes]] = {}
        self._results: dict[tuple[str, int], JobResult] = {}
        self._released: dict[str, int] = {}
        self._news: list[JobResult] = []
        self.replaced = 0
        self.merged = 0
        self.bytes_shipped = 0

    def ship(self, job: Job) -> None:
        """Takes a job over: submits it, or lets it wait behind the one that runs."""
        self._inputs[job.group, job.version] = job
        in_order = job.group in self._online or not self._queued
        if in_order and self._running.get(job.group):
            self._wait_in_line(job)
        else:
            self._submit(job)

    def _wait_in_line(self, job: Job) -> None:
        line = self._waiting.setdefault(job.group, [])
        if not self._queued and line:
            older = line.pop()
            del self._inputs[older.group, older.version]
            if job.group in self._online:
                self.merged += 1
                job = replace(job, payload=chain_jobs([older.payload, job.payload]))
                self._inputs[job.group, job.version] = job
            else:
                self.replaced += 1
        line.append(job)

    def _submit(self, job: Job) -> None:
        if job.group in self._online and job.group in self._states:
            job = replace(job, payload=job_after(job.payload, self._states[job.group][1]))
            self._inputs[job.group, job.version] = job
        self._running.setdefault(job.group, set()).add(job.version)
        self.bytes_shipped += len(job.payload)
        self._link.submit(job)

    def remember(self, group: str, version: int, payload: bytes) -> None:
        """Notes a result as what the online group's next job goes on from, unless a newer one is known."""
        if group in self._online and version >= self._states.get(group, (NO_VERSION, b""))[0]:
            self._states[group] = (version, payload)

    def put(self, result: JobResult) -> None:
        """Takes in a result that needed no inversion, or one from a checkpoint."""
        self._results[result.group, result.version] = result
        self.remember(result.group, result.version, result.payload)

    def collect(self) -> None:
        """Takes in what the link brought, and starts the jobs that waited for it.

        A result of a job that does not run (delivered twice, say) is dropped: its slot may be free again already, and
        nothing is adopted that was not asked for.
        """
        for result in self._link.poll():
            running = self._running.get(result.group, set())
            if result.version not in running:
                continue
            running.discard(result.version)
            del self._inputs[result.group, result.version]
            if result.version > self._released.get(result.group, NO_VERSION):
                self._results[result.group, result.version] = result
            self._news.append(result)
            self.remember(result.group, result.version, result.payload)
            line = self._waiting.get(result.group)
            if line:
                self._submit(line.pop(0))

    def take_news(self) -> list[JobResult]:
        """Returns the results that came since the last call."""
        news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> None:
        """Blocks until `collect` may bring something, at most `seconds`."""
        self._link.wait(seconds)

    def result(self, group: str, version: int) -> JobResult | None:
        """Returns the frozen result of one version."""
        return self._results.get((group, version))

    def newest(self, group: str) -> JobResult | None:
        """Returns the group's newest frozen result."""
        versions = [version for name, version in self._results if name == group]
        return self._results[group, max(versions)] if versions else None

    def release(self, group: str, version: int) -> None:
        """All ranks hold this version or a newer one: frees its slot and the older ones, now and when they come."""
        self._released[group] = max(version, self._released.get(group, NO_VERSION))
        for key in [key for key in self._results if key[0] == group and key[1] <= version]:
            del self._results[key]

    def holds(self, group: str, version: int) -> bool:
        """Says whether this version's result is here or will come."""
        return (group, version) in self._inputs or (group, version) in self._results

    @property
    def states(self) -> Mapping[str, tuple[int, bytes]]:
        """The newest version and result of each online group, which its next job goes on from."""
        return self._states

    @property
    def inputs(self) -> Mapping[tuple[str, int], Job]:
        """Jobs without a result, by group and version."""
        return self._inputs

    @property
    def results(self) -> Mapping[tuple[str, int], JobResult]:
        """Frozen results not yet released, by group and version."""
        return self._results

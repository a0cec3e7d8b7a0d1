"""The courier rank's jobs: shipped inputs, frozen results, and back-pressure."""

import hashlib
from collections.abc import Mapping

from kfdist.adoption import NO_VERSION
from kfdist.links.base import AbstractLink
from kfdist.types import Job, JobResult


def seed_of(run_seed: int, block: str, version: int) -> int:
    """Returns a job's seed: a fixed hash of the run's seed, the block's name and the version, and of nothing else."""
    digest = hashlib.sha256(f"{run_seed}/{block}/{version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class JobBook:
    """Jobs of the groups this rank is the courier rank of, from shipping to adoption.

    Args:
        link: Carries the jobs.
        queued: Whether every job runs, in order (fixed-lag); else per group one runs and one waits, and a newer one
            replaces the waiting one (asap).

    Attributes:
        replaced: Jobs that never ran because a newer one took their place.
        bytes_shipped: Payload bytes submitted.
    """

    def __init__(self, link: AbstractLink, *, queued: bool) -> None:
        self._link = link
        self._queued = queued
        self._inputs: dict[tuple[str, int], Job] = {}
        self._running: dict[str, set[int]] = {}
        self._waiting: dict[str, Job] = {}
        self._results: dict[tuple[str, int], JobResult] = {}
        self._released: dict[str, int] = {}
        self._news: list[JobResult] = []
        self.replaced = 0
        self.bytes_shipped = 0

    def ship(self, job: Job) -> None:
        """Takes a job over: submits it, or lets it wait behind the one that runs."""
        if self._queued or not self._running.get(job.group):
            self._submit(job)
        else:
            old = self._waiting.pop(job.group, None)
            if old is not None:
                del self._inputs[old.group, old.version]
                self.replaced += 1
            self._waiting[job.group] = job
        self._inputs[job.group, job.version] = job

    def _submit(self, job: Job) -> None:
        self._running.setdefault(job.group, set()).add(job.version)
        self.bytes_shipped += len(job.payload)
        self._link.submit(job)

    def put(self, result: JobResult) -> None:
        """Takes in a result that needed no inversion, or one from a checkpoint."""
        self._results[result.group, result.version] = result

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
            waiting = self._waiting.pop(result.group, None)
            if waiting is not None:
                self._submit(waiting)

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
    def inputs(self) -> Mapping[tuple[str, int], Job]:
        """Jobs without a result, by group and version."""
        return self._inputs

    @property
    def results(self) -> Mapping[tuple[str, int], JobResult]:
        """Frozen results not yet released, by group and version."""
        return self._results

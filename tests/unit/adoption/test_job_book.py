"""The courier rank's jobs under every order of shipping, finishing, delivering twice and adopting."""

from collections.abc import Sequence

from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import DataObject

from kfdist.links.base import AbstractLink, LinkContext, LinkCounters
from kfdist.runtime.jobs import JobBook
from kfdist.types import Job, JobResult, RunSettings, Sample

GROUPS: tuple[str, ...] = ("a", "b")


class DrivenLink(AbstractLink):
    """A link whose owners finish when the test says so."""

    def __init__(self) -> None:
        self.submitted: list[Job] = []
        self.open: list[Job] = []
        self.delivered: list[JobResult] = []

    def submit(self, job: Job) -> None:
        assert job not in self.submitted, "a job was submitted twice"
        self.submitted.append(job)
        self.open.append(job)

    def deliver(self, job: Job) -> None:
        self.delivered.append(
            JobResult(group=job.group, version=job.version, payload=job.payload, digest="", seconds=0.0, owner="x")
        )

    def poll(self) -> list[JobResult]:
        delivered, self.delivered = self.delivered, []
        return delivered

    def start(self, context: LinkContext) -> None: ...
    def cancel(self, group: str, version: int) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def beat(self, step: int, phase: str, samples: Sequence[Sample]) -> None: ...
    def close(self) -> None: ...

    def settings(self) -> RunSettings:
        return RunSettings()

    def counters(self) -> LinkCounters:
        return LinkCounters(resubmissions={}, courier_restarts=0, bytes_sent=0, bytes_received=0)


class Jobs(RuleBasedStateMachine):
    """Steps, owners and adoptions take turns in any order."""

    @initialize(queued=strategies.booleans())
    def begin(self, queued: bool) -> None:
        self.queued = queued
        self.link = DrivenLink()
        self.book = JobBook(self.link, queued=queued)
        self.shipped: list[Job] = []
        self.adopted = dict.fromkeys(GROUPS, -1)
        self.told: list[JobResult] = []
        self.version = 0

    @rule(group=strategies.sampled_from(GROUPS), size=strategies.integers(1, 5))
    def a_version_is_shipped(self, group: str, size: int) -> None:
        self.version += 1
        job = Job(
            run="r", epoch=1, group=group, version=self.version, payload=bytes(size), digest="", deadline_seconds=1.0
        )
        self.shipped.append(job)
        self.book.ship(job)

    @precondition(lambda self: self.link.open)
    @rule(data=strategies.data(), again=strategies.booleans())
    def an_owner_finishes(self, data: DataObject, again: bool) -> None:
        job = data.draw(strategies.sampled_from(self.link.open))
        self.link.open.remove(job)
        for _ in range(2 if again else 1):
            self.link.deliver(job)

    @precondition(lambda self: self.link.submitted)
    @rule(data=strategies.data())
    def an_old_result_comes_once_more(self, data: DataObject) -> None:
        job = data.draw(strategies.sampled_from(self.link.submitted))
        if job not in self.link.open:
            self.link.deliver(job)

    @rule()
    def the_rank_collects(self) -> None:
        self.book.collect()
        self.told += self.book.take_news()

    @precondition(lambda self: self.book.results)
    @rule(data=strategies.data())
    def a_version_is_adopted(self, data: DataObject) -> None:
        group, version = data.draw(strategies.sampled_from(sorted(self.book.results)))
        self.adopted[group] = max(self.adopted[group], version)
        self.book.release(group, version)

    @invariant()
    def no_more_runs_than_back_pressure_allows(self) -> None:
        for group in GROUPS:
            collected = {result.version for result in self.told if result.group == group}
            running = [j for j in self.link.submitted if j.group == group and j.version not in collected]
            waiting = [j for j in self.book.inputs.values() if j.group == group and j not in running]
            if self.queued:
                assert not waiting
            else:
                assert len(running) <= 1
                assert len(waiting) <= len(running)
                assert waiting == [] or waiting[0].version == max(j.version for j in self.shipped if j.group == group)

    @invariant()
    def every_job_is_accounted_for_once(self) -> None:
        replaced = 0
        for job in self.shipped:
            submitted, kept = job in self.link.submitted, (job.group, job.version) in self.book.inputs
            replaced += not submitted and not kept
        assert self.book.replaced == replaced
        assert not (self.queued and replaced)
        assert self.book.bytes_shipped == sum(len(job.payload) for job in self.link.submitted)
        assert not self.book.inputs.keys() & self.book.results.keys()

    @invariant()
    def the_newest_version_is_held_until_it_is_adopted(self) -> None:
        for group in GROUPS:
            newest = max((job.version for job in self.shipped if job.group == group), default=-1)
            assert newest <= self.adopted[group] or self.book.holds(group, newest)

    @invariant()
    def slots_are_held_until_adoption_and_then_free(self) -> None:
        expected = {(r.group, r.version) for r in self.told if r.version > self.adopted[r.group]}
        assert set(self.book.results) == expected
        for group in GROUPS:
            versions = [version for name, version in expected if name == group]
            newest = self.book.newest(group)
            assert (newest.version if newest else None) == max(versions, default=None)

    @invariant()
    def nothing_is_told_twice_and_asap_tells_in_order(self) -> None:
        told = [(result.group, result.version) for result in self.told]
        assert len(told) == len(set(told))
        if not self.queued:
            for group in GROUPS:
                versions = [version for name, version in told if name == group]
                assert versions == sorted(versions)

    def teardown(self) -> None:
        """Whatever happened, the newest version of every group ends up in its slot."""
        if not hasattr(self, "book"):
            return
        for _ in range(2 + len(self.shipped)):
            for job in self.link.open:
                self.link.deliver(job)
            self.link.open.clear()
            self.the_rank_collects()
        assert not self.book.inputs
        self.the_newest_version_is_held_until_it_is_adopted()
        self.slots_are_held_until_adoption_and_then_free()


Jobs.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestJobs = Jobs.TestCase

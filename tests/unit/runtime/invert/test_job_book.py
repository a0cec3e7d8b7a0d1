"""The courier rank's jobs under every order of shipping, finishing, delivering twice and adopting."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import DataObject

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import decode_result, encode_job, run_job
from kfdist.curvature.statistics import Increment
from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.runtime.invert.job_book import JobBook, JobLine
from kfdist.types import InForce, Job, JobResult, LateBytes, MetricSample, RunSettings

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
            JobResult(group=job.group, version=job.version, payload=job.payload, seconds=0.0, owner="x")
        )

    def poll(self) -> list[JobResult]:
        delivered, self.delivered = self.delivered, []
        return delivered

    def start(self, context: LinkContext) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None: ...
    def report(self, in_force: InForce) -> None: ...
    def close(self) -> None: ...

    def settings(self) -> RunSettings:
        return RunSettings()

    def counters(self) -> LinkCounters:
        return LinkCounters()


def frozen(lines: Mapping[str, JobLine]) -> dict[tuple[str, int], JobResult]:
    """Returns the frozen results of all groups."""
    return {(group, version): result for group, line in lines.items() for version, result in line.results.items()}


class Jobs(RuleBasedStateMachine):
    """Steps, owners and adoptions take turns in any order."""

    @initialize(queued=strategies.booleans())
    def begin(self, queued: bool) -> None:
        self.queued = queued
        self.link = DrivenLink()
        self.lines = {group: JobLine(queued=queued, online=False) for group in GROUPS}
        self.book = JobBook(self.link, self.lines)
        self.shipped: list[Job] = []
        self.adopted = dict.fromkeys(GROUPS, -1)
        self.told: list[JobResult] = []
        self.version = 0

    @rule(group=strategies.sampled_from(GROUPS), size=strategies.integers(1, 5))
    def a_version_is_shipped(self, group: str, size: int) -> None:
        self.version += 1
        job = Job(
            run="r", epoch=1, group=group, version=self.version, content=LateBytes.of(bytes(size)), deadline_seconds=1.0
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

    @precondition(lambda self: frozen(self.lines))
    @rule(data=strategies.data())
    def a_version_is_adopted(self, data: DataObject) -> None:
        group, version = data.draw(strategies.sampled_from(sorted(frozen(self.lines))))
        self.adopted[group] = max(self.adopted[group], version)
        self.lines[group].release(version)

    @invariant()
    def no_more_runs_than_back_pressure_allows(self) -> None:
        for group in GROUPS:
            collected = {result.version for result in self.told if result.group == group}
            running = [j for j in self.link.submitted if j.group == group and j.version not in collected]
            assert running == list(self.lines[group].running.values())
            waiting = self.lines[group].waiting
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
            submitted, kept = job in self.link.submitted, job.version in self.lines[job.group].unanswered
            replaced += not submitted and not kept
        assert sum(line.replaced for line in self.lines.values()) == replaced
        assert not (self.queued and replaced)
        done = [job for job in self.link.submitted if job.version not in self.lines[job.group].unanswered]
        assert self.book.bytes_sent == sum(len(job.payload) for job in done)
        assert not any(line.unanswered.keys() & line.results.keys() for line in self.lines.values())

    @invariant()
    def the_newest_version_is_held_until_it_is_adopted(self) -> None:
        for group in GROUPS:
            newest = max((job.version for job in self.shipped if job.group == group), default=-1)
            assert newest <= self.adopted[group] or self.lines[group].holds(newest)

    @invariant()
    def slots_are_held_until_adoption_and_then_free(self) -> None:
        expected = {(r.group, r.version) for r in self.told if r.version > self.adopted[r.group]}
        assert set(frozen(self.lines)) == expected
        for group in GROUPS:
            versions = [version for name, version in expected if name == group]
            newest = self.lines[group].newest
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
        assert not any(line.unanswered for line in self.lines.values())
        self.the_newest_version_is_held_until_it_is_adopted()
        self.slots_are_held_until_adoption_and_then_free()


Jobs.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestJobs = Jobs.TestCase


# Online groups --------------------------------------------------------------------------------------------------------

SIZE = 24
FAILS_AT = frozenset({3, 6})
"""Versions whose increments hold something that no inversion takes; the state stays as it was."""


def increment_job(version: int) -> bytes:
    """A job that adds coordinate vector number `version` to both factors, and decays all before by a half."""
    rows = torch.zeros(1, 1, SIZE, dtype=torch.float64)
    rows[0, 0, version % SIZE] = torch.nan if version in FAILS_AT else 1.0
    none = torch.zeros(1, 0, 0, dtype=torch.float64)
    half, one = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    statistic = Increment(A_rows=rows, G_rows=rows, examples=one, positions=one, decay=half, A=none, G=none)
    return encode_job(
        inverter=make_inverter("b-kfac", rank=SIZE - 2, increment_rows=1),
        statistics={"layer": statistic},
        damping=0.1,
        seeds={"layer": version},
        previous={},
        threads=1,
    )


def held(payload: bytes) -> torch.Tensor:
    """Returns the sum that a result's state stands for, `[SIZE, SIZE]`; what was added when, and how often, shows."""
    state = decode_result(payload).outcomes["layer"].state
    if not state:
        return torch.zeros(SIZE, SIZE, dtype=torch.float64)
    return ((state["U_A"] * state["w_A"].unsqueeze(-2)) @ state["U_A"].mT)[0]


class OnlineJobs(RuleBasedStateMachine):
    """Real updates of two online groups under every order of events."""

    @initialize(queued=strategies.booleans())
    def begin(self, queued: bool) -> None:
        self.link = DrivenLink()
        self.lines = {group: JobLine(queued=queued, online=True) for group in GROUPS}
        self.book = JobBook(self.link, self.lines)
        self.shipped: dict[str, list[int]] = {group: [] for group in GROUPS}
        self.told: dict[str, list[int]] = {group: [] for group in GROUPS}
        self.done: list[Job] = []
        self.queued = queued

    @rule(group=strategies.sampled_from(GROUPS))
    def a_version_is_shipped(self, group: str) -> None:
        version = len(self.shipped[group])
        self.shipped[group].append(version)
        self.book.ship(
            Job(
                run="r",
                epoch=1,
                group=group,
                version=version,
                content=LateBytes(partial(increment_job, version)),
                deadline_seconds=1.0,
            )
        )

    @precondition(lambda self: self.link.open)
    @rule(data=strategies.data(), again=strategies.booleans())
    def an_owner_finishes(self, data: DataObject, again: bool) -> None:
        job = data.draw(strategies.sampled_from(self.link.open))
        self.link.open.remove(job)
        self.done.append(job)
        self._deliver(job, 2 if again else 1)

    @precondition(lambda self: self.done)
    @rule(data=strategies.data())
    def an_old_result_comes_once_more(self, data: DataObject) -> None:
        self._deliver(data.draw(strategies.sampled_from(self.done)), 1)

    @rule()
    def the_rank_collects(self) -> None:
        self.book.collect()
        for result in self.book.take_news():
            self.told[result.group].append(result.version)

    @precondition(lambda self: frozen(self.lines))
    @rule(data=strategies.data())
    def a_version_is_adopted(self, data: DataObject) -> None:
        group, version = data.draw(strategies.sampled_from(sorted(frozen(self.lines))))
        self.lines[group].release(version)

    @precondition(lambda self: not self.link.delivered)
    @rule()
    def the_rank_resumes(self) -> None:
        """What a checkpoint has is enough for a fresh book; what ran is lost and runs again."""
        before, self.lines = self.lines, {}
        self.link, self.done = DrivenLink(), []
        for group, line in before.items():
            fresh = JobLine(queued=self.queued, online=True, merged=line.merged)
            if line.head is not None:
                fresh.remember(*line.head)
            self.lines[group] = fresh
        self.book = JobBook(self.link, self.lines)
        for group, line in before.items():
            for version in sorted([*line.unanswered, *line.results]):
                if version in line.results:
                    self.lines[group].put(line.results[version])
                else:
                    self.book.ship(line.unanswered[version])

    @invariant()
    def every_increment_told_of_is_in_the_state_once_and_in_order(self) -> None:
        for group, line in self.lines.items():
            if line.head is None:
                continue
            version, payload = line.head
            expected = torch.zeros(SIZE, dtype=torch.float64)
            for each in range(version + 1):
                if each not in FAILS_AT:  # not even its decay
                    expected = 0.5 * expected
                    expected[each % SIZE] += 1.0
            torch.testing.assert_close(held(payload), torch.diag(expected), rtol=1e-10, atol=1e-12)
            assert version == max(self.told[group])

    @invariant()
    def jobs_of_a_group_run_one_at_a_time(self) -> None:
        for group in GROUPS:
            running = [job for job in self.link.open if job.group == group]
            assert len(running) <= 1
            assert self.told[group] == sorted(set(self.told[group]))

    @invariant()
    def every_version_is_told_of_merged_or_to_come(self) -> None:
        shipped, told = (sum(map(len, each.values())) for each in (self.shipped, self.told))
        merged = sum(line.merged for line in self.lines.values())
        assert shipped == told + merged + sum(len(line.unanswered) for line in self.lines.values())
        assert not (self.queued and merged)

    def teardown(self) -> None:
        """Whatever happened, all increments end up in the states."""
        if not hasattr(self, "book"):
            return
        for _ in range(2 + sum(map(len, self.shipped.values()))):
            for job in self.link.open:
                self._deliver(job, 1)
            self.link.open.clear()
            self.the_rank_collects()
        assert not any(line.unanswered for line in self.lines.values())
        self.every_increment_told_of_is_in_the_state_once_and_in_order()
        for group, versions in self.shipped.items():
            head = self.lines[group].head
            assert not versions or (head is not None and head[0] == versions[-1])

    def _deliver(self, job: Job, times: int) -> None:
        payload = run_job(job.payload)
        for _ in range(times):
            self.link.delivered.append(
                JobResult(group=job.group, version=job.version, payload=payload, seconds=0.0, owner="x")
            )


OnlineJobs.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestOnlineJobs = OnlineJobs.TestCase

"""The link whose inverter is a thread of this process, and its help while somebody waits."""

import os
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import kfdist
from kfdist.curvature.footprint import footprint
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import encode_job
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.links import local
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.system.memory import Memory
from kfdist.types import BlockShape, Job, JobResult, LateBytes

CONTEXT = LinkContext(run="r", epoch=0, worker_rank=0, world_size=1, groups=(), fingerprint="")


def test_a_job_that_is_done_is_let_go():
    """Its bytes are half a factor: a wide layer's would stay for the hundred steps until the next job."""
    factors = KroneckerFactors(A=torch.eye(3)[None], G=torch.eye(2)[None])
    payload = encode_job(
        inverter=make_inverter("kfac"), statistics={"b": factors}, damping=0.1, seeds={"b": 1}, previous={}, threads=1
    )
    job = Job(run="r", epoch=0, group="b", version=0, content=LateBytes.of(payload), deadline_seconds=9, fingerprint="")
    link, kept = LocalLink(), weakref.ref(job)
    link.start(CONTEXT)
    link.submit(job)
    del job
    link.wait(30)
    assert [result.group for result in link.poll()] == ["b"]
    deadline = time.monotonic() + 30
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept() is None
    link.close()


class Inversions:
    """Inversions that end when they are told to; counts how many there are at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cores: int) -> None:
        self.running, self.most = 0, 0
        self.go = threading.Event()
        self._lock = threading.Lock()
        monkeypatch.setattr(local, "_invert", self)
        monkeypatch.setattr(os, "sched_getaffinity", lambda of: set(range(cores)))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def __call__(self, job: Job, device: str) -> JobResult:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.go.wait(30)
        with self._lock:
            self.running -= 1
        return JobResult(group=job.group, version=job.version, payload=b"", seconds=0.0, owner=device)

    def link(self, *, jobs: int, inversion_bytes: int = 0) -> LocalLink:
        """Returns a link that has so many jobs, the largest of which takes so much."""
        link = LocalLink()
        link.start(replace(CONTEXT, inversion_bytes=inversion_bytes))
        for number in range(jobs):
            content = LateBytes.of(b"")
            link.submit(Job(run="r", epoch=0, group=f"{number}", version=0, content=content, deadline_seconds=9))
        return link

    def reach(self, number: int) -> None:
        """Waits until so many run at once."""
        deadline = time.monotonic() + 30
        while self.running != number and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.running == number


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 4)])
def test_while_somebody_waits_all_cores_invert_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    inversions = Inversions(monkeypatch, cores=cores)
    link = inversions.link(jobs=7)
    inversions.reach(1)
    assert link.poll() == [] and inversions.running == 1, "who only looks has work of its own"
    link.wait(0.01)
    inversions.reach(expected)
    link.wait(0.01)
    inversions.reach(expected)
    inversions.go.set()
    found: list[JobResult] = []
    deadline = time.monotonic() + 30
    while len(found) < 7 and time.monotonic() < deadline:
        link.wait(1)
        found += link.poll()
    assert sorted(each.group for each in found) == [f"{number}" for number in range(7)]
    assert inversions.most == expected
    link.close()


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    inversions = Inversions(monkeypatch, cores=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    link = inversions.link(jobs=7)
    link.wait(0.01)
    inversions.reach(2)
    inversions.go.set()
    link.close()
    assert inversions.most == 2


def test_only_as_many_help_as_memory_is_free_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2000 << 20
    monkeypatch.setattr(local, "available_memory", lambda: Memory(free, "a test"))
    inversions = Inversions(monkeypatch, cores=64)
    link = inversions.link(jobs=7, inversion_bytes=1000 << 20)
    link.wait(0.01)
    inversions.reach(2)
    free -= 1  # less than two have now: whoever helps ends after its job
    inversions.go.set()
    found: list[JobResult] = []
    deadline = time.monotonic() + 30
    while len(found) < 7 and time.monotonic() < deadline:
        link.wait(1)
        found += link.poll()
        assert len(found) < 3 or inversions.running < 2
    assert len(found) == 7 and inversions.most == 2
    link.close()


def test_the_system_is_not_asked_for_the_memory_of_small_inversions(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Memory:
        raise AssertionError("it was asked")

    monkeypatch.setattr(local, "available_memory", asked)
    inversions = Inversions(monkeypatch, cores=64)
    link = inversions.link(jobs=7, inversion_bytes=1000)
    link.wait(0.01)
    inversions.reach(local._MOST_AT_ONCE)
    inversions.go.set()
    link.close()
    assert inversions.most == local._MOST_AT_ONCE


def test_the_link_knows_what_the_largest_inversion_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    link, told = LocalLink(), []
    monkeypatch.setattr(link, "start", told.append)
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 30, bias=False), nn.Linear(30, 2))
    kfdist.Preconditioner(model, "kfac", link=link).close()
    shape = BlockShape(d_out=30, d_in=20)
    assert [each.inversion_bytes for each in told] == [footprint(make_inverter("kfac"), shape).inversion]


def test_a_wait_ends_while_inversions_go_on_and_close_drops_what_nobody_began(monkeypatch: pytest.MonkeyPatch) -> None:
    inversions = Inversions(monkeypatch, cores=2)
    link = inversions.link(jobs=5)
    begun = time.monotonic()
    link.wait(0.05)
    assert time.monotonic() - begun < 5
    inversions.reach(2)
    closing = threading.Thread(target=link.close)
    closing.start()
    inversions.go.set()
    closing.join(30)
    assert not closing.is_alive() and inversions.running == 0
    assert not any(each.name == "kfdist-inverter" for each in threading.enumerate())


ASAP, LAGGED = "", "an owner like this rank"


class Seen:
    """Inversions that note how their threads are: torch's threads, niceness and the thread's number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[int, int, int]] = []
        invert = local._invert

        def noted(job: Job, device: str) -> JobResult:
            result = invert(job, device)
            thread = threading.get_native_id()
            self.told.append((torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, thread), thread))
            return result

        monkeypatch.setattr(local, "_invert", noted)

    def invert(self, link: LocalLink, fingerprint: str) -> tuple[int, int, int]:
        factors = KroneckerFactors(A=torch.eye(3)[None], G=torch.eye(2)[None])
        payload = encode_job(
            inverter=make_inverter("kfac"),
            statistics={"b": factors},
            damping=0.1,
            seeds={"b": 1},
            previous={},
            threads=2,
        )
        content = LateBytes.of(payload)
        link.submit(
            Job(run="r", epoch=0, group="b", version=0, content=content, deadline_seconds=9, fingerprint=fingerprint)
        )
        deadline = time.monotonic() + 30
        while not (found := link.poll()) and time.monotonic() < deadline:
            time.sleep(0.005)  # instead of a wait, in which another thread might help
        assert [result.group for result in found] == ["b"]
        return self.told[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_after_the_first_version_inversions_take_what_training_leaves_unless_somebody_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, usual = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)
    torch.set_num_threads(2)
    seen, link = Seen(monkeypatch), LocalLink()
    link.start(CONTEXT)
    try:
        assert seen.invert(link, ASAP)[:2] == (1, usual), "the rank waits for its first version"
        assert seen.invert(link, ASAP)[:2] == (1, 19)
        assert seen.invert(link, ASAP)[:2] == (1, 19)
        assert seen.invert(link, LAGGED)[:2] == (2, usual)
        assert seen.invert(link, LAGGED)[:2] == (2, usual)
        assert seen.invert(link, ASAP)[:2] == (1, 19), "the lag is no more"
        assert torch.get_num_threads() == 2
    finally:
        link.close()
        torch.set_num_threads(before)
    assert not any(each.name == "kfdist-inverter" for each in threading.enumerate())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_thread_that_starves_in_the_background_is_relieved_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    seen, link = Seen(monkeypatch), LocalLink()
    link.start(CONTEXT)
    try:
        seen.invert(link, ASAP)
        assert seen.invert(link, ASAP)[1] == 19
        monkeypatch.setattr(local.Share, "starves", lambda share: True)
        assert [seen.invert(link, ASAP)[1] for _ in range(3)] == [usual] * 3
    finally:
        link.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_what_a_starving_thread_is_at_is_done_by_the_one_that_relieves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    starves, go, doing = threading.Event(), threading.Event(), []
    seen, link = Seen(monkeypatch), LocalLink()
    invert = local._invert

    def slow(job: Job, device: str) -> JobResult:
        doing.append(threading.get_native_id())
        if len(doing) == 2:  # in the background
            starves.set()
            assert go.wait(30)
        return invert(job, device)

    monkeypatch.setattr(local, "_invert", slow)
    monkeypatch.setattr(local.Share, "starves", lambda share: starves.is_set())
    link.start(CONTEXT)
    try:
        seen.invert(link, ASAP)
        seen.invert(link, ASAP)
        assert len(doing) == 3 and len(set(doing[1:])) == 2
        go.set()
        link.wait(30)
        assert len(link.poll()) == 1, "the first thread's result, which nobody waits for any more"
        assert seen.invert(link, ASAP)[2] == doing[2]
    finally:
        link.close()
    assert not any(each.name == "kfdist-inverter" for each in threading.enumerate())

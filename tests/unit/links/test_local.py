"""The link whose inverter is a thread of this process, and its help while somebody waits."""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import kfdist
from kfdist.curvature.footprint import footprint
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import encode_job
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.errors import KfdistError
from kfdist.links import local
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.system.memory import Memory
from kfdist.types import BlockShape, Job, JobResult, LateBytes
from tests.support.preconditioning import backward, preconditioner, two_layers

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


@pytest.mark.parametrize(("fingerprint", "threads"), [("", 1), ("an owner like this rank", 2)], ids=["asap", "lag"])
def test_a_job_takes_one_thread_of_torch_unless_a_lag_asks_for_the_ranks(
    monkeypatch: pytest.MonkeyPatch, fingerprint: str, threads: int
) -> None:
    seen: list[int] = []

    def run(payload: bytes, *, device: str) -> bytes:
        seen.append(torch.get_num_threads())
        return payload

    monkeypatch.setattr(local, "run_job", run)
    factors, kfac = KroneckerFactors(A=torch.eye(3)[None], G=torch.eye(2)[None]), make_inverter("kfac")
    payload = encode_job(inverter=kfac, statistics={"b": factors}, damping=0.1, seeds={"b": 1}, previous={}, threads=2)
    job = Job(run="r", epoch=0, group="b", version=0, content=LateBytes.of(payload), deadline_seconds=9)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    link = LocalLink()
    link.start(CONTEXT)
    try:
        link.submit(replace(job, fingerprint=fingerprint))
        link.wait(30)
        assert len(link.poll()) == 1
        assert seen == [threads] and torch.get_num_threads() == 2
    finally:
        link.close()
        torch.set_num_threads(before)


def test_a_thread_inverts_on_the_gpu_of_the_rank_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new thread the current device is the first one, whatever this one trains on."""
    apart: list[str] = []

    @contextmanager
    def recorded(device: str) -> Iterator[None]:
        apart.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(local, "_apart", recorded)
    inversions = Inversions(monkeypatch, cores=4)
    inversions.go.set()
    link = LocalLink("cuda")
    link.start(CONTEXT)
    link.submit(Job(run="r", epoch=0, group="b", version=0, content=LateBytes.of(b""), deadline_seconds=9))
    link.wait(30)
    assert [result.owner for result in link.poll()] == ["cuda:3"] and apart == ["cuda:3"]
    link.close()


def test_a_device_that_cant_be_used_is_told_and_not_waited_for() -> None:
    link = LocalLink("cuda:99")
    link.start(CONTEXT)
    link.wait(30)
    with pytest.raises(KfdistError, match="the inversion thread failed"):
        link.poll()
    link.close()


def test_a_rank_that_is_alone_takes_no_digest_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else gets them; of all of a model's inverses it takes as long as a good part of a step."""

    def digest(_: JobResult) -> str:
        raise AssertionError("it was asked for")

    monkeypatch.setattr(JobResult, "digest", property(digest))
    model = two_layers()
    with preconditioner(model) as pre:
        backward(model)
        pre.step()
        assert set(pre.versions().values()) == {0}

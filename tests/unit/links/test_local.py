"""The link whose inverter is a thread of this process."""

import os
import threading
import time
import weakref
from dataclasses import dataclass, field

import pytest
import torch

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import encode_job
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.links import local
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.types import Job, LateBytes


def a_job(version: int = 0) -> Job:
    factors = KroneckerFactors(A=torch.eye(3)[None], G=torch.eye(2)[None])
    payload = encode_job(
        inverter=make_inverter("kfac"), statistics={"b": factors}, damping=0.1, seeds={"b": 1}, previous={}, threads=1
    )
    content = LateBytes.of(payload)
    return Job(run="r", epoch=0, group="b", version=version, content=content, deadline_seconds=9, fingerprint="")


def started() -> LocalLink:
    link = LocalLink()
    link.start(LinkContext(run="r", epoch=0, worker_rank=0, world_size=1, groups=(), fingerprint=""))
    return link


@dataclass
class Inverters:
    """Who did which job: the name of each one's thread; the link's own one doesn't end its first before `end` is set.

    With the third job it is.
    """

    names: list[str] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def inverters(monkeypatch: pytest.MonkeyPatch) -> Inverters:
    inverters, run = Inverters(), local.run_job

    def noted(payload: bytes, *, device: str) -> bytes:
        inverters.names.append(threading.current_thread().name)
        if inverters.names[-1] == "kfdist-inverter":
            inverters.end.wait(30)
        elif len(inverters.names) == 3:
            inverters.end.set()
        return run(payload, device=device)

    monkeypatch.setattr(local, "run_job", noted)
    return inverters


def begun(link: LocalLink, inverters: Inverters) -> None:
    """Waits until the link's thread has a job."""
    link.submit(a_job())
    deadline = time.monotonic() + 30
    while not inverters.names and time.monotonic() < deadline:
        time.sleep(0.01)


def test_who_waits_inverts_what_nobody_has_begun(inverters: Inverters, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    link, found = started(), []
    begun(link, inverters)
    for version in (1, 2):
        link.submit(a_job(version))
    while len(found) < 3:
        link.wait(30)
        found += [result.version for result in link.poll()]
    assert inverters.names == ["kfdist-inverter", "MainThread", "MainThread"]
    assert sorted(found) == [0, 1, 2]
    link.close()


def test_a_job_whose_inversion_is_interrupted_is_still_to_be_done(
    inverters: Inverters, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    link = started()
    begun(link, inverters)
    noted, interrupts = local.run_job, iter([True, False, False])

    def interrupted(payload: bytes, *, device: str) -> bytes:
        if next(interrupts):
            raise KeyboardInterrupt
        return noted(payload, device=device)

    monkeypatch.setattr(local, "run_job", interrupted)
    for version in (1, 2):
        link.submit(a_job(version))
    with pytest.raises(KeyboardInterrupt):
        link.wait(30)
    found: list[int] = []
    while len(found) < 3:
        link.wait(30)
        found += [result.version for result in link.poll()]
    assert sorted(found) == [0, 1, 2]
    link.close()


def test_who_waits_leaves_the_cores_to_the_threads_of_an_inversion(
    inverters: Inverters, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(os.sched_getaffinity(0)) + 1)
    link = started()
    begun(link, inverters)
    link.submit(a_job(1))
    link.wait(0.05)
    assert link.poll() == []
    assert inverters.names == ["kfdist-inverter"]
    inverters.end.set()
    link.close()


def test_a_job_that_is_done_is_let_go():
    """Its bytes are half a factor: a wide layer's would stay for the hundred steps until the next job."""
    link, job = started(), a_job()
    kept = weakref.ref(job)
    link.submit(job)
    del job
    link.wait(30)
    assert [result.group for result in link.poll()] == ["b"]
    deadline = time.monotonic() + 30
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept() is None
    link.close()

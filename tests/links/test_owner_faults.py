"""Owners that die, stop, crash, are too slow or not of the right kind: every job still gets its right result."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from kfdist.links.rank.remote import RemoteLink
from tests.support.controller import ControllerThread, values
from tests.support.faults import EACH, Fault, Faults
from tests.support.jobs import collect, context, job, payload, result_of
from tests.support.owners import OwnerProcess
from tests.support.waits import eventually

EPOCHS = iter(range(1, 1000))


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path_factory.mktemp("controller") / "control.sqlite", lease_seconds=2.0) as running:
        yield running


@pytest.fixture(scope="module")
def pair(controller, tmp_path_factory) -> Iterator[list[OwnerProcess]]:
    folder = tmp_path_factory.mktemp("owners")
    with (
        OwnerProcess("owner-0", folder=folder, controller=controller.address) as first,
        OwnerProcess("owner-1", folder=folder, controller=controller.address) as second,
    ):
        yield [first, second]


@pytest.fixture
def owners(pair) -> list[OwnerProcess]:
    return eventually(lambda: pair, lambda pair: all(owner.status()["registered"] for owner in pair), seconds=60)


@pytest.fixture
def epoch() -> int:
    """A start of the run of each test's own: owners keep the results of a start and refuse older ones."""
    return next(EPOCHS)


@pytest.fixture
def link(controller, owners, start_link, epoch) -> RemoteLink:
    """A link that knows the owners."""
    link = start_link(controller.address, as_told=context(epoch=epoch))
    link.submit(job("warm", epoch=epoch))
    collect(link, 1)
    return link


@pytest.fixture
def slow(link, faults: Faults) -> Fault:
    """The next inversion, at whichever owner, takes longer than the test."""
    return faults.at(inversion=EACH, times=1).delay(100)


def busy(owners: list[OwnerProcess], slow: Fault) -> OwnerProcess:
    """Returns the owner that is in the middle of the slow inversion, the one job there is."""
    eventually(lambda: slow.fired, bool)
    depths = [owner.status()["queue_depth"] for owner in owners]
    return owners[depths.index(1)]


def test_an_owner_killed_in_the_middle_of_an_inversion(owners, link, slow, epoch):
    data = payload(40, seed=1)
    link.submit(job("victim", data=data, epoch=epoch))
    victim = busy(owners, slow)
    victim.kill()
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)
    assert link.counters().resubmissions == {"owner_lost": 1}
    victim.start()


def test_an_owner_stopped_in_the_middle_of_an_inversion(owners, link, slow, epoch):
    data = payload(40, seed=2)
    link.submit(job("frozen", data=data, epoch=epoch, deadline_seconds=120))
    victim = busy(owners, slow)
    victim.signal(signal.SIGSTOP)
    try:
        # Nobody kills it here. The controller misses it, and so the courier takes the job elsewhere.
        (result,) = collect(link, 1, seconds=20).values()
    finally:
        victim.signal(signal.SIGCONT)
    assert result.payload == result_of(data)
    assert link.counters().resubmissions == {"owner_lost": 1}
    victim.kill()
    victim.start()


def test_a_crash_of_the_inversion_process(controller, link, epoch, faults):
    def restarts() -> float:
        return values(controller.scrape()).get(
            f'kfdist_restarts_total{{process="inverter",run="{context().run}"}}', 0.0
        )

    before = restarts()
    faults.at(inversion=EACH, times=1).kill()
    data = payload(40, seed=3)
    link.submit(job("crash", data=data, epoch=epoch))
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)
    assert link.counters().resubmissions == {"crash": 1}
    assert eventually(restarts, lambda seen: seen > before) == before + 1


def test_a_deadline_moves_the_job_and_changes_nothing_in_its_result(owners, link, slow, epoch):
    data = payload(40, seed=4)
    begun = time.monotonic()
    link.submit(job("slow", data=data, epoch=epoch, deadline_seconds=1.0))
    child = busy(owners, slow).status()["child_pid"]
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)
    assert time.monotonic() - begun >= 1.0
    assert link.counters().resubmissions == {"deadline": 1}
    assert not os.path.exists(f"/proc/{child}")


def test_a_deadline_that_is_too_short_everywhere_grows(owners, link, epoch, faults):
    faults.at(inversion=EACH).delay(1.0)
    data = payload(40, seed=5)
    link.submit(job("short", data=data, epoch=epoch, deadline_seconds=0.4))
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)
    assert 2 <= link.counters().resubmissions["deadline"] <= 3  # 0.4 s, 0.8 s, then long enough


def test_only_an_owner_of_the_fingerprint_gets_the_job(controller, owners, start_link, epoch, capfd):
    link = start_link(controller.address, as_told=context(epoch=epoch))  # here, for its standard error to be read
    fingerprint = eventually(lambda: owners[0].status()["fingerprint"], bool, seconds=30)
    link.submit(job("right", data=payload(24, seed=7), epoch=epoch, fingerprint=fingerprint))
    collect(link, 1)
    link.submit(job("wrong", data=payload(24, seed=8), epoch=epoch, fingerprint="cpu;another"))
    eventually(lambda: link.counters().resubmissions, lambda seen: seen == {"fingerprint": 1})
    assert "no owner has the run's fingerprint 'cpu;another'; theirs: ['cpu;" in capfd.readouterr().err
    link.wait(0.5)
    assert link.poll() == []


def test_both_owners_are_away_for_a_while(owners, link, epoch):
    for owner in owners:
        owner.kill()
    data = payload(40, seed=6)
    link.submit(job("patient", data=data, epoch=epoch))
    eventually(lambda: link.counters().resubmissions.get("owner_lost", 0), lambda tries: tries > len(owners))
    assert link.poll() == []
    owners[0].start()  # the other one stays away: this is the last test
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)

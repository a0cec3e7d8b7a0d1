"""Which owner a courier tries next, from what it was told and what it went through."""

from dataclasses import replace

import pytest

from kfdist.links.courier.known_owners import KnownOwner, OwnerDirectory
from kfdist.policies.assignment import rendezvous


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(clock: Clock) -> OwnerDirectory:
    directory = OwnerDirectory(clock)
    directory.update(owners("a", "b", "c"))
    return directory


def owners(*names: str, port: int = 1, fingerprint: str = "cpu") -> list[KnownOwner]:
    return [KnownOwner(owner_id=name, address=f"127.0.0.1:{port}", fingerprint=fingerprint) for name in names]


def order(directory: OwnerDirectory, fingerprint: str = "") -> list[str]:
    return [owner.owner_id for owner in directory.order("group", fingerprint)]


def test_without_an_assignment_the_order_is_that_of_rendezvous_hashing(directory):
    assert order(directory) == rendezvous("group", ["a", "b", "c"])


@pytest.mark.parametrize("assigned", ["a", "b", "c"])
def test_the_assigned_owner_comes_first(directory, assigned):
    directory.assign({"group": assigned})
    others = [name for name in rendezvous("group", ["a", "b", "c"]) if name != assigned]
    assert order(directory) == [assigned, *others]


def test_an_assigned_owner_that_is_not_there(directory):
    directory.assign({"group": "gone"})
    assert order(directory) == rendezvous("group", ["a", "b", "c"])


def test_a_list_without_an_owner_proves_nothing_and_its_absence_for_long_does(directory, clock):
    directory.update(owners("a", "b"))
    assert set(order(directory)) == {"a", "b", "c"}
    clock.now += 2.9
    directory.update(owners("a", "b"))
    assert set(order(directory)) == {"a", "b", "c"}
    clock.now += 0.2
    directory.update(owners("a", "b"))
    assert set(order(directory)) == {"a", "b"}


def test_an_owner_that_is_listed_again_was_never_absent(directory, clock):
    directory.update(owners("a", "b"))
    clock.now += 2.0
    directory.update(owners("a", "b", "c"))
    clock.now += 2.0
    directory.update(owners("a", "b"))
    assert set(order(directory)) == {"a", "b", "c"}


def test_silence_of_the_controller_forgets_nobody(directory, clock):
    directory.update(owners("a", "b"))
    clock.now += 1.0
    directory.update(owners("a", "b", "c"))
    clock.now += 3600.0
    directory.update(owners("a", "b"))
    assert set(order(directory)) == {"a", "b", "c"}


def test_an_empty_list_is_ignored(directory, clock):
    directory.update([])
    clock.now += 60.0
    directory.update([])
    assert set(order(directory)) == {"a", "b", "c"}


def test_a_suspended_owner_is_left_alone_longer_each_time(directory, clock):
    (owner,) = [each for each in directory.owners if each.owner_id == "b"]
    waits = []
    for _ in range(8):
        directory.suspend(owner)
        directory.suspend(owner)  # one fault fails several calls; it counts once
        begun = clock.now
        while "b" not in order(directory):
            clock.now += 0.05
        waits.append(clock.now - begun)
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.25, abs=0.06)
    assert waits[-1] == pytest.approx(2.0, abs=0.06)
    directory.trust(owner)
    directory.suspend(owner)
    clock.now += 0.26
    assert "b" in order(directory)


def test_an_owner_at_another_address_begins_anew(directory):
    (old,) = [each for each in directory.owners if each.owner_id == "b"]
    directory.suspend(old)
    directory.update([*owners("a", "c"), *owners("b", port=2)])
    assert "b" in order(directory)
    assert not directory.is_current(old)
    directory.suspend(old)  # a call to the old address that fails late says nothing about the new one
    assert "b" in order(directory)


def test_only_owners_of_the_fingerprint_or_of_none_that_is_known(directory):
    directory.update([*owners("a"), *owners("b", fingerprint="gpu"), *owners("c", fingerprint="")])
    assert set(order(directory, "cpu")) == {"a", "c"}
    assert set(order(directory, "gpu")) == {"b", "c"}
    assert set(order(directory, "")) == {"a", "b", "c"}


def test_a_drained_owner_gets_no_new_jobs_and_keeps_those_it_has() -> None:
    directory = OwnerDirectory()
    first, second = (KnownOwner(owner_id=name, address="127.0.0.1:1") for name in ("owner-0", "owner-1"))
    directory.update([first, second])
    directory.assign({"g": "owner-0"})
    directory.update([replace(first, draining=True), second])
    assert [owner.owner_id for owner in directory.order("g", "")] == ["owner-1"]
    assert directory.is_current(first), "calls to it go on"
    assert not directory.takes_jobs(first) and directory.takes_jobs(second)
    directory.update([first, second])
    assert directory.takes_jobs(first)


@pytest.mark.parametrize("away", [[], ["a", "c"]], ids=["with all others", "alone"])
def test_an_owner_that_comes_back_is_tried_at_once(directory, clock, away):
    (owner,) = owners("b")
    for _ in range(8):
        directory.suspend(owner)
        clock.now += 2.1
    directory.suspend(owner)
    directory.update(owners("a", "b", "c"))  # it is only unwell
    arrivals = directory.arrivals
    assert "b" not in order(directory)
    directory.update(owners(*away))
    assert directory.arrivals == arrivals
    clock.now += 0.1
    directory.update(owners("a", "b", "c"))
    assert "b" in order(directory) and directory.arrivals > arrivals

"""Threads that compute beside the one that trains."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kfdist.links.own_threads import Share, give_way, set_own_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def told_by_a_thread(question: Callable[[], object]) -> object:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(question()))
    thread.start()
    thread.join()
    return answers[0]


def test_a_threads_number_is_its_own() -> None:
    seen: list[int] = []

    def alone() -> None:
        for count in (1, 3, 1):
            set_own_threads(count)
            _ = torch.randn(300, 300) @ torch.randn(300, 300)
            seen.append(torch.get_num_threads())
            assert told_by_a_thread(torch.get_num_threads) == 2, "threads that begin later"

    told_by_a_thread(alone)
    assert seen == [1, 3, 1]
    assert torch.get_num_threads() == 2, "the thread that trains"


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")


@linux
def test_only_the_thread_itself_gives_way() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def lowered() -> tuple[bool, int]:
        return give_way(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert told_by_a_thread(lowered) == (True, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_where_no_thread_may_give_way_it_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    assert told_by_a_thread(give_way) is False


@contextmanager
def a_share(work: Callable[[threading.Event], None]) -> Iterator[tuple[Share, threading.Event]]:
    ends = threading.Event()
    thread = threading.Thread(target=work, args=(ends,))
    thread.start()
    try:
        share = Share(thread)
        share.works()
        yield share, ends
    finally:
        ends.set()
        thread.join()


def within(seconds: float, share: Share) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if share.starves():
            return True
        time.sleep(0.05)
    return False


@linux
def test_a_thread_that_gets_nothing_starves_and_one_that_computes_or_idles_does_not() -> None:
    def waiting(ends: threading.Event) -> None:
        ends.wait()  # it is given as little as a thread that is kept waiting

    with a_share(waiting) as (share, _):
        assert within(10, share)

    def computing(ends: threading.Event) -> None:
        a = torch.randn(200, 200)
        while not ends.is_set():
            _ = a @ a

    with a_share(computing) as (share, _):
        assert not within(1.5, share)

    with a_share(waiting) as (share, _):
        assert not share.starves()
        share.idles()
        assert not within(1.5, share)
        share.works()
        assert not share.starves(), "what it had nothing to do doesn't count"
        assert within(10, share)

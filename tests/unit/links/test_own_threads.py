"""Threads that compute beside the one that trains."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from kfdist.links.own_threads import set_own_threads


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

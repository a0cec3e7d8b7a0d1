"""How many of torch's threads a thread beside the one that trains takes."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

_Answer = TypeVar("_Answer")

_default_changes = threading.Lock()


def set_own_threads(count: int) -> None:
    """Sets how many threads the operations of the thread that calls this take, and leaves those of others as they are.

    A thread that computes with more than one has a pool of OpenMP threads of its own. Once pools have more threads than
    there are cores, libgomp lets none of them wait awake, also while one pool idles: the small operations of a training
    on two cores then take two to three times as long.

    Args:
        count: At least 1.
    """
    if torch.get_num_threads() == count:
        return
    with _default_changes:
        # What is set is also what threads that haven't computed yet begin with; one of them undoes that.
        default = _of_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        _of_a_new_thread(lambda: torch.set_num_threads(default))


def _of_a_new_thread(ask: Callable[[], _Answer]) -> _Answer:
    answers: list[_Answer] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    thread.join()
    return answers[0]

"""Threads that compute beside the one that trains: how many of torch's, at which priority, and what they get."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

_Answer = TypeVar("_Answer")

_LOWEST = 19
"""The niceness that leaves a core to whoever else wants it, but for one part in seventy."""

_LEAST_SHARE = 0.05
"""A thread that gets less of a core while it has work starves: beside one other it would get half."""

_LOOK_SECONDS = 1.0
"""What is taken for its share lasts at least so long; the system counts hundredths of a second."""

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


def give_way() -> bool:
    """Gives the calling thread the lowest priority, for good; returns False where that can't be done."""
    if sys.platform != "linux":  # elsewhere a thread has no priority of its own
        return False
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
    except OSError:  # a sandbox may refuse it
        return False
    return True


class Share:
    """What a thread of this process gets of a core while it has work.

    Args:
        thread: One that was started.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._spell: object | None = None
        self._looked: tuple[object, float, float] | None = None

    def works(self) -> None:
        """Says that the thread has work from now on; called by the thread itself."""
        self._spell = self._spell or object()

    def idles(self) -> None:
        """Says that the thread has no work for now; called by the thread itself."""
        self._spell = None

    def starves(self) -> bool:
        """Says whether the thread has had work since a call at least a second ago, and got hardly any time for it."""
        spell, before, now = self._spell, self._looked, time.monotonic()
        if spell is None:
            return False
        if before is None or before[0] is not spell:
            self._looked = spell, now, _processor_seconds(self._thread)
            return False
        if now < before[1] + _LOOK_SECONDS:
            return False
        had = _processor_seconds(self._thread)
        self._looked = spell, now, had
        return had - before[2] < _LEAST_SHARE * (now - before[1])


def _processor_seconds(thread: threading.Thread) -> float:
    """Returns what a thread has had of processors; not a number where the system doesn't say."""
    try:
        said = Path(f"/proc/self/task/{thread.native_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return float("nan")
    # The name, in parentheses, may have anything in it; behind it utime and stime are fields 14 and 15 of proc(5).
    user, system = said.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

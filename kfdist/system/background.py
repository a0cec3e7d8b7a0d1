"""A thread that computes beside the one that trains, and takes nothing from it."""

import os
import sys
import threading
import time
from pathlib import Path

import torch

_LOWEST = 19
"""The niceness that leaves a core to whoever else wants it, but for one part in seventy."""

_LEAST_SHARE = 0.05
"""A thread that gets less of a core while it has work starves: beside one other it would get half."""

_LOOK_SECONDS = 1.0
"""What is taken for its share lasts at least so long; the system counts hundredths of a second."""


def set_own_threads(count: int) -> None:
    """Sets how many threads the operations of the thread that calls this take, and leaves those of others as they are.

    A thread that computes with more than one has a pool of OpenMP threads of its own. Once pools have more threads than
    there are cores, libgomp lets none of them wait awake, also while one pool idles: the small operations of a training
    on two cores then take two to three times as long.

    Args:
        count: At least 1.
    """
    others = torch.get_num_threads()  # this thread has the process's number from here on, and may change its own
    if count == others:
        return
    torch.set_num_threads(count)
    # It is now also what threads that haven't computed yet begin with; one that ends at once undoes that.
    undo = threading.Thread(target=torch.set_num_threads, args=(others,))
    undo.start()
    undo.join()


def give_way() -> bool:
    """Gives the calling thread the lowest priority, for good; returns False where threads have none of their own."""
    if sys.platform != "linux":
        return False
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
    return True


class Share:
    """What a thread of this process gets of a core while it has work.

    Args:
        thread: One that was started.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._idled = True
        self._since, self._had = 0.0, 0.0

    def idles(self) -> None:
        """Says that the thread has nothing to do for now; called by the thread itself."""
        self._idled = True

    def starves(self) -> bool:
        """Says whether the thread has had work since a call at least a second ago, and got hardly any time for it."""
        now = time.monotonic()
        if self._idled:
            self._idled, self._since, self._had = False, now, _processor_seconds(self._thread)
            return False
        if now < self._since + _LOOK_SECONDS:
            return False
        before, since = self._had, self._since
        self._since, self._had = now, _processor_seconds(self._thread)
        return self._had - before < _LEAST_SHARE * (now - since)


def _processor_seconds(thread: threading.Thread) -> float:
    """Returns what a thread has had of processors; infinitely much where the system doesn't say."""
    try:
        said = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return float("inf")
    # The name, in parentheses, may have anything in it; behind it utime and stime are fields 14 and 15 of proc(5).
    user, system = said.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

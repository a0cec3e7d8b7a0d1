"""Counts the requests to stop that arrive as signals, for a loop that looks at the count."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequests:
    """How often this process was asked to stop: by Ctrl-C, SIGTERM, or the end of the terminal.

    Attributes:
        count: Requests so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Counts one; a signal handler."""
        del number, frame
        self.count += 1


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Counts stop signals while the context lasts and restores the former handlers after it.

    An ignored SIGHUP stays ignored, so that `nohup` works. Outside the main thread, where Python allows no handlers,
    nothing is counted.
    """
    requests = StopRequests()
    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, requests.ask)
    try:
        yield requests
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

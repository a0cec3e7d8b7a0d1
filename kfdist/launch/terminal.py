"""The launcher's user: what is told, as lines on the terminal or one JSON object at the end; and requests to stop."""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from kfdist.system.run_summary import unsaved

_ERASE_LINE = "\r\x1b[2K"
_SHOW_CURSOR = "\x1b[?25h"


class Terminal:
    """Writes for users on standard output; with `as_json`, for users on standard error and for programs on output.

    Attributes:
        as_json: Whether standard output is kept for one JSON object.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self.as_json else sys.stdout

    @property
    def descriptor(self) -> int:
        """Where a child writes what is meant for users."""
        return self._stream.fileno()

    def say(self, text: str) -> None:
        """Tells how it goes."""
        _print_line(text, self._stream)

    def warn(self, text: str) -> None:
        """Tells what went wrong."""
        _print_line(f"kfdist: {text}", sys.stderr)

    def restore(self) -> None:
        """Removes the bar and shows the cursor again, in case rank 0 was killed before it could."""
        if self._stream.isatty():
            print(_ERASE_LINE + _SHOW_CURSOR, end="", file=self._stream, flush=True)

    def result(self, summary: Mapping[str, Any]) -> None:
        """Prints the summary for programs; nothing without `as_json`."""
        if self.as_json:
            print(json.dumps(summary), flush=True)


def _print_line(text: str, stream: TextIO) -> None:
    # Rank 0 may be redrawing a bar on this line; it draws a new one below.
    print(_ERASE_LINE + text if stream.isatty() else text, file=stream, flush=True)


def summary_line(summary: Mapping[str, Any]) -> str:
    """Says in one line how a run ended: steps, seconds, accuracy, staleness."""
    metrics = summary.get("metrics") or {}
    staleness = summary.get("staleness_steps") or {}
    parts = [
        f"{summary.get('status', 'ended')}: {summary.get('steps', 0)} steps in {summary.get('seconds', 0.0):.1f} s"
    ]
    if (accuracy := metrics.get("test_accuracy")) is not None:
        parts.append(f"test accuracy {100 * accuracy:.2f} %")
    if staleness.get("p50") is not None:
        parts.append(f"staleness {staleness['p50']:g} steps (median), {staleness['max']:g} (max)")
    if lost := unsaved(summary):
        parts.append(f"but {lost}")
    return ", ".join(parts)


class StopRequests:
    """How often this process was asked to stop: by Ctrl-C, SIGTERM, or the end of the terminal.

    Attributes:
        count: Requests so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raising = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Counts one; a signal handler."""
        del number, frame
        self.count += 1
        if self._raising:
            raise KeyboardInterrupt

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raises KeyboardInterrupt at each request while the context lasts, and at once if one has come before.

        For work that nobody counts requests in, and that leaves nothing to be ended in order.
        """
        self._raising = True
        try:
            if self.count:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False


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

"""What the launcher tells users: lines on the terminal, or one JSON object at the end."""

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

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
    return ", ".join(parts)

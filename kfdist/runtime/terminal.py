"""What the launcher tells people: sentences on the terminal, or one JSON object at the end."""

import json
import sys
from collections.abc import Mapping
from typing import Any


class Terminal:
    """Writes for people on standard output; with `as_json`, for people on standard error and for programs on output.

    Attributes:
        as_json: Whether standard output is kept for one JSON object.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @property
    def descriptor(self) -> int:
        """Where a child writes what is meant for people."""
        return (sys.stderr if self.as_json else sys.stdout).fileno()

    def say(self, text: str) -> None:
        """Tells how it goes."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def warn(self, text: str) -> None:
        """Tells what went wrong."""
        print(f"kfdist: {text}", file=sys.stderr, flush=True)

    def result(self, summary: Mapping[str, Any]) -> None:
        """Prints the summary for programs; nothing without `as_json`."""
        if self.as_json:
            print(json.dumps(summary), flush=True)


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

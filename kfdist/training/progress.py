"""What a run tells its user on the terminal: plain lines; on a terminal, a bar (live_progress.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from typing_extensions import override

_LONGEST_SECONDS = 1e9
"""Thirty years: what is left of a run without an end in sight may be more than a timedelta holds."""


def duration(seconds: float) -> str:
    """Says a duration for people, as in "0:05:14"."""
    return str(timedelta(seconds=round(min(seconds, _LONGEST_SECONDS))))


def shown(metric: str, value: float, *, width: int = 0) -> str:
    """Says a metric for people: a share in percent, anything else as a number; `width` pads it."""
    number = f"{value:.2%}" if metric.endswith("accuracy") else f"{value:.4f}"
    return f"{metric.replace('_', ' ')} {number:>{width}}"


@dataclass(frozen=True, kw_only=True)
class ProgressLine:
    """Where a run stands.

    Attributes:
        step: Steps done.
        total_steps: Steps of the whole run.
        loss: Mean training loss since the last one.
        metrics: Means of the objective's metrics since the last one.
        staleness: Largest staleness of any block, in steps; None without a preconditioner.
        steps_per_second: Since the last one.
    """

    step: int
    total_steps: int
    loss: float
    metrics: Mapping[str, float]
    staleness: int | None
    steps_per_second: float

    def text(self) -> str:
        """Says it in one line."""
        staleness = "" if self.staleness is None else f"  staleness {self.staleness:3d}"
        width = len(str(self.total_steps))
        metrics = "  ".join(shown(name, value, width=7) for name, value in self.metrics.items())
        return (
            f"step {self.step:{width}d}/{self.total_steps}  loss {self.loss:8.4f}  {metrics}{staleness}"
            f"  {self.steps_per_second:6.1f} steps/s"
        )


class Progress:
    """Shows a run to its user; this one shows nothing, for ranks other than 0."""

    def show(self, line: ProgressLine) -> None:
        """Shows where the run stands."""

    def say(self, text: str) -> None:
        """Tells of an event."""

    def close(self) -> None:
        """Gives the terminal back."""


class PlainProgress(Progress):
    """One line per log period."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @override
    def show(self, line: ProgressLine) -> None:
        self.say(line.text())

    @override
    def say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

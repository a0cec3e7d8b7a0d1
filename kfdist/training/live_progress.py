"""Training's own progress bar: one line, redrawn in place, that fits the terminal however wide it is just now."""

import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text
from typing_extensions import override

from kfdist.training.progress import Progress, ProgressLine, duration, shown

_SHORTEST_BAR = 7
_LONGEST_BAR = 40
_GAP = 2


class LiveProgress(Progress):
    """A bar that is redrawn in place, with what is said above it; for terminals."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._line = _Line(total_steps=total_steps, began=time.monotonic())
        self._live = Live(self._line, console=Console(file=stream), refresh_per_second=4)
        self._live.start()

    @override
    def show(self, line: ProgressLine) -> None:
        self._line.take(line)
        self._live.refresh()

    @override
    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @override
    def close(self) -> None:
        self._live.stop()


@dataclass
class _Line:
    """The line. Parts that don't fit are left out whole, those first that are missed least."""

    total_steps: int
    began: float
    first: int = 0
    newest: ProgressLine | None = None
    heard: float = 0.0

    def take(self, line: ProgressLine) -> None:
        self.heard = time.monotonic()
        if self.newest is None:
            self.first, self.began = line.step, self.heard
        self.newest = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One column stays free: some terminals go to the next line when the last one is written.
        parts, bar = self._fitting(options.max_width - 1)
        yield Text(parts[0], no_wrap=True, overflow="crop", end="")
        if bar:
            yield Text(" " * _GAP, end="")
            step = self.newest.step if self.newest is not None else 0
            yield from console.render(
                ProgressBar(total=self.total_steps, completed=step, width=bar), options.update_width(bar)
            )
        yield Text("".join(" " * _GAP + part for part in parts[1:]), no_wrap=True, overflow="crop")

    def _fitting(self, room: int) -> tuple[list[str], int]:
        """Returns the parts that fit, as they are shown, and the width of the bar; 0 if there is no room for one."""
        line = self.newest
        if line is None:
            return ["starting"], 0
        metrics = [shown(name, value, width=6) for name, value in line.metrics.items()]
        stale = [] if line.staleness is None else [f"staleness {line.staleness:2d}"]
        rate = f"{line.steps_per_second:.1f} steps/s"
        loss, left, elapsed = (
            f"loss {line.loss:6.4f}",
            f"{self._left(line)} left",
            f"{duration(self._elapsed())} so far",
        )
        width = len(str(line.total_steps))
        shown_parts = [f"step {line.step:{width}d}/{line.total_steps}", loss, *metrics, *stale, rate, elapsed, left]
        kept = {shown_parts[0]}
        room -= len(shown_parts[0])
        bar = 0
        for part in (loss, left, *metrics[:1], *stale, None, rate, *metrics[1:], elapsed):
            needed = _GAP + (_SHORTEST_BAR if part is None else len(part))
            if needed > room:
                continue
            room -= needed
            if part is None:
                bar = _SHORTEST_BAR
            else:
                kept.add(part)
        return [part for part in shown_parts if part in kept], min(_LONGEST_BAR, bar + room) if bar else 0

    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _left(self, line: ProgressLine) -> str:
        done, remaining = line.step - self.first, line.total_steps - line.step
        if remaining <= 0:
            return duration(0.0)
        if done > 0:
            return duration(max(0.0, (self.heard - self.began) * remaining / done - (time.monotonic() - self.heard)))
        return duration(remaining / line.steps_per_second) if line.steps_per_second > 0 else "?"

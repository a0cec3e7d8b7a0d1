"""What a page is made of: chapters with sentences, plots and tables; and what several of them need of a run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from kfdist.report.figures import Curve
from kfdist.report.recorded import Line, Recorded
from kfdist.telemetry.durations import Durations

NO_HISTORY = "history.jsonl has no window of steps: no log period was completed, or an older kfdist trained the run."


MOST_RANGES = 150

NO_METHOD = "The run has no preconditioner: nothing was inverted."


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of a page.

    Attributes:
        svg: As it is drawn.
        told: What it shows, for those who can't see it.
    """

    svg: str
    told: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page.

    Attributes:
        caption: What is in it.
        heads: Of its columns.
        rows: Cells as text.
        folded: Whether readers open it.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A part of a page.

    Attributes:
        title: Its title.
        sentences: What is said.
        plots: What is shown.
        tables: Its numbers.
    """

    title: str
    sentences: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


def later_starts(run: Recorded) -> list[int]:
    """Returns the steps that later starts went on from."""
    return [line["step"] for line in run.starts[1:]]


def curve(lines: Iterable[Line], key: str, like: Curve) -> Iterator[Curve]:
    """Yields a value of lines by step as a curve; nothing where no line has one that is a number."""
    found = [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]
    if found:
        yield replace(like, x=[step for step, _ in found], y=[value for _, value in found])


def merged_durations(windows: Iterable[Line], key: str) -> dict[str, Durations]:
    """Adds up the durations of windows by name."""
    merged: defaultdict[str, Durations] = defaultdict(Durations)
    for line in windows:
        for name, content in line[key].items():
            merged[name].merge(Durations.from_json(content))
    return dict(merged)


def ranges(windows: Sequence[Line]) -> list[list[Line]]:
    """Groups windows, of which there may be thousands, by at most `MOST_RANGES` ranges of steps."""
    first, last = windows[0]["step"], windows[-1]["step"]
    length = (last - first) / MOST_RANGES or 1
    return [list(found) for _, found in groupby(windows, key=lambda line: int((line["step"] - first) / length))]


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the dotted keys of nested tables with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found


def inverts(run: Recorded) -> bool:
    """Tells whether the run has a preconditioner, as far as it is known."""
    return bool(run.methods) or run.config.get("preconditioner", {}).get("method", "none") != "none"

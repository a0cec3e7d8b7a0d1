"""Runs and events for people (tables on a terminal, plain columns otherwise) and for programs (JSON)."""

import json
import sys
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kfdist.control.client import EventView, RunView


def print_run(run: RunView, *, as_json: bool) -> None:
    """Prints one run, a line for each thing known of it."""
    if as_json:
        print(json.dumps(run.to_json()))
        return
    if sys.stdout.isatty():
        Console().print(_run_table(run))
        return
    for name, value in _facts(run):
        print(f"{name:<28}{value}")


def print_runs(runs: Sequence[RunView], *, as_json: bool) -> None:
    """Prints runs, a line for each."""
    if as_json:
        print(json.dumps({"runs": [run.to_json() for run in runs]}))
    elif not runs:
        print("no run yet")
    else:
        columns = ("RUN", "STATE", "STEP", "START", "WORKERS", "OWNERS", "LOSS", "CREATED")
        _print_table(columns, [_row(run) for run in runs])


def print_events(events: Sequence[EventView], *, as_json: bool) -> None:
    """Prints events, a line for each."""
    if as_json:
        print(json.dumps({"events": [event.to_json() for event in events]}))
    elif not events:
        print("no event")
    else:
        rows = [
            (str(event.event_id), event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"), event.kind, event.text)
            for event in events
        ]
        _print_table(("ID", "TIME", "KIND", "WHAT"), rows)


def run_line(run: RunView) -> str:
    """Returns a run in one line."""
    brief = {name: value for name, value in run.gauges.items() if not name.startswith("kfdist_inversion_")}
    measured = " ".join(f"{_short(name)} {value:.4g}" for name, value in sorted(brief.items()))
    members = f"{run.live_workers} workers, {run.live_owners} owners"
    return f"{run.name}: {run.state} at step {_step(run)}, {members}" + (f", {measured}" if measured else "")


class RunLines:
    """Shows a run as it changes: one table on a terminal, a line for each change otherwise, or JSON lines."""

    def __init__(self, *, as_json: bool) -> None:
        """Chooses by `as_json` and by what standard output is."""
        self._as_json = as_json
        self._live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() and not as_json else None
        self._last = ""

    def __enter__(self) -> Self:
        """Begins to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def show(self, run: RunView) -> None:
        """Shows the run's new state."""
        if self._live is not None:
            self._live.update(_run_table(run), refresh=True)
            return
        line = json.dumps(run.to_json()) if self._as_json else run_line(run)
        if line != self._last:
            print(line, flush=True)
        self._last = line


def _facts(run: RunView) -> list[tuple[str, str]]:
    facts = [
        ("run", run.name),
        ("state", run.state.value),
        ("step", _step(run)),
        ("start", str(run.epoch)),
        ("workers alive", str(run.live_workers)),
        ("owners alive", str(run.live_owners)),
        ("created", run.created.astimezone().strftime("%Y-%m-%d %H:%M:%S")),
    ]
    if run.directory:
        facts.append(("directory", run.directory))
    return facts + [(_short(name), f"{value:.6g}") for name, value in sorted(run.gauges.items())]


def _run_table(run: RunView) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(run):
        table.add_row(name, value)
    return table


def _row(run: RunView) -> tuple[str, ...]:
    loss = run.gauges.get("kfdist_loss")
    return (
        run.name,
        run.state.value,
        _step(run),
        str(run.epoch),
        str(run.live_workers),
        str(run.live_owners),
        "-" if loss is None else f"{loss:.4g}",
        run.created.astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _step(run: RunView) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _short(metric: str) -> str:
    return metric.removeprefix("kfdist_").replace("_", " ")

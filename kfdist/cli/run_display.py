"""Shows runs and events: as tables on a terminal, as plain columns elsewhere, as JSON to programs."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kfdist.cli.find_runs import Survey, Target
from kfdist.cli.run_files import RunFiles
from kfdist.control.client import EventView, RunView, finite_or_none
from kfdist.errors import EnvironmentFault
from kfdist.telemetry.metrics import METRICS, Kind
from kfdist.types import MetricSample

_BLOCK_COLUMNS = {
    "kfdist_staleness_steps": "STALE",
    "kfdist_inversion_rung": "RETRIES",
    "kfdist_inversion_rank": "RANK",
    "kfdist_inversion_residual": "RESIDUAL",
    "kfdist_inversion_approximation_error": "APPROX",
    "kfdist_inversion_orthogonality_error": "ORTHOG",
    "kfdist_inversion_smallest_eigenvalue": "MIN EIG",
}
"""What the table of blocks shows: short heads, so that seven of them leave room for a name within 80 columns."""


def print_target(target: Target, *, as_json: bool) -> None:
    """Prints one run: as its controller tells it, else as its directory does.

    Raises:
        ConfigError: Its controller doesn't know it.
        EnvironmentFault: Its controller doesn't answer, and this machine doesn't have its directory.
    """
    if target.controller is None and target.files is not None:
        _print_files(target.files, as_json=as_json)
        return
    try:
        with target.client() as client:
            print_run(target.view(client), client.samples(target.name), as_json=as_json)
    except EnvironmentFault as fault:
        if target.files is None:
            raise
        print(f"kfdist: {fault}", file=sys.stderr)
        _print_files(target.files, as_json=as_json)


def print_survey(survey: Survey, *, as_json: bool) -> None:
    """Prints the runs that were found, a line for each, and which controllers didn't answer."""
    for fault in survey.silent:
        print(f"kfdist: {fault}", file=sys.stderr)
    if as_json or survey.runs:
        print_runs([found.view for found in survey.runs], as_json=as_json)
    elif not survey.silent:
        print(survey.nothing())


def _print_files(files: RunFiles, *, as_json: bool) -> None:
    view, remarks = files.view(), files.remarks()
    if as_json:
        told = {
            name.replace(" ", "_"): value.isoformat() if isinstance(value, datetime) else value
            for name, value in remarks.items()
        }
        print(json.dumps({**view.to_json(), "samples": [], "files": told}))
        return
    facts = [(name, value) for name, value in _facts(view) if not name.endswith("alive")]
    facts += [(name, _remark(name, value)) for name, value in remarks.items()]
    if files.trainer:
        facts.append(("trained by", files.trainer))
    else:
        facts.append(("next", files.advice()))
    _print_facts(facts)


def _remark(name: str, value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.6g}"
    return str(value)


def print_run(run: RunView, samples: Sequence[MetricSample], *, as_json: bool) -> None:
    """Prints one run: a line for each fact and each counter, then a line for each block.

    Args:
        run: The run.
        samples: What its processes measured.
        as_json: All of it as one JSON object instead.
    """
    if as_json:
        listed = [{**asdict(sample), "value": finite_or_none(sample.value)} for sample in samples]
        print(json.dumps({**run.to_json(), "samples": listed}))
        return
    _print_facts(_facts(run) + _counters(samples))
    columns, rows = _blocks(samples)
    if rows:
        print()
        _print_table(columns, rows)


def print_runs(runs: Sequence[RunView], *, as_json: bool) -> None:
    """Prints runs, a line for each."""
    if as_json:
        print(json.dumps({"runs": [run.to_json() for run in runs]}))
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
    measured = " ".join(f"{name} {value:.4g}" for name, value in _gauges(run))
    members = f"{run.live_workers} workers, {run.live_owners} owners"
    return f"{run.name}: {run.state} at step {_step(run)}, {members}" + (f", {measured}" if measured else "")


def print_changes(runs: Iterable[RunView], *, as_json: bool) -> None:
    """Prints a run as it changes until it ends: one table on a terminal, a line for each change otherwise."""
    last = ""
    with Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() and not as_json else nullcontext() as live:
        for run in runs:
            if live is not None:
                live.update(_facts_table(_facts(run)), refresh=True)
            elif (line := json.dumps(run.to_json()) if as_json else run_line(run)) != last:
                print(line, flush=True)
                last = line
            if run.state.ended:
                return


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
    return facts + [(name, f"{value:.6g}") for name, value in _gauges(run)]


def _gauges(run: RunView) -> list[tuple[str, float]]:
    # Diagnostics of inversions are for the table of blocks.
    return [(_short(name), value) for name, value in sorted(run.gauges.items()) if "inversion" not in name]


def _counters(samples: Sequence[MetricSample]) -> list[tuple[str, str]]:
    """Names every counter by its metric and labels, such as "bytes jobs"; those at zero are left out."""
    counters = [s for s in samples if s.name in METRICS and METRICS[s.name].kind is Kind.COUNTER and s.value]
    return [
        (" ".join([_short(s.name.removesuffix("_total")), *s.labels.values()]), _amount(s.name, s.value))
        for s in counters
    ]


def _blocks(samples: Sequence[MetricSample]) -> tuple[list[str], list[list[str]]]:
    """Returns the heads and rows of the table of blocks; columns without any value are left out."""
    values: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.name in _BLOCK_COLUMNS and "block" in sample.labels:
            of_block = values.setdefault(sample.labels["block"], {})
            known = of_block.get(sample.name, sample.value)
            of_block[sample.name] = METRICS[sample.name].across.worst([known, sample.value])  # of the factors
    shown = [name for name in _BLOCK_COLUMNS if any(name in of_block for of_block in values.values())]
    rows = [
        [block, *(_brief(of_block[name]) if name in of_block else "-" for name in shown)]
        for block, of_block in values.items()
    ]
    return ["BLOCK", *(_BLOCK_COLUMNS[name] for name in shown)], rows


def _brief(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def _amount(metric: str, value: float) -> str:
    if metric != "kfdist_bytes_total":
        return f"{value:.6g}"
    exponent = min(int(math.log10(value)) // 3, 5) if value >= 1 else 0
    return f"{value / 1000**exponent:.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[exponent]}"


def _print_facts(facts: Sequence[tuple[str, str]]) -> None:
    if sys.stdout.isatty():
        Console().print(_facts_table(facts))
        return
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        print(f"{name:<{width}}{value}")


def _facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts:
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
            table.add_column(column, overflow="fold")  # a long name takes two lines rather than losing its end
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

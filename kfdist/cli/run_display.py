"""Shows runs and events: as tables on a terminal, as plain columns elsewhere, as JSON to programs."""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfdist.cli.block_table import COLUMNS, block_table, blocks_of, rank_note, shortened
from kfdist.cli.find_runs import Survey
from kfdist.cli.live_view import ranks_of, step_of
from kfdist.cli.run_files import RunFiles
from kfdist.cli.run_target import Target
from kfdist.control.client import EventView, OwnerView, RunView, finite_or_none
from kfdist.errors import EnvironmentFault
from kfdist.policies import tuning
from kfdist.telemetry.metrics import METRICS, Kind
from kfdist.types import MetricSample

_OF_BLOCKS = ("kfdist_inversion_", "kfdist_block_")
_RUN_COLUMNS = ("RUN", "STATE", "STEP", "START", "RANKS", "OWNERS", "LOSS", "CREATED", "DIRECTORY")
_SPARED_COLUMNS = ("START", "CREATED", "DIRECTORY", "OWNERS", "RANKS", "LOSS")
"""What a terminal that is too narrow for all columns is spared, the first one first."""

_LEAST_OF_DIRECTORY = 20
_EVENT_COLUMNS = ("ID", "TIME", "KIND", "WHAT")
_LEAST_OF_TEXT = 30
_SHOWN_BLOCKS = 40
"""As many blocks as a terminal gets; a pipe gets all."""


def print_target(target: Target, *, as_json: bool) -> bool:
    """Prints one run: as its controller tells it, else as its directory does; says whether nobody failed to answer.

    Raises:
        ConfigError: Its controller doesn't know it.
        EnvironmentFault: Its controller doesn't answer, and this machine doesn't have its directory.
    """
    if target.controller is None and target.files is not None:
        _print_files(target.files, as_json=as_json)
        return True
    try:
        with target.client() as client:
            run, owners = target.view(client), client.owners(target.name)
            print_run(run, owners, client.samples(target.name), as_json=as_json)
    except EnvironmentFault as fault:
        if target.files is None:
            raise
        print(f"kfdist: {fault}; this is what its files tell", file=sys.stderr)
        _print_files(target.files, as_json=as_json)
        return False
    return True


def print_survey(survey: Survey, *, as_json: bool, in_full: bool = False) -> bool:
    """Prints the runs that were found and which controllers didn't answer; says whether all did.

    Args:
        survey: What was found.
        as_json: All of it as one JSON object.
        in_full: Whether to print all about a run that is the only one, rather than a line.
    """
    for fault in survey.silent:
        print(f"kfdist: {fault}", file=sys.stderr)
    if in_full and len(survey.runs) == 1 and not as_json:
        (only,) = survey.runs
        target = only.target if only.answered else replace(only.target, controller=None)
        return print_target(target, as_json=False) and not survey.silent
    if as_json:
        told = {"silent": list(survey.silent)} if survey.silent else {}
        print(json.dumps({"runs": [found.view.to_json() for found in survey.runs], **told}))
    elif survey.runs:
        print_runs([found.view for found in survey.runs])
    elif not survey.silent:
        print(survey.nothing())
    return not survey.silent


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


def print_run(run: RunView, owners: Sequence[OwnerView], samples: Sequence[MetricSample], *, as_json: bool) -> None:
    """Prints one run: a line for each fact and each counter, then a line for each block.

    Args:
        run: The run.
        owners: The live owners.
        samples: What its processes measured.
        as_json: All of it as one JSON object instead.
    """
    if as_json:
        listed = [{**asdict(sample), "value": finite_or_none(sample.value)} for sample in samples]
        print(json.dumps({**run.to_json(), "owners": [asdict(owner) for owner in owners], "samples": listed}))
        return
    _print_facts(_facts(run, owners) + _settings(run) + _counters(samples))
    _print_blocks(run.name, samples)


def print_runs(runs: Sequence[RunView]) -> None:
    """Prints runs, a line for each."""
    if sys.stdout.isatty():
        console = Console()
        console.print(runs_table(runs, console.width))
    else:
        _print_columns(_RUN_COLUMNS, [_row(run) for run in runs])


def runs_table(runs: Sequence[RunView], width: int) -> Table:
    """Draws runs, a line for each; a narrow terminal gets fewer columns, and then shorter names, but no digit less."""
    rows = [_row(run) for run in runs]
    widths = _widths(_RUN_COLUMNS, rows)
    least = {**widths, "DIRECTORY": min(widths["DIRECTORY"], _LEAST_OF_DIRECTORY)}
    shown = list(_RUN_COLUMNS)
    for spared in _SPARED_COLUMNS:
        if sum(least[head] + 2 for head in shown) - 2 > width:
            shown.remove(spared)
    longest = "DIRECTORY" if "DIRECTORY" in shown else "RUN"
    room = max(5, width - sum(widths[head] + 2 for head in shown if head != longest))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in shown:
        table.add_column(head, no_wrap=True, overflow="crop")
    for row in rows:
        cells = dict(zip(_RUN_COLUMNS, row, strict=True))
        table.add_row(*(shortened(cells[head], room) if head == longest else cells[head] for head in shown))
    return table


def print_events(events: Sequence[EventView], *, as_json: bool) -> None:
    """Prints events, a line for each."""
    if as_json:
        print(json.dumps({"events": [event.to_json() for event in events]}))
    elif not events:
        print("no event")
    elif sys.stdout.isatty():
        console = Console()
        console.print(events_table(events, console.width))
    else:
        _print_columns(_EVENT_COLUMNS, list(map(_event_row, events)))


def events_table(events: Sequence[EventView], width: int) -> Table:
    """Draws events; where a terminal is narrow, what happened stands below when and of what kind."""
    rows = list(map(_event_row, events))
    widths = _widths(_EVENT_COLUMNS, rows)
    beside = width - sum(widths[head] + 2 for head in _EVENT_COLUMNS[:-1]) >= _LEAST_OF_TEXT
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("ID", no_wrap=True)
    if beside:
        for head in _EVENT_COLUMNS[1:-1]:
            table.add_column(head, no_wrap=True)
    table.add_column("WHAT", overflow="fold")
    for number, time, kind, text in rows:
        if beside:
            table.add_row(number, time, kind, text)
        else:
            table.add_row(number, Text.assemble(f"{time} ", (kind, "bold")))
            table.add_row("", text)
    return table


def _event_row(event: EventView) -> tuple[str, str, str, str]:
    return str(event.event_id), event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"), event.kind, event.text


def run_place(run: RunView) -> str:
    """Returns in a few words where a run stands."""
    return f"{run.name}: {run.state} at step {step_of(run)}"


def run_line(run: RunView) -> str:
    """Returns a run in one line."""
    measured = ", ".join(f"{name} {value:.4g}" for name, value in _gauges(run))
    members = f"{_counted(run.live_workers, 'rank')}, {_counted(run.live_owners, 'owner')}"
    return f"{run_place(run)}, {members}" + (f", {measured}" if measured else "")


def asked_line(run: RunView, asked: str) -> str:
    """Returns what a run is asked for, where it stands, and where its answer will be found."""
    if run.state.ended:
        return run_place(run)
    if run.obeyed_revision >= run.settings_revision > 0:
        how = f"all ranks have obeyed since step {run.obeyed_step}"
    else:
        how = f"all ranks obey at one step, which `kfdist events {run.name}` names"
    return f"{run_place(run)}; asked for {asked}: {how}"


def _facts(run: RunView, owners: Sequence[OwnerView] = ()) -> list[tuple[str, str]]:
    facts = [
        ("run", run.name),
        ("state", run.state.value),
        ("step", step_of(run)),
        ("start", str(run.epoch)),
        ("ranks alive", ranks_of(run)),
        ("owners alive", str(run.live_owners)),
        *([("owners", ", ".join(map(_owner, owners)))] if owners else []),
        ("created", run.created.astimezone().strftime("%Y-%m-%d %H:%M:%S")),
    ]
    if run.directory:
        facts.append(("directory", run.directory))
    return facts + [(name, f"{value:.6g}") for name, value in _gauges(run)]


def _owner(owner: OwnerView) -> str:
    state = "drained" if owner.draining else _counted(owner.groups, "group")
    return f"{owner.name} ({state})"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _settings(run: RunView) -> list[tuple[str, str]]:
    """Says what the ranks go by, what of it users have changed, and what they have asked for since."""
    facts = []
    if run.settings:
        facts.append(
            ("settings", ", ".join(f"{name} {tuning.shown(name, run.settings[name])}" for name in run.settings))
        )
    if run.changed:
        facts.append(("changed by users", f"{', '.join(run.changed)}; the others are as configured"))
    if run.obeyed_revision:
        facts.append(
            # Asked for by users, or what a new start began with: nobody may have asked for anything.
            ("taken up last", f"revision {run.obeyed_revision}, by all ranks at step {run.obeyed_step}")
        )
    if run.settings and run.settings_revision > run.obeyed_revision:
        facts.append(("not obeyed yet", f"revision {run.settings_revision}; kfdist events says what it is"))
    return facts


def _gauges(run: RunView) -> list[tuple[str, float]]:
    # Diagnostics of inversions are for the table of blocks.
    return [(_short(name), value) for name, value in sorted(run.gauges.items()) if not name.startswith(_OF_BLOCKS)]


def _counters(samples: Sequence[MetricSample]) -> list[tuple[str, str]]:
    """Names every counter by its metric and labels, such as "bytes jobs"; those at zero are left out."""
    counters = [s for s in samples if s.name in METRICS and METRICS[s.name].kind is Kind.COUNTER and s.value]
    return [
        (" ".join([_short(s.name.removesuffix("_total")), *s.labels.values()]), _amount(s.name, s.value))
        for s in counters
    ]


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
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def _row(run: RunView) -> tuple[str, ...]:
    loss = run.gauges.get("kfdist_loss")
    return (
        run.name,
        run.state.value,
        step_of(run),
        str(run.epoch),
        str(run.live_workers),
        str(run.live_owners),
        "-" if loss is None else f"{loss:.4g}",
        run.created.astimezone().strftime("%Y-%m-%d %H:%M"),
        _nearer(run.directory),
    )


def _nearer(directory: str) -> str:
    """Returns a directory as it is written from here, if it is below."""
    here = f"{os.getcwd()}{os.sep}"
    return directory.removeprefix(here) or "-"


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, int]:
    """Returns the characters of the longest cell under each head, the head included."""
    return {cells[0]: max(map(len, cells)) for cells in zip(columns, *rows, strict=True)}


def _print_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table for programs and files: everything whole."""
    widths = _widths(columns, rows).values()
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_blocks(run: str, samples: Sequence[MetricSample]) -> None:
    blocks = blocks_of(samples)
    if not blocks:
        return
    print()
    if note := rank_note(samples):
        print(f"{note}\n")
    if sys.stdout.isatty():
        console = Console()
        shown = blocks[:_SHOWN_BLOCKS]
        console.print(block_table(shown, console.width, full_bar=1.0, bars=False))
        if len(blocks) > len(shown):
            print(f"and {len(blocks) - len(shown)} more; `kfdist status {run} | less` shows all")
        return
    columns = [column for column in COLUMNS if any(column.metric in block.values for block in blocks)]
    methods = any(block.method for block in blocks)
    heads = ["BLOCK", *(["METHOD"] if methods else []), *(column.head.replace(" ", "_") for column in columns)]
    rows = [
        [
            block.name,
            *([block.method or "-"] if methods else []),
            *(column.form(block.values[column.metric]) if column.metric in block.values else "-" for column in columns),
        ]
        for block in blocks
    ]
    _print_columns(heads, rows)


def _short(metric: str) -> str:
    return metric.removeprefix("kfdist_").replace("_", " ")

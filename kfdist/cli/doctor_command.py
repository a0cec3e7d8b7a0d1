"""`kfdist doctor`: what of this machine would stop a run, and how to mend it."""

import json
from typing import TYPE_CHECKING

import typer

from kfdist.cli.options import FREE_PORTS, AsJson, ConfigFile, Overrides, load
from kfdist.errors import ExitCode

if TYPE_CHECKING:
    from kfdist.doctor.finding import Finding


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("doctor")(_doctor)


def _doctor(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check what a run takes of this machine.

    Versions, Ray, ports, limits, disk, clock, GPUs, certificates; each ok, a warning or failed. Nothing is started.
    Exit code 1 if a run would fail; warnings alone end with 0.
    """
    checked = load(config, overrides, defaults=FREE_PORTS)
    from kfdist.doctor.examination import examine
    from kfdist.doctor.finding import Verdict, worst

    findings = examine(checked)
    verdict = worst(findings)
    if as_json:
        print(json.dumps({"verdict": verdict.value, "findings": [each.to_json() for each in findings]}))
    else:
        _show(findings)
    raise typer.Exit(ExitCode.ENVIRONMENT if verdict is Verdict.FAILED else ExitCode.DONE)


def _show(findings: "list[Finding]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kfdist.doctor.finding import Verdict

    colours = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for style in ("", "bold"):
        table.add_column(style=style, no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(Text(each.verdict.value, style=colours[each.verdict]), each.check, Text(each.seen))
        if each.mend:
            table.add_row("", "", Text(f"mend: {each.mend}", style="italic"))
    Console(highlight=False).print(table)
    count = {verdict: sum(each.verdict is verdict for each in findings) for verdict in Verdict}
    print(", ".join(f"{number} {verdict.value}" for verdict, number in count.items() if number))

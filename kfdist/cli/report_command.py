"""`kfdist report`: a page about a run, or one that compares several."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kfdist.cli.options import AsJson


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("report")(_report)


def _report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory, as runs/digits.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page; RUN_DIR/report.html if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run: loss, staleness, times, bytes, spectra, diagnostics, configuration.

    The run may be finished, stopped or still going on. The page needs no other file and asks no other host for any.
    """
    from kfdist.report.page import write_report

    written = write_report(directory, output)
    print(json.dumps({"report": str(written)}) if as_json else f"report: {written}")

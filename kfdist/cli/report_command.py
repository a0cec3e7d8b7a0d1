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
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="A run's directory, as runs/digits; several are compared."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page; RUN_DIR/report.html, or comparison.html in the first, if not given.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run, or one that compares several.

    It shows loss, staleness, times, bytes, spectra, diagnostics and the configuration. A run may be finished, stopped
    or still going on. The page needs no other file and asks no other host for any.
    """
    if len(directories) == 1:
        from kfdist.report.page import write_report

        written = write_report(directories[0], output)
    else:
        from kfdist.report.comparison import write_comparison

        written = write_comparison(directories, output)
    print(json.dumps({"report": str(written)}) if as_json else f"report: {written}")

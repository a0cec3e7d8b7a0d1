"""`kfdist report`: a page about a run, or one that compares several."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kfdist.cli.complete import complete_run
from kfdist.cli.options import AsJson
from kfdist.system.imports import uncollected


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("report")(_report)


def _report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="A run's directory, or its name; several are compared.",
            autocompletion=complete_run,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page; report.html in the run's directory, or comparison.html in the first's, if not given.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run, or one that compares several.

    It shows loss, staleness, times, bytes, spectra, diagnostics and the configuration. A run may be finished, stopped
    or still going on. The page needs no other file and asks no other host for any.
    """
    directories = [_directory_of(run) for run in runs]
    if len(directories) == 1:
        with uncollected():
            from kfdist.report.page import write_report

        written = write_report(directories[0], output)
    else:
        with uncollected():
            from kfdist.report.comparison import write_comparison

        written = write_comparison(directories, output)
    print(json.dumps({"report": str(written)}) if as_json else f"report: {written}")


def _directory_of(run: str) -> Path:
    """Returns the directory of a run that is named as in other commands: by its name, or by its directory.

    Raises:
        ConfigError: No run here has the name.
    """
    from kfdist.cli.find_runs import HOME, ended_directories, unknown_run
    from kfdist.system.run_notices import notices

    given = Path(run)
    if "/" in run or run in (".", ".."):
        return given
    posted = [note for note in notices() if note.run and note.directory]
    going = {note.directory for note in posted if note.run == run}
    if len(going) == 1:
        return Path(going.pop())
    for directory in (given, HOME / run):
        if directory.is_dir():
            return directory
    raise unknown_run(run, [*(note.run for note in posted), *(path.name for path in ended_directories())])

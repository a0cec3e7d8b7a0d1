"""`kfdist bench`: measurements, with the machine they were made on."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kfdist.cli.options import AsJson


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    bench = typer.Typer(help="Measure, and write the figures with hardware and versions.", no_args_is_help=True)
    bench.command("papers")(_papers)
    app.add_typer(bench, name="bench")


def _papers(
    claims: Annotated[
        list[str] | None,
        typer.Option("--claim", metavar="a|b|c|d|e", help="A claim of docs/papers.md; repeatable; all if not given."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, in seconds: shows that it runs, not what is true.")
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the figures, papers_a.json and so on.")
    ] = Path("bench-results"),
    as_json: AsJson = False,
) -> None:
    """Measure what the papers claim: shown, not shown, or can't be run here. All of it takes some minutes.

    One thread. A claim that isn't shown is a result like any other: the exit code is 0.
    """
    from kfdist.bench.papers import describe, run_claims

    results = []
    for content in run_claims(claims or [], quick=quick, directory=out):
        results.append(content)
        if not as_json:
            print(describe(content), flush=True)
    if as_json:
        print(json.dumps({"results": results}))
    else:
        print(f"written to {out}")

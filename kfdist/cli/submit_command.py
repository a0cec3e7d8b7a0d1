"""`kfdist submit`, and the two commands that the job it starts consists of."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kfdist.cli.options import FREE_PORTS, AsJson, ConfigFile, Overrides, load, whole
from kfdist.errors import ExitCode

INSIDE = ("ray-job", "ray-ranks")
"""What a job consists of."""


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("submit")(_submit)
    app.command("ray-job", hidden=True)(_ray_job)
    app.command("ray-ranks", hidden=True)(_ray_ranks)


def _submit(
    config: ConfigFile = None,
    ray: Annotated[
        str, typer.Option("--ray", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The head's dashboard.")
    ] = "http://127.0.0.1:8265",
    workers: Annotated[
        int | None, typer.Option(parser=whole(least=1), metavar="N", help="Ranks; cluster.workers if not given.")
    ] = None,
    gpus_per_worker: Annotated[int, typer.Option(parser=whole(most=1), metavar="0|1", help="GPUs of each rank.")] = 0,
    owners: Annotated[
        int | None, typer.Option(parser=whole(), metavar="M", help="Owners; cluster.owners if not given.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the job's log until it ends; also that of a run that trains already.")
    ] = False,
    max_failures: Annotated[
        int,
        typer.Option(
            parser=whole(least=-1),
            metavar="TIMES",
            help="How often all ranks may be started again after one is lost; -1: without end.",
        ),
    ] = 3,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI",
            help="Where Ray Train keeps copies of checkpoints, seen by all nodes; ray-train in run.dir if not given.",
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Code for the job, beside what is installed on the cluster; nothing if not given."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train on a Ray cluster, as a job.

    Ray Train starts the ranks; owners and a controller are beside them. Returns once the run has begun. The same
    command resumes a run that has ended before its last step. Ctrl-C ends --follow, not the job.
    """
    from kfdist.launch.submission import submit

    given = list(overrides or ())
    given += [
        f"cluster.{name}={count}" for name, count in (("workers", workers), ("owners", owners)) if count is not None
    ]
    checked = load(config, given, defaults=FREE_PORTS)
    request = submit.Request(
        address=ray,
        gpus_per_worker=gpus_per_worker,
        max_failures=max_failures,
        storage=storage,
        working_dir=working_dir,
        follow=follow,
    )
    try:
        job = submit.submit(checked, request, sys.stderr if as_json else sys.stdout)
    except KeyboardInterrupt:
        again = "the same command" if follow else "the same command with --follow"
        print(f"\na job that was submitted goes on; {again} shows its log", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print(submit.as_json(job, checked.run.name))
    raise typer.Exit(job.code or ExitCode.DONE)


def _ray_job() -> None:
    """Run a submission inside its job."""
    from kfdist.launch.terminal import Terminal, stop_requests

    with stop_requests() as requests:
        from kfdist.launch.submission.ray_launch import run_job

        code = run_job(Terminal(as_json=False), requests)
    raise typer.Exit(code)


def _ray_ranks(config: ConfigFile = None) -> None:
    """Drive a submission's ranks."""
    from kfdist.launch.submission.request import Submission
    from kfdist.launch.submission.train_driver import drive_ranks

    raise typer.Exit(drive_ranks(load(config, None), Submission.of_this_job()))

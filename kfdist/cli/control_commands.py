"""Commands about runs: look at them, steer them, end them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from kfdist.cli.complete import complete_run
from kfdist.cli.options import AsJson, number, whole
from kfdist.errors import EnvironmentFault, ExitCode

if TYPE_CHECKING:
    from kfdist.control.client import ControlClient, RunView

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="The run's name or its directory; not needed where only one run is going.",
        autocompletion=complete_run,
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--controller",
        "--address",
        metavar="HOST:PORT",
        envvar="KFDIST_CONTROL_ADDRESS",
        help="A controller elsewhere; those of this machine are found. With TLS, KFDIST_SECURITY__CERTIFICATES names "
        "the directory of certificates.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for name, function in (
        ("status", _status),
        ("list", _list),
        ("watch", _watch),
        ("pause", _pause),
        ("resume", _resume),
        ("checkpoint", _checkpoint),
        ("stop", _stop),
        ("events", _events),
    ):
        app.command(name)(function)


def _status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="The run's name or its directory; all runs if not given.",
            autocompletion=complete_run,
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands, who is alive and what was measured.

    Below it is how each block's inversions fare. Without a controller, a run's directory tells as much as it has.
    """
    from kfdist.cli.find_runs import find_run, look_around
    from kfdist.cli.run_display import print_survey, print_target

    if run is not None:
        answered = print_target(find_run(run, address), as_json=as_json)
    else:
        answered = print_survey(look_around(address), as_json=as_json, in_full=True)
    _exit_with(answered)


def _list(address: Address = None, as_json: AsJson = False) -> None:
    """List the runs of this machine, or of a controller.

    The newest comes first.
    """
    from kfdist.cli.find_runs import look_around
    from kfdist.cli.run_display import print_survey

    _exit_with(print_survey(look_around(address), as_json=as_json))


def _exit_with(answered: bool) -> None:
    """Ends a command that has told what it found; its exit code says whether all controllers answered."""
    if not answered:
        raise typer.Exit(ExitCode.ENVIRONMENT)


def _watch(
    run: Run = None,
    from_revision: Annotated[
        int,
        typer.Option(
            parser=whole(),
            metavar="REVISION",
            help="Show only changes after this one; 0 begins with the run as it is.",
        ),
    ] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show a run now and at every change until it ends.

    Ctrl-C ends the watch, not the run.

    Without RUN, where several are going: a line for each of them.

    On a terminal it is a screen with ranks, owners, the loss and the blocks, the stalest first; elsewhere, and with
    --json, a line for each change. Exit codes: 0 the run has ended, however; 130 Ctrl-C.
    """
    from kfdist.cli import watching
    from kfdist.cli.find_runs import find_run, look_around

    try:
        if run is None and len(look_around(address).going()) > 1:
            watching.watch_all(address, as_json=as_json)
        else:
            watching.watch(find_run(run, address), from_revision=from_revision, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _pause(run: Run = None, address: Address = None, as_json: AsJson = False) -> None:
    """Have all ranks of a run wait at the same step.

    `kfdist resume` lets them go on.
    """
    steer(run, address, as_json, "pause", lambda client, name: client.pause(name))


def _resume(run: Run = None, address: Address = None, as_json: AsJson = False) -> None:
    """Let a paused run go on."""
    steer(run, address, as_json, "resume", lambda client, name: client.resume(name))


def _checkpoint(run: Run = None, address: Address = None, as_json: AsJson = False) -> None:
    """Have a run write a checkpoint, and go on."""
    steer(run, address, as_json, "checkpoint", lambda client, name: client.checkpoint(name))


def _stop(
    run: Run = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")] = False,
    timeout: Annotated[
        float, typer.Option(parser=number(), metavar="SECONDS", help="How long --wait waits at most.")
    ] = 120.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Have a run write a checkpoint and end.

    All its ranks do so at the same step. The command that started it resumes it.
    """
    from kfdist.cli.find_runs import find_run
    from kfdist.cli.run_display import asked_line, run_line
    from kfdist.control.control_records import RunState

    target = find_run(run, address)
    with target.client() as client:
        view = client.stop(target.name)
        if wait:
            view = target.ended_view(client, timeout_seconds=timeout)
    print(json.dumps(view.to_json()) if as_json else run_line(view) if wait else asked_line(view, "stop"))
    if wait and view.state in (RunState.FAILED, RunState.LOST):
        raise EnvironmentFault(
            f"run {view.name!r} is {view.state} at step {view.step}; `kfdist events {run or view.name}` says more"
        )


def _events(
    run: Run = None,
    after: Annotated[int, typer.Option(parser=whole(), metavar="ID", help="Show only events after this one.")] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List what happened in a run, oldest first."""
    from kfdist.cli.find_runs import find_run
    from kfdist.cli.run_display import print_events

    target = find_run(run, address)
    if target.controller is None and target.files is not None:
        print_events(target.files.events(after=after), as_json=as_json)
        return
    with target.client() as client:
        print_events(list(client.events(target.name, after=after)), as_json=as_json)


def steer(
    run: str | None, address: str | None, as_json: bool, asked: str, action: "Callable[[ControlClient, str], RunView]"
) -> None:
    """Has a run's controller ask its ranks for something, and says so.

    Args:
        run: The run's name or directory; None for the only one that is going.
        address: The controller; None to find it.
        as_json: Show the run instead, as JSON.
        asked: What for, in words.
        action: What to do, given the controller and the run's name.
    """
    from kfdist.cli.run_display import asked_line

    view = steered(run, address, action)
    print(json.dumps(view.to_json()) if as_json else asked_line(view, asked))


def steered(run: str | None, address: str | None, action: "Callable[[ControlClient, str], RunView]") -> "RunView":
    """Has a run's controller do something, as `steer` does, and returns how the run is then."""
    from kfdist.cli.find_runs import find_run

    target = find_run(run, address)
    with target.client() as client:
        return action(client, target.name)


@contextmanager
def connected(address: str | None, owner: str) -> "Iterator[ControlClient]":
    """Yields a client of the controller given, or else of the one of this machine that has the owner."""
    from kfdist.cli.find_runs import find_controller

    with find_controller(address, owner).client() as client:
        yield client

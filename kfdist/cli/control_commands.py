"""Commands to a controller: look at runs, steer them, end them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from kfdist.cli.options import AsJson
from kfdist.errors import EnvironmentFault, ExitCode

if TYPE_CHECKING:
    from kfdist.control.client import ControlClient, RunView

DEFAULT_ADDRESS = "127.0.0.1:7070"

Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        envvar="KFDIST_CONTROL_ADDRESS",
        help="Where the controller serves gRPC; with TLS, KFDIST_SECURITY__CERTIFICATES names the directory of "
        "certificates.",
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
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run's name; all runs if not given.")] = None,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands: its step, who is alive, what was measured, and how its inversions fare."""
    from kfdist.cli.run_display import print_run, print_runs

    with connected(address) as client:
        runs = client.runs() if run is None else [client.get(run)]
        if run is not None or (len(runs) == 1 and not as_json):
            print_run(runs[0], client.samples(runs[0].name), as_json=as_json)
        else:
            print_runs(runs, as_json=as_json)


def _list(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List all runs that the controller knows, the newest first."""
    from kfdist.cli.run_display import print_runs

    with connected(address) as client:
        print_runs(client.runs(), as_json=as_json)


def _watch(
    run: Run,
    from_revision: Annotated[
        int, typer.Option(min=0, help="Show only changes after this revision; 0 begins with the run as it is.")
    ] = 0,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Show a run now and at every change until it ends; Ctrl-C ends the watch, not the run."""
    from kfdist.cli.run_display import print_changes

    try:
        with connected(address) as client:
            print_changes(client.watch(run, from_revision=from_revision), as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _pause(run: Run, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Ask all ranks of a run to wait at the same step; `resume` lets them go on."""
    steer(address, as_json, lambda client: client.pause(run))


def _resume(run: Run, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Let a paused run go on."""
    steer(address, as_json, lambda client: client.resume(run))


def _checkpoint(run: Run, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Ask a run for a checkpoint."""
    steer(address, as_json, lambda client: client.checkpoint(run))


def _stop(
    run: Run,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that --wait waits at most.")] = 120.0,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Ask all ranks of a run to write a checkpoint and end at the same step; the run can be resumed."""
    from kfdist.control.run_rules import RunState

    def stop(client: "ControlClient") -> "RunView":
        view = client.stop(run)
        return client.wait_for_end(run, timeout_seconds=timeout) if wait else view

    view = steer(address, as_json, stop)
    if wait and view.state in (RunState.FAILED, RunState.LOST):
        raise EnvironmentFault(f"run {run!r} is {view.state} at step {view.step}; `kfdist events {run}` says more")


def _events(
    run: Run,
    after: Annotated[int, typer.Option(min=0, help="Show only events after the one of this id.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """List what happened in a run, oldest first."""
    from kfdist.cli.run_display import print_events

    with connected(address) as client:
        print_events(list(client.events(run, after=after)), as_json=as_json)


def steer(address: str, as_json: bool, action: "Callable[[ControlClient], RunView]") -> "RunView":
    """Has the controller do something to a run, shows the run then, and returns it."""
    from kfdist.cli.run_display import run_line

    with connected(address) as client:
        view = action(client)
    print(json.dumps(view.to_json()) if as_json else run_line(view))
    return view


@contextmanager
def connected(address: str) -> "Iterator[ControlClient]":
    """Yields a client of the controller at an address."""
    from kfdist.config import security_from_environment
    from kfdist.control.client import ControlClient
    from kfdist.system.addresses import server_address
    from kfdist.system.credentials import Role

    server_address(address, field="--address")
    with ControlClient(address, security_from_environment().credentials(Role.CLIENT)) as client:
        yield client

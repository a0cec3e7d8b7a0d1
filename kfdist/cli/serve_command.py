"""`kfdist serve`: the controller."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfdist.cli.options import AsJson, ConfigFile, Overrides, load

if TYPE_CHECKING:
    from kfdist.control.controller import Controller


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("serve")(_serve)


def _serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The controller's SQLite file; control.database, else in the run directory."),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the addresses there, as JSON, once it serves.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve runs: their members, their assignment, commands to them and /metrics. SIGTERM or Ctrl-C ends it.

    Training goes on without a controller; one that is started again on the same file knows all that it acknowledged.
    """
    from kfdist.config import to_toml
    from kfdist.control.controller import AnnouncedRun, ControllerOptions, serve

    checked = load(config, overrides)
    database = Path(checked.control.database) if checked.control.database else None
    announced = None
    if config is not None:
        announced = AnnouncedRun(
            name=checked.run.name,
            directory=str(checked.run.directory.absolute()),
            total_steps=checked.run.steps or 0,
            config=to_toml(checked),
        )
    options = ControllerOptions(
        state=state or database or checked.run.directory / "control.sqlite",
        address=checked.control.address,
        metrics_address=checked.control.metrics_address,
        announced=announced,
    )

    def say(controller: "Controller") -> None:
        addresses = {"address": controller.address, "metrics_address": controller.metrics_address}
        if as_json:
            print(json.dumps({**addresses, "state": str(options.state)}))
        else:
            print(f"controller: gRPC on {controller.address}, metrics on http://{controller.metrics_address}/metrics")
            print(f"controller: state in {options.state}; Ctrl-C ends it")
        sys.stdout.flush()

    serve(options, ready_file=ready_file, on_ready=say)

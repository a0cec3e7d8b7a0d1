"""The commands that run a run: `kfdist train` all of it, and `worker`, `serve` and `pool` one part each."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfdist.cli.options import FREE_PORTS, AsJson, ConfigFile, Controller, Overrides, load, whole
from kfdist.system.imports import uncollected

if TYPE_CHECKING:
    from kfdist.control.controller import Controller as RunningController


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for name, function in COMMANDS.items():
        app.command(name)(function)


def _train(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train on this machine, with all processes of a run.

    Controller, Ray owners and ranks are started, watched and ended. The same command resumes a run that was
    stopped. Ctrl-C writes a checkpoint and ends everything; a second one ends everything at once.
    """
    from kfdist.launch.terminal import Terminal, stop_requests

    checked = load(config, overrides, defaults=FREE_PORTS)
    with stop_requests() as requests:
        # torch takes seconds to import; a bad configuration is told before that, and Ctrl-C is heard during it.
        with uncollected():
            from kfdist.launch.launcher import train

        code = train(checked, Terminal(as_json=as_json), requests)
    raise typer.Exit(code)


def _worker(config: ConfigFile = None, overrides: Overrides = None, controller: Controller = None) -> None:
    """Train as one rank, as torchrun starts it.

    For instance: torchrun --nproc-per-node 2 -m kfdist worker CONFIG. The controller and the pool must be there
    already, unless cluster.link is "local". Stopped by SIGTERM or Ctrl-C, all ranks write a checkpoint and exit
    with 75; the same command resumes.
    """
    checked = load(config, overrides, controller=controller)
    with uncollected():
        from kfdist.training.worker import run_worker

    ending = run_worker(checked)
    if ending.message:
        print(ending.message, flush=True)
    raise typer.Exit(ending.code)


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
    """Serve runs: the controller, with /metrics.

    Members, assignment and commands go through it. SIGTERM or Ctrl-C ends it. Training goes on without a
    controller; one that is started again on the same file knows all that it acknowledged.
    """
    import asyncio
    from contextlib import ExitStack

    from kfdist.config import to_toml
    from kfdist.control.controller import AnnouncedRun, ControllerOptions, serve
    from kfdist.system.addresses import metrics_url
    from kfdist.system.credentials import Role
    from kfdist.system.run_notices import RunNotice, place_of, posted

    checked = load(config, overrides)
    database = Path(checked.control.database) if checked.control.database else None
    announced = None
    if config is not None:
        announced = AnnouncedRun(
            name=checked.run.name,
            # To tell, not to open: what isn't UTF-8 in the working directory's name is escaped.
            directory=os.fsencode(checked.run.directory.absolute()).decode(errors="backslashreplace"),
            total_steps=checked.run.steps or 0,
            config=to_toml(checked),
        )
    options = ControllerOptions(
        state=state or database or checked.run.directory / "control.sqlite",
        address=checked.control.address,
        metrics_address=checked.control.metrics_address,
        credentials=checked.security.credentials(Role.CONTROLLER),
        announced=announced,
    )

    def post(controller: "RunningController") -> None:
        directory = checked.run.directory.absolute()
        notices.enter_context(
            posted(
                RunNotice(
                    pid=os.getpid(),
                    run=announced.name if announced else "",
                    directory=str(directory) if announced else "",
                    place=place_of(directory) if announced else None,
                    address=controller.address,
                    database=str(options.state.absolute()),
                    certificates=options.credentials.certificates if options.credentials else "",
                    token_file=options.credentials.token_file if options.credentials else "",
                )
            )
        )

    def say(controller: "RunningController") -> None:
        post(controller)
        addresses = {"address": controller.address, "metrics_address": controller.metrics_address}
        if as_json:
            print(json.dumps({**addresses, "state": str(options.state)}))
        else:
            print(f"controller: gRPC on {controller.address}, metrics on {metrics_url(controller.metrics_address)}")
            print(f"controller: state in {options.state}; Ctrl-C ends it")
        sys.stdout.flush()

    with ExitStack() as notices:
        asyncio.run(serve(options, ready_file=ready_file, on_ready=say))


def _pool(
    config: ConfigFile = None,
    overrides: Overrides = None,
    controller: Controller = None,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write how many owners there are, as JSON, once they serve.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="New directory for Ray's files, removed at the end; one under /tmp if not given."
        ),
    ] = None,
    parent_pid: Annotated[
        int | None, typer.Option(parser=whole(least=1), metavar="PID", help="End when this process does.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help='Where Ray is, host:port, "auto" or "local"; cluster.ray if not given.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep owners alive on a Ray.

    On a private one, or the one that cluster.ray names. SIGTERM or Ctrl-C ends it. A private Ray ends with the
    pool, with every process, even if the pool is killed. On a cluster, owners that listen on their nodes' addresses
    are spread over its nodes.
    """
    from kfdist.pool.command import run_pool

    def say(owners: list[dict[str, Any]]) -> None:
        if as_json:
            shown = [{key: owner[key] for key in ("owner_id", "address", "pid", "fingerprint")} for owner in owners]
            print(json.dumps({"owners": shown}), flush=True)
            return
        for owner in owners:
            print(f"pool: {owner['owner_id']} inverts at {owner['address']} (process {owner['pid']})", flush=True)

    given = [*(overrides or ()), *([] if ray is None else [f'cluster.ray="{ray}"'])]
    checked = load(config, given, controller=controller)
    run_pool(checked, directory=directory, ready_file=ready_file, parent_pid=parent_pid, on_ready=say)


COMMANDS = {"train": _train, "worker": _worker, "serve": _serve, "pool": _pool}

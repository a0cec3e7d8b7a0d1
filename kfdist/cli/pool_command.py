"""`kfdist pool`: owners on a Ray."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kfdist.cli.options import AsJson, ConfigFile, Controller, Overrides, load


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("pool")(_pool)


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
    parent_pid: Annotated[int | None, typer.Option(min=1, metavar="PID", help="End when this process does.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keep owners alive on a Ray: a private one, or the one that cluster.ray names. SIGTERM or Ctrl-C ends it.

    A private Ray ends with the pool, with every process, even if the pool is killed.
    """
    from kfdist.pool.command import PoolCommand, run_pool

    def say(owners: list[dict[str, Any]]) -> None:
        if as_json:
            shown = [{key: owner[key] for key in ("owner_id", "address", "pid", "fingerprint")} for owner in owners]
            print(json.dumps({"owners": shown}), flush=True)
            return
        for owner in owners:
            print(f"pool: {owner['owner_id']} inverts at {owner['address']} (process {owner['pid']})", flush=True)

    checked = load(config, overrides, controller=controller)
    run_pool(
        PoolCommand(
            run=checked.run.name,
            ray=checked.cluster.ray,
            owners=checked.cluster.owners,
            threads=checked.cluster.threads,
            controller=checked.control.address,
            directory=directory,
            ready_file=ready_file,
            parent_pid=parent_pid,
        ),
        on_ready=say,
    )

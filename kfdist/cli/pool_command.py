"""`kfdist pool`: owners on a Ray."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("pool")(_pool)


def _pool(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="Configuration; the digits run without one.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides one value; repeatable.")
    ] = None,
    controller: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The controller; control.address if not given.")
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print what the owners are as JSON.")] = False,
) -> None:
    """Keep owners alive on a Ray: one of this pool's own, or the one that cluster.ray names. SIGTERM or Ctrl-C ends it.

    A Ray of its own ends with the pool, with every process, even if the pool is killed.
    """
    from kfdist.config import load_config
    from kfdist.pool.command import PoolCommand, run_pool

    overrides = [*(overrides or []), *([f"control.address={controller}"] if controller else [])]
    checked = load_config(config, overrides=overrides)
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
            as_json=as_json,
        )
    )

"""`kfdist worker`: one training rank, as torchrun or the launcher starts it."""

from pathlib import Path
from typing import Annotated

import typer

from kfdist.config import load_config


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def worker(
        config: Annotated[Path | None, typer.Argument(help="TOML file; the digits run without one.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value; may be repeated.")
        ] = None,
        controller: Annotated[
            str | None, typer.Option(metavar="HOST:PORT", help="Where `kfdist serve` is; overrides control.address.")
        ] = None,
    ) -> None:
        """Train as one rank: torchrun --nproc-per-node 2 -m kfdist worker CONFIG.

        The controller and the pool must be there already, unless cluster.link is "local". Stopped by SIGTERM or Ctrl-C,
        all ranks write a checkpoint and exit with 75; the same command resumes.
        """
        given = list(overrides or ())
        if controller is not None:
            # Quoted, so that it is a string whatever it looks like.
            given.append(f'control.address="{controller}"')
        settings = load_config(config, overrides=given)
        from kfdist.training.worker import run_worker

        raise typer.Exit(run_worker(settings))

"""`kfdist worker`: one training rank, as torchrun or the launcher starts it."""

import typer

from kfdist.cli.options import ConfigFile, Controller, Overrides, load


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("worker")(_worker)


def _worker(config: ConfigFile = None, overrides: Overrides = None, controller: Controller = None) -> None:
    """Train as one rank: torchrun --nproc-per-node 2 -m kfdist worker CONFIG.

    The controller and the pool must be there already, unless cluster.link is "local". Stopped by SIGTERM or Ctrl-C,
    all ranks write a checkpoint and exit with 75; the same command resumes.
    """
    checked = load(config, overrides, controller=controller)
    from kfdist.training.worker import run_worker

    ending = run_worker(checked)
    if ending.message:
        print(ending.message, flush=True)
    raise typer.Exit(ending.code)

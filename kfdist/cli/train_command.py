"""`kfdist train`: a whole run on this machine."""

import typer

from kfdist.cli.options import AsJson, ConfigFile, Overrides, load

_FREE_PORTS = {"control": {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}}
"""Unless told otherwise, a launch takes free ports, so that two of them can share a machine."""


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("train")(_train)


def _train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train on this machine: controller, Ray owners and ranks are started, watched and ended.

    The same command resumes a run that was stopped. Ctrl-C writes a checkpoint and ends everything; a second one ends
    everything at once.
    """
    from kfdist.launch.signals import stop_requests
    from kfdist.launch.terminal import Terminal

    checked = load(config, overrides, defaults=_FREE_PORTS)
    with stop_requests() as requests:
        # torch takes seconds to import; a bad configuration is told before that, and Ctrl-C is heard during it.
        from kfdist.launch.launcher import train

        code = train(checked, Terminal(as_json=as_json), requests)
    raise typer.Exit(code)

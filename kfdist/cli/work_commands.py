"""Commands on who inverts what, and when: refresh, replan, drain, undrain."""

import json
from typing import Annotated

import typer

from kfdist.cli.complete import complete_owner, complete_run
from kfdist.cli.control_commands import Address, Run, connected, steer, steered
from kfdist.cli.options import AsJson

Owner = Annotated[
    str,
    typer.Argument(
        metavar="OWNER", help="The owner's name, as kfdist status RUN lists them.", autocompletion=complete_owner
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for name, function in (("refresh", _refresh), ("replan", _replan), ("drain", _drain), ("undrain", _undrain)):
        app.command(name)(function)


def _refresh(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The run's name or its directory.", autocompletion=complete_run)
    ],
    blocks: Annotated[
        list[str] | None,
        typer.Argument(metavar="BLOCK", help="Names or globs, such as 'layer4.*'; all if not given."),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Have blocks measured and inverted now, whatever their period."""
    what = f"refresh of {', '.join(blocks) if blocks else 'all blocks'}"
    steer(run, address, as_json, what, lambda client, name: client.refresh(name, blocks or ()))


def _replan(run: Run = None, address: Address = None, as_json: AsJson = False) -> None:
    """Deal a run's blocks to the owners anew.

    By the seconds that their inversions took, the longest first.
    """
    from kfdist.cli.run_display import run_place

    view = steered(run, address, lambda client, name: client.replan(name))
    told = f"{run_place(view)}; its blocks are dealt anew: `kfdist events {view.name}` says how many moved"
    print(json.dumps(view.to_json()) if as_json else told)


def _drain(owner: Owner, address: Address = None, as_json: AsJson = False) -> None:
    """Give an owner no new jobs; its blocks move to others.

    It finishes those it has. `kfdist undrain` gives it jobs again.
    """
    with connected(address, owner) as client:
        client.drain(owner)
    _say(owner, "drained", f"{owner} gets no new jobs; kfdist undrain {owner} lets it have them again", as_json)


def _undrain(owner: Owner, address: Address = None, as_json: AsJson = False) -> None:
    """Give an owner jobs again."""
    with connected(address, owner) as client:
        client.undrain(owner)
    _say(owner, "undrained", f"{owner} gets jobs again", as_json)


def _say(owner: str, state: str, text: str, as_json: bool) -> None:
    print(json.dumps({"owner": owner, "state": state}) if as_json else text)

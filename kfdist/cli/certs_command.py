"""`kfdist certs`: the certificates and the token that let other machines reach a controller and its owners."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kfdist.cli.options import AsJson, whole


def _named(directory: str | Path) -> Path:
    if not str(directory):  # as of a variable that isn't set; Path takes it for the working directory
        raise typer.BadParameter("'' is no directory; give its name, or . for the working directory")
    return Path(directory)


Directory = Annotated[Path, typer.Argument(parser=_named, metavar="DIR", help="Where the certificates are.")]
Days = Annotated[
    int, typer.Option(parser=whole(least=1, most=3650), metavar="DAYS", help="How long the certificates hold.")
]

_NEXT = """\
{directory}: ca.pem, controller.pem, owner.pem, client.pem, token; ca.key, which signs new ones, stays here
next: copy the directory without ca.key to the same place on every node, readable for the user of kfdist alone, then
      set security.certificates = "{directory}" or KFDIST_SECURITY__CERTIFICATES={directory}"""


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    certs = typer.Typer(help="Make or renew the certificates that other machines need.", no_args_is_help=True)
    certs.command("init")(_init)
    certs.command("renew")(_renew)
    app.add_typer(certs, name="certs")


def _init(
    directory: Directory,
    hosts: Annotated[
        str,
        typer.Option(
            metavar="HOST,...",
            help="Names and addresses of servers, for a Prometheus that checks those; kfdist itself checks roles.",
        ),
    ] = "",
    days: Days = 365,
    as_json: AsJson = False,
) -> None:
    """Make an authority, certificates and a token.

    Controller, owners and clients have a certificate each.
    """
    from kfdist.rpc.certificates import make_certificates

    make_certificates(directory, hosts=[host.strip() for host in hosts.split(",") if host.strip()], days=days)
    told = directory.absolute()
    print(json.dumps({"directory": str(told)}) if as_json else _NEXT.format(directory=told))


def _renew(directory: Directory, days: Days = 365, as_json: AsJson = False) -> None:
    """Make new certificates of the same authority.

    Who has the old ones is trusted until those expire. Copy them to the nodes like the first ones: running
    processes take them up without a restart.
    """
    from kfdist.rpc.certificates import renew_certificates

    renew_certificates(directory, days=days)
    told = directory.absolute()
    print(json.dumps({"directory": str(told)}) if as_json else f"{told}: controller.pem, owner.pem, client.pem renewed")

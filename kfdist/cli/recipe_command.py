"""`kfdist recipes`: the configurations that come with kfdist."""

import json
from typing import Annotated

import typer

from kfdist.cli.options import AsJson


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("recipes")(_recipes)


def _recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one's file instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the configurations that come with kfdist.

    `kfdist train NAME` runs one. To change more than `--set` should: kfdist recipes NAME > my.toml
    """
    from kfdist.checks import choice
    from kfdist.config.recipes import described, recipes

    files = recipes()
    if name is not None:
        text = files[choice("NAME", name, files)].read_text(encoding="utf-8")
        print(json.dumps({"name": name, "toml": text}) if as_json else text, end="\n" if as_json else "")
    elif as_json:
        print(json.dumps({each: described(file) for each, file in files.items()}))
    else:
        width = max(map(len, files))
        for each, file in files.items():
            print(f"{each:{width}}  {described(file)}")

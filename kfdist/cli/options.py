"""Arguments and options that several commands share, and the configuration that they add up to."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfdist.cli.complete import complete_config

if TYPE_CHECKING:
    from kfdist.config import Config

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG",
        help="A TOML file, or a recipe's name (kfdist recipes lists them); the bundled digits run if not given.",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value, as --set run.steps=100; repeatable."),
]
Controller = Annotated[
    str | None,
    typer.Option(
        "--controller", metavar="HOST:PORT", help="Where `kfdist serve` listens; control.address if not given."
    ),
]
FREE_PORTS = {"control": {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}}
"""Unless told otherwise, a launch takes free ports, so that two of them can share a machine."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; errors too.")]


MOST = 2**63 - 1
"""What a message to a controller can hold."""


def whole(*, least: int = 0, most: int = MOST) -> Callable[[str | int], int]:
    """Returns the reader of an option that is a whole number; what is none is named, with what is allowed."""

    def read(given: str | int) -> int:
        try:
            value = int(given)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            bounded = most < MOST or (value is not None and value > most)
            allowed = f"from {least} to {most}" if bounded else f"of at least {least}"
            raise typer.BadParameter(f"{str(given)!r} is not allowed; give a whole number {allowed}")
        return value

    return read


def number(*, least: float = 0.0) -> Callable[[str | float], float]:
    """Returns the reader of an option that is a number; what is none is named, with what is allowed."""

    def read(given: str | float) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            raise typer.BadParameter(f"{str(given)!r} is not allowed; give a number of at least {least:g}")
        return value

    return read


def load(
    config: Path | None,
    overrides: list[str] | None,
    *,
    controller: str | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> "Config":
    """Loads the configuration that a command was given.

    Args:
        config: The file; None for the bundled run.
        overrides: What `--set` was given.
        controller: What `--controller` was given; it wins over `--set`.
        defaults: The command's own defaults.

    Raises:
        ConfigError: A value is wrong.
    """
    from kfdist.config import load_config

    given = list(overrides or ())
    if controller is not None:
        given.append(f'control.address="{controller}"')  # quoted, so that it is a string whatever it looks like
    return load_config(config, overrides=given, defaults=defaults)

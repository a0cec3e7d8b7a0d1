"""`kfdist set`: a run's settings, changed while it trains."""

from typing import Annotated

import typer

from kfdist.checks import suggestion
from kfdist.cli.control_commands import DEFAULT_ADDRESS, Address, Run, steer
from kfdist.cli.options import AsJson
from kfdist.errors import ConfigError
from kfdist.policies import tuning
from kfdist.types import Value

AS_CONFIGURED = "configured"
"""The word for a value that is to be as the configuration has it."""


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("set")(_set)


def _set(
    run: Run,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help=f"One or more of {', '.join(tuning.NAMES)}. {AS_CONFIGURED!r} for VALUE goes back to the "
            "configuration; 'none' takes a bound or the clip away.",
        ),
    ],
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Change settings of a run while it trains; all ranks take them up at the same step."""
    changes = parse_settings(settings)
    steer(address, as_json, lambda client: client.update_settings(run, **changes))


def parse_settings(settings: list[str]) -> dict[str, Value | None]:
    """Returns what `kfdist set` was given, by name; None: as configured.

    Raises:
        ConfigError: It is no setting, or no value of its kind; whether the value is allowed is for the controller.
    """
    changes: dict[str, Value | None] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if name not in tuning.NAMES or not separator:
            hint = suggestion(name, tuning.NAMES) if name not in tuning.NAMES else ""
            known = ", ".join(tuning.NAMES)
            raise ConfigError(f"{text!r} is no setting; write KEY=VALUE, such as damping=0.01; keys are {known}{hint}")
        if name in changes:
            raise ConfigError(f"is given twice in {' '.join(settings)}; give it once", path=name)
        changes[name] = _parsed(name, value)
    return changes


def _parsed(name: str, text: str) -> Value | None:
    if text == AS_CONFIGURED:
        return None
    if name in tuning.WORDS:
        return text
    if name in tuning.NONE and text == "none":
        return 0 if name in tuning.WHOLE else 0.0
    try:
        return int(text) if name in tuning.WHOLE else float(text)
    except ValueError:
        kind = "whole number" if name in tuning.WHOLE else "number"
        none = ', "none"' if name in tuning.NONE else ""
        raise ConfigError(f"is {text!r}, which is no {kind}; give one{none} or {AS_CONFIGURED!r}", path=name) from None

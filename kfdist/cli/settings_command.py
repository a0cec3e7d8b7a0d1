"""`kfdist set`: a run's settings, changed while it trains."""

from typing import Annotated

import typer

from kfdist.checks import suggestion
from kfdist.cli.control_commands import Address, Run, steer
from kfdist.cli.options import MOST, AsJson
from kfdist.errors import ConfigError
from kfdist.policies import tuning
from kfdist.types import Value

_KEYS = ", ".join(tuning.NAMES)


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("set")(_set)


def _set(
    run: Run = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help=f"One or more of {', '.join(tuning.NAMES)}. {tuning.AS_CONFIGURED!r} for VALUE goes back to the "
            "configuration; 'none' takes a bound or the clip away.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Change settings of a run while it trains.

    All ranks take them up at the same step, which `kfdist events` names.
    """
    given = [run, *(settings or [])] if run is not None else []
    named = [] if not given or _is_setting(given[0]) else [given.pop(0)]
    changes = parse_settings(given)
    run = named[0] if named else None
    steer(run, address, as_json, ", ".join(given), lambda client, name: client.update_settings(name, **changes))


def _is_setting(text: str) -> bool:
    """Tells a setting from a run, whose name has no "=" in it and whose directory would have a slash before it."""
    return "=" in text and "/" not in text.partition("=")[0]


def parse_settings(settings: list[str]) -> dict[str, Value | None]:
    """Returns what `kfdist set` was given, by name; None: as configured.

    Raises:
        ConfigError: It is no setting, or no value of its kind; whether the value is allowed is for the controller.
    """
    if not settings:
        raise ConfigError(f"there is nothing to set; write KEY=VALUE, such as damping=0.01; keys are {_KEYS}")
    changes: dict[str, Value | None] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if name in tuning.NAMES and not separator:
            raise ConfigError(f"has no value; write {name}=VALUE, or {name}={tuning.AS_CONFIGURED}", path=name)
        if name not in tuning.NAMES:
            hint = suggestion(name, tuning.NAMES)
            raise ConfigError(f"{text!r} is no setting; write KEY=VALUE, such as damping=0.01; keys are {_KEYS}{hint}")
        if name in changes:
            raise ConfigError(f"is given twice in {' '.join(settings)}; give it once", path=name)
        changes[name] = _parsed(name, value)
    return changes


def _parsed(name: str, text: str) -> Value | None:
    if text == tuning.AS_CONFIGURED:
        return None
    if name in tuning.WORDS:
        return text
    if name in tuning.NONE and text == "none":
        return 0 if name in tuning.WHOLE else 0.0
    try:
        value = int(text) if name in tuning.WHOLE else float(text)
    except ValueError:
        kind = "whole number" if name in tuning.WHOLE else "number"
        none = ', "none"' if name in tuning.NONE else ""
        raise ConfigError(
            f"is {text!r}, which is no {kind}; give one{none} or {tuning.AS_CONFIGURED!r}", path=name
        ) from None
    if abs(value) > MOST and name in tuning.WHOLE:
        raise ConfigError(f"is {text}; no number of steps is above {MOST}", path=name)
    return value

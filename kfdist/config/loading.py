"""Reads the layers of a configuration (defaults < file < environment < command line) and makes one of them."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from kfdist.checks import suggestion
from kfdist.config.defaults import defaults_beside
from kfdist.config.findings import config_error
from kfdist.config.recipes import recipes
from kfdist.config.sections import Config
from kfdist.config.service_sections import SecuritySection
from kfdist.config.toml import parse_value
from kfdist.errors import ConfigError

Table = dict[str, Any]

_PREFIX = "KFDIST_"

_REPLACES = {
    "run": (("steps", "epochs"), ("epochs", "steps")),
    "preconditioner": (("method", "methods"), ("methods", "method")),
}
"""By section: a key set by a higher layer, and the key of the lower layers that it replaces."""

_NAMING = {"model": ("name",), "data": ("name",), "optimizer": ("name",), "preconditioner": ("method", "methods")}
"""By section: the keys that `settings` go with. A layer that sets one starts with no settings but its own."""

_ORDERED = {"preconditioner": ("methods",)}
"""By section: tables whose first match counts, so that a layer's table replaces the one below as a whole."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    table: Table
    origin: str


def load_config(
    path: Path | None,
    *,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Reads and checks a configuration.

    Args:
        path: A TOML file, the name of a recipe (`kfdist.config.recipes`), or None for the defaults (the digits run).
        overrides: `section.key=value` from the command line; values are TOML, else strings.
        environment: Variables of the form `KFDIST_SECTION__KEY` override the file. Others are ignored.
        defaults: Nested tables that a command lays over the built-in defaults, below the file.

    Raises:
        ConfigError: Anything is wrong with it; says the field's dotted path, the value, what is allowed.
    """
    file = [_file(path)] if path is not None else []
    sources = (file, _environment(environment), [_override(text) for text in overrides])
    tables = [reduce(_overlay, (layer.table for layer in layers), {}) for layers in sources]
    built_in = _merge(Config().model_dump(exclude_none=True), defaults_beside(reduce(_merge, tables, dict(defaults))))
    merged: Table = reduce(_merge, [dict(defaults), *tables], built_in)
    layers = [layer for layers in sources for layer in layers]
    return config_from_table(merged, layers)


def security_from_environment(
    environment: Mapping[str, str] = os.environ, *, otherwise: SecuritySection | None = None
) -> SecuritySection:
    """Returns what `KFDIST_SECURITY__*` say, for commands that have no configuration, or one of another node.

    Args:
        environment: Variables.
        otherwise: What holds where they say nothing. The token's file counts only beside its own directory of
            certificates.

    Raises:
        ConfigError: One of them is wrong.
    """
    security = {name: value for name, value in environment.items() if name.startswith(f"{_PREFIX}SECURITY__")}
    if otherwise is None or not security:
        return otherwise or load_config(None, environment=security).security
    certificates = {} if otherwise.certificates is None else {"certificates": otherwise.certificates}
    return load_config(None, environment=security, defaults={"security": certificates}).security


def config_from_table(table: Mapping[str, Any], layers: Sequence[_Layer] = ()) -> Config:
    """Checks nested tables, as read from TOML.

    Raises:
        ConfigError: Anything is wrong with them.
    """

    def origin(path: str) -> str:
        keys = re.split(r'\[|\."', path)[0].split(".")
        for layer in reversed(layers):
            if path and _contains(layer.table, keys):
                return f" [from {layer.origin}]"
        return ""

    try:
        return Config.model_validate(dict(table))
    except ValidationError as error:
        raise config_error(error, Config, origin=origin) from None


def _contains(table: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(table, dict) or key not in table:
            return False
        table = table[key]
    return True


def _file(path: Path) -> _Layer:
    try:
        if not path.is_file():
            path = recipes().get(str(path), path)
        # Some editors begin UTF-8 with a mark, which tomllib doesn't take.
        return _Layer(table=tomllib.loads(path.read_text(encoding="utf-8-sig")), origin=str(path))
    except FileNotFoundError:
        near = suggestion(str(path), recipes()) or ";"
        raise ConfigError(
            f"no such file or recipe{near} give a TOML file, a name that `kfdist recipes` lists, or nothing for the "
            "digits run",
            path=str(path),
        ) from None
    except OSError as error:
        raise ConfigError(f"can't be read ({error.strerror}); give a readable TOML file", path=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"isn't UTF-8 text (byte {error.start}); save it as UTF-8", path=str(path)) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and nested brackets, too
        raise ConfigError(f"isn't valid TOML: {error}; mend the line", path=str(path)) from None


def _environment(environment: Mapping[str, str]) -> list[_Layer]:
    layers = []
    for name in sorted(environment):
        # A double underscore marks a field; KFDIST_ variables without one belong to others.
        if name.startswith(_PREFIX) and "__" in name:
            keys = name.removeprefix(_PREFIX).lower().split("__")
            layers.append(_Layer(table=_nest(keys, parse_value(environment[name])), origin=name))
    return layers


def _override(text: str) -> _Layer:
    path, separator, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"is {text!r}; write section.key=value, such as run.steps=100", path="--set")
    return _Layer(table=_nest(keys, parse_value(value.strip())), origin="--set")


def _nest(keys: Sequence[str], value: Any) -> Table:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(lower: Table, higher: Table) -> Table:
    """Lays one layer over the lower ones, and drops what it excludes of them."""
    merged = _overlay(lower, higher)
    for section, table in higher.items():
        below = merged.get(section)
        if not isinstance(table, dict) or not isinstance(below, dict):
            continue
        for key, replaced in _REPLACES.get(section, ()):
            if key in table and replaced not in table:
                below.pop(replaced, None)
        for key in _ORDERED.get(section, ()):
            if key in table:
                below[key] = table[key]
        if any(key in table for key in _NAMING.get(section, ())):
            below["settings"] = table.get("settings", {})
        if section == "preconditioner" and table.get("adoption") == "asap" and "lag" not in table:
            below.pop("lag", None)
    return merged


def _overlay(lower: Table, higher: Table) -> Table:
    merged = dict(lower)
    for key, value in higher.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

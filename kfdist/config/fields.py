"""What sections are made of: their base, the types of values that several share, and things chosen by name."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kfdist import checks
from kfdist.config.findings import config_error
from kfdist.config.toml import format_key
from kfdist.errors import ConfigError
from kfdist.system.addresses import split_address
from kfdist.types import MAX_STEPS

Scalar = bool | int | float | str
"""What a free-form `settings` table may hold."""

_Plain = Scalar | list[Scalar | list[Scalar]]

Setting = _Plain | dict[str, _Plain]
"""A table is for settings of something inside, such as the inner method of `two-level`."""


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)

_LONGEST_NAME = 255
"""Bytes of a file's name, without its folders, on Linux."""

_TOKEN = re.compile(r"[A-Za-z0-9_=+-]{32,}")
"""What tokens look like, and hardly any path does: no slash, no dot."""

_WORD = "(?:[A-Z]?[a-z]+|[A-Z]+)?[0-9]{0,4}"
_WORDS = re.compile(f"{_WORD}(?:[-_]{_WORD})+")
"""A name of several words, which is no token."""

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"|!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")
"""What Ray takes as a label selector, nothing included."""


def _file_name(path: str) -> str:
    if "\0" in path:
        raise ValueError("a file's name has no NUL character; leave it out")
    if longest := next((part for part in path.split("/") if len(part.encode()) > _LONGEST_NAME), ""):
        raise ValueError(f"{longest[:20]}... has {len(longest.encode())} bytes; a name has at most {_LONGEST_NAME}")
    return path


def _place(value: object) -> object:
    """Refuses what looks like a key, a certificate or a token itself, without showing it: errors end up in logs."""
    text = value.strip() if isinstance(value, str) else ""
    looks_secret = "-----BEGIN" in text or (_TOKEN.fullmatch(text) and not _WORDS.fullmatch(text))
    if looks_secret and not os.path.exists(str(value)):
        raise ConfigError(
            "looks like a secret itself, which isn't shown here; write where it is: the directory of certificates, or "
            "the token's file"
        )
    return value


def _address(address: str) -> str:
    split_address(address)
    return address


def _ray_address(address: str) -> str:
    if address not in ("local", "auto"):
        try:
            split_address(address)
        except ValueError as error:
            raise ValueError(f'write "local" (start a Ray of our own), "auto", or an address: {error}') from None
    return address


def _resources(amounts: dict[str, float]) -> dict[str, float]:
    for name in amounts.keys() & {"CPU", "GPU"}:
        raise ConfigError(f"names {name}; write cluster.bundle.{name.lower()}s for that")
    for name in amounts.keys() & {"memory", "object_store_memory"}:
        reason = "which is none of Ray's custom resources; remove it, or give nodes a custom resource of another name"
        raise ConfigError(f"names {name}, {reason}")
    return amounts


def _selector(text: str) -> str:
    if not _SELECTOR.fullmatch(text):
        raise ValueError(
            'write a value, as in "A100", "!A100" or "in(A100, H100)": 1 to 63 of a-z A-Z 0-9 . _ -, beginning and '
            "ending with a letter or digit"
        )
    return text


def _tuple(value: Any) -> Any:
    # TOML arrays arrive as lists, which strict mode would refuse where the frozen section wants a tuple.
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuple(each) for each in value) if isinstance(value, list) else value


def _rising(stages: Any) -> Any:
    epochs = [epoch for epoch, _ in stages]
    if epochs != sorted(set(epochs)):
        raise ValueError("the epochs must rise")
    return stages


def _methods(value: Any) -> Any:
    """Writes every entry of a table of methods as a table; a name alone is a method without settings."""
    if not isinstance(value, dict):
        return value
    if not value:
        raise ValueError("give at least one pattern")
    entries = {}
    for pattern, entry in value.items():
        key = format_key(pattern)
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise ConfigError(f"is {entry!r}; write a method's name, or a table of `method` and its settings", path=key)
        if "method" not in entry:
            raise ConfigError("is missing; a method's name is needed, beside its settings", path=f"{key}.method")
        if not isinstance(entry["method"], str):
            raise ConfigError(f"is {entry['method']!r}; it must be a method's name", path=f"{key}.method")
        if entry["method"] == "none":
            reason = "to leave layers to the optimizer alone, put their pattern into preconditioner.skip"
            raise ConfigError(f'is "none"; {reason}', path=f"{key}.method")
        entries[pattern] = entry
    return entries


FileName = Annotated[str, Field(min_length=1), AfterValidator(_file_name)]
SecretPlace = Annotated[FileName, BeforeValidator(_place)]
Address = Annotated[str, AfterValidator(_address)]
RayAddress = Annotated[str, AfterValidator(_ray_address)]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
TrackerNames = Annotated[tuple[Literal["tensorboard", "mlflow"], ...], BeforeValidator(_tuple)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_tuple)]
Port = Annotated[int, Field(ge=1, le=65535)]
Ports = Annotated[tuple[Port, Port], BeforeValidator(_tuple)]
Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_resources)]
Labels = dict[str, Annotated[str, AfterValidator(_selector)]]
_Epoch = Annotated[int, Field(ge=1)]
Stages = Annotated[
    tuple[tuple[_Epoch, Annotated[float, Field(gt=0)]], ...], BeforeValidator(_tuples), AfterValidator(_rising)
]
"""Pairs of an epoch and what holds from it on."""

CountStages = Annotated[
    tuple[tuple[_Epoch, Annotated[int, Field(ge=1, le=MAX_STEPS)]], ...],
    BeforeValidator(_tuples),
    AfterValidator(_rising),
]
"""The same of whole numbers."""

Settings = dict[str, Setting]
Methods = Annotated[dict[str, Settings], BeforeValidator(_methods)]
"""Methods by glob on dotted module names, in order; each entry is the settings with the name under `method`."""


def by_name(table: Mapping[str, type[S]], name: str, settings: Mapping[str, Any], *, section: str) -> S:
    """Looks a name up in a table of models or data sets, and gives the settings to what is found there.

    Args:
        table: What there is; the settings are the fields of the class.
        name: The name as configured.
        settings: The `settings` as configured.
        section: The configuration section both stand in, for messages.

    Raises:
        ConfigError: The name is unknown, or a setting is unknown or not allowed.
    """
    kind = table[checks.choice(f"{section}.name", name, table, hint='or "package.module:function", your own')]
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise config_error(error, kind, prefix=f"{section}.settings") from None

"""Turns pydantic's findings into messages: the value received, what is allowed, what to do."""

from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kfdist.checks import suggestion
from kfdist.config.toml import format_key
from kfdist.errors import ConfigError

_WANTED: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "string_unicode": "text in UTF-8",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}

_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}

_FREE_KEYS: Mapping[str, int] = {"settings": 1, "methods": 2, "resources": 1, "labels": 1}
"""Tables whose keys are the user's own, and how deep."""


def config_error(
    error: ValidationError,
    root: type[BaseModel],
    *,
    prefix: str = "",
    origin: Callable[[str], str] = lambda path: "",
) -> ConfigError:
    """Makes one ConfigError of all findings; its path is that of the first.

    Args:
        error: What pydantic found.
        root: The model that was validated.
        prefix: Dotted path of the model in the configuration; empty for the whole.
        origin: Says for a dotted path where its value came from, such as " [from --set]", or nothing.
    """
    findings: dict[str, str] = {}
    for detail in error.errors():
        inner, section, field = _place(detail, root)
        path = ".".join(part for part in (prefix, inner) if part)
        if detail["type"] == "extra_forbidden" and not _is_free(inner):
            message = _unknown_key(inner, section, root, prefix)
        else:
            message = _message(detail, inner, field)
        # Only the first finding of a path: the branches of a union each bring their own.
        findings.setdefault(path, message + origin(path))
    (first, message), *rest = findings.items()
    lines = [message, *(f"{path}: {text}" for path, text in rest)]
    return ConfigError("\n".join(lines), path=first)


def _place(detail: ErrorDetails, root: type[BaseModel]) -> tuple[str, type[BaseModel], FieldInfo | None]:
    """Returns the path of a finding as written in TOML, without the names of union branches; its section and field."""
    parts: list[str] = []
    section, field, free = root, None, None
    model: type[BaseModel] | None = root
    for part in detail["loc"]:
        if model is not None:
            parts.append(str(part))
            section, field = model, model.model_fields.get(str(part))
            model = _model_of(field)
            free = _FREE_KEYS.get(str(part))
        elif free:
            parts.append(format_key(str(part)))
            free -= 1
        elif isinstance(part, int) and free is None:
            parts[-1] += f"[{part}]"
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, ConfigError) and error.path:  # a check across fields names the wrong one itself
        parts.append(error.path)
    return ".".join(parts), section, field


def _model_of(field: FieldInfo | None) -> type[BaseModel] | None:
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_free(path: str) -> bool:
    return ".settings." in path or ".methods." in path


def _message(detail: ErrorDetails, path: str, field: FieldInfo | None) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    shown = str(value).lower() if isinstance(value, bool | date) else repr(value)  # as in TOML
    if kind == "value_error" and isinstance(context["error"], ConfigError):
        return context["error"].message
    if _is_free(path):
        return f"is {shown}, {_kind(value)}; a setting is true or false, a number, a string, a list or a table of these"
    purpose = f" ({field.description})" if field and field.description else ""
    if kind == "value_error":
        return f"is {shown}; {context['error']}{purpose}"
    if kind == "missing":
        return f"is missing{purpose}; give it a value"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"is {shown}; it must be {words} {context[key]}{purpose}"
    if kind == "literal_error":
        close = suggestion(str(value), str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
        return f"is {shown}; it must be {context['expected']}{close}{purpose}"
    if kind in _WANTED:
        return f"is {shown}, {_kind(value)}; it must be {_WANTED[kind]}{purpose}"
    if kind == "string_pattern_mismatch":
        return f"is {shown}; it must be {field.description if field else context['pattern']}"
    return f"is {shown}; {detail['msg'][:1].lower()}{detail['msg'][1:]}{purpose}"


def _unknown_key(path: str, section: type[BaseModel], root: type[BaseModel], prefix: str) -> str:
    parent, _, key = path.rpartition(".")
    known = list(section.model_fields)
    advice = suggestion(key, known) or _elsewhere(key, root)
    where = ".".join(part for part in (prefix, parent) if part)
    table = f"[{where}]" if where else "the configuration"
    return f"unknown key{advice or ';'} {table} has: {', '.join(known) or 'no keys'}"


def _elsewhere(key: str, root: type[BaseModel]) -> str:
    for name, field in root.model_fields.items():
        section = _model_of(field)
        if section is not None and key in section.model_fields:
            return f"; did you mean '{name}.{key}'?"
    return ""


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")

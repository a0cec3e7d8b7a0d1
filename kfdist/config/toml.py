"""TOML both ways: single values from the command line, and whole configurations back to text."""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def parse_value(text: str) -> Any:
    """Reads a TOML value, such as `3`, `1e-3`, `true` or `["a", "b"]`; anything else is the string itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # besides what isn't TOML: numbers of thousands of digits, and nested brackets
        return text
    # A text with line breaks could bring more keys along; then it was meant as a string.
    return table["value"] if len(table) == 1 else text


def to_toml(config: BaseModel) -> str:
    """Writes a configuration so that reading the text gives an equal one; unset optional fields are left out."""
    return format_table(config.model_dump(exclude_none=True))


def format_table(table: Mapping[str, Any]) -> str:
    """Writes nested tables of scalars and lists as TOML."""
    return "\n\n".join(_tables(table, ())) + "\n"


def _tables(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [
        f"{format_key(key)} = {format_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)
    ]
    if path and (lines or not table):
        lines.insert(0, f"[{'.'.join(format_key(part) for part in path)}]")
    texts = ["\n".join(lines)] if lines else []
    for key, value in table.items():
        if isinstance(value, Mapping):
            texts.extend(_tables(value, (*path, key)))
    return texts


def format_key(key: str) -> str:
    """Writes one key as TOML: bare where that is allowed, else quoted."""
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else format_value(key)


def format_value(value: Any) -> str:
    """Writes one scalar or list as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL must be escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(format_value(item) for item in value) + "]"

"""Writes docs/configuration.md, every key with its default: .venv/bin/python docs/make_configuration.py."""

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kfdist.config import Config
from kfdist.config.toml import format_key, format_value
from kfdist.data.sets import DATA_SETS
from kfdist.models import MODELS

FILE = Path(__file__).parent / "configuration.md"

_ABOUT = """\
# Configuration

Every key, its default and what it means. `docs/make_configuration.py` writes this page from the code, and
`tests/architecture/test_configuration_page.py` compares the two.

Values come from four places, each over the one before: the defaults, the file (`kfdist train run.toml`), the
environment (`KFDIST_OPTIMIZER__LR=0.01`: section and key, with two underscores between them), and the command line
(`--set optimizer.lr=0.01`). Unknown keys are refused with a suggestion. Where two keys exclude each other
(`run.steps`, `run.epochs`), the higher place's replaces the lower's. Where a place names another model, data set,
optimizer or method, the `settings` below it are dropped.

The defaults are those of the digits run, which `kfdist train` starts without a file. Some depend on what else is given;
the last column says how. "-": not given. All periods count training steps.
"""

_SETTINGS = (("model", "Settings of models", MODELS), ("data", "Settings of data sets", DATA_SETS))

_KINDS: Mapping[Any, str] = {
    bool: "`true`, `false`",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "list",
    dict: "table",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def text() -> str:
    """Returns the page."""
    parts = [_ABOUT, *_sections(Config(), "")]
    for section, title, known in _SETTINGS:
        parts.append(f"## {title}\n\nKeys of `{section}.settings`, by `{section}.name`.\n")
        parts += [f"### `{name}`\n\n{_table(kind, _defaults(kind))}\n" for name, kind in known.items()]
    return "\n".join(parts)


def _sections(section: BaseModel, path: str) -> Iterator[str]:
    if path:
        said = (type(section).__doc__ or "").partition("\n")[0]
        yield f"## `[{path}]`\n\n{said}\n\n{_table(type(section), dict(section))}\n"
    for name, inner in section:
        if isinstance(inner, BaseModel):
            yield from _sections(inner, f"{path}.{name}".lstrip("."))


def _defaults(kind: type[BaseModel]) -> dict[str, Any]:
    known = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    return {name: field.get_default(call_default_factory=True) for name, field in known.items()}


def _table(kind: type[BaseModel], defaults: Mapping[str, Any]) -> str:
    rows = ["| key | default | allowed | what |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        if not isinstance(default := defaults.get(name), BaseModel):
            shown = "needed" if name not in defaults else "-" if default is None else f"`{_inline(default)}`"
            cells = (f"`{name}`", shown, _allowed(field), field.description or "")
            rows.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(rows)


def _cell(written: str) -> str:
    return written.replace("|", "\\|")


def _inline(value: Any) -> str:
    """Writes a value as TOML on one line."""
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{format_key(key)} = {_inline(each)}" for key, each in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return format_value(value)


def _allowed(field: FieldInfo) -> str:
    """Says in words which values a field takes."""
    kind = _bare(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{format_value(each)}`" for each in get_args(kind))
    words = [_KINDS[get_origin(kind) or kind]]
    for bound, said in _BOUNDS.items():
        words += [f"{said} {limit:,}" for each in field.metadata if (limit := getattr(each, bound, None)) is not None]
    return ", ".join(words)


def _bare(annotation: Any) -> Any:
    """Returns a type without None, and without what pydantic checks of it besides."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _bare(next(each for each in get_args(annotation) if each is not type(None)))
    return annotation


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")

"""What a measurement leaves: a JSON file with its conditions, a plot beside it, and a table on the terminal."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfdist.bench.plots import standalone
from kfdist.errors import ConfigError
from kfdist.system.files import replace_file

DIRECTORY = Path("benchmarks") / "results"
"""Where results go unless told otherwise."""

_NUMBERS = re.compile(r"\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]")


def write_result(out: Path, content: Mapping[str, Any], svg: str) -> list[Path]:
    """Writes a measurement and its plot.

    Args:
        out: The JSON file; the plot has its name and ends in .svg. The directory is made if it doesn't exist.
        content: What was measured, behind its conditions.
        svg: A figure of the report's.

    Returns:
        Both files.

    Raises:
        ConfigError: They can't be written.
    """
    plot = out.with_suffix(".svg")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (as_json(content) + "\n").encode())
        replace_file(plot, (standalone(svg) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"{str(out)!r} can't be written ({error.strerror}); name another file", path="--out"
        ) from None
    return [out, plot]


def as_json(content: Mapping[str, Any]) -> str:
    """Returns indented JSON, in which a list of numbers is one line."""
    text = json.dumps(content, indent=2)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lays out a table: the first column at the left, the others at the right; floats with three digits.

    Args:
        head: Names of the columns.
        rows: Cells; None is shown as "-".
    """
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def conditions(content: Mapping[str, Any]) -> str:
    """Says in a line what a measurement was made on."""
    hardware, load = content["hardware"], content["load_average"]
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, 1 thread, torch {content['versions']['torch']}, "
        f"load {load['start']} to {load['end']}, {content['seconds']:.0f} s"
    )

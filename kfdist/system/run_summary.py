"""A run's `summary.json`: read, and said in words alike wherever it is told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_summary(directory: Path) -> dict[str, Any]:
    """Reads it; empty if there is none, or what is there is damaged: the next start writes it anew.

    Args:
        directory: The run's.

    Raises:
        OSError: It is there, and can't be read.
    """
    try:
        content = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unsaved(summary: Mapping[str, Any]) -> str:
    """Says which last steps are in no checkpoint and what to do; empty if all are in one, or nothing is known of it.

    Args:
        summary: With "steps" and, but in old ones, "unsaved_steps".
    """
    steps, lost = summary.get("steps"), summary.get("unsaved_steps")
    if not isinstance(steps, int) or not isinstance(lost, int) or lost < 1:
        return ""
    which, them = ("step is", "it") if lost == 1 else (f"{lost} steps are", "them")
    return f"the last {which} in no checkpoint; the same command makes {them} anew from step {steps - lost}"

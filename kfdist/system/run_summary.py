"""What a run's `summary.json` says in words, alike wherever it is told."""

from collections.abc import Mapping
from typing import Any


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

"""Run directories as trainings leave them: one process that inverts for itself, in a fraction of a second."""

import tomllib
from pathlib import Path
from typing import Any

from kfdist.config import load_config
from kfdist.training.worker import run_worker
from tests.support.training import SMALL


def record(directory: Path, *overrides: str) -> Path:
    """Trains `SMALL` in this process; the same directory again resumes.

    Args:
        directory: The run directory.
        *overrides: On top of `SMALL`.
    """
    settings = (f"run.dir={directory}", "cluster.workers=1", "cluster.threads=1", *overrides)
    run_worker(load_config(None, defaults=tomllib.loads(SMALL), overrides=settings))
    return directory


def long_history(lines: list[dict[str, Any]], *, steps: int, length: Any) -> list[dict[str, Any]]:
    """Returns the lines that a run of so many steps would have, made from those of a short one.

    Args:
        lines: A start and windows of a real run.
        steps: How many steps.
        length: Steps of a window by the step at which it begins.
    """
    start, *windows = [line for line in lines if line["event"] in ("start", "window")]
    found, step = [start], 0
    while step < steps:
        step += length(step + 1)
        like = windows[len(found) % len(windows)]
        totals = {**like["totals"], "steps": step}
        found.append({**like, "step": step, "totals": totals})
    return found

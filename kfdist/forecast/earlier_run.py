"""What an earlier run measured, read from its directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """What an earlier run measured.

    Attributes:
        name: Its directory.
        noise_scale: The gradient noise scale, in examples; None if it measured none.
        step_seconds: The median of its steps; None if it has made none.
    """

    name: str
    noise_scale: float | None
    step_seconds: float | None


def read_earlier_run(directory: Path) -> EarlierRun:
    """Reads a run's summary and, for what that lacks, the newest line of its log that has it.

    Raises:
        ConfigError: There is no run in the directory.
    """
    summary = _summary(directory / "summary.json")
    steps = _steps(directory / "metrics.jsonl")
    if summary is None and not steps:
        raise ConfigError(
            f"{directory} has neither summary.json nor metrics.jsonl; give a run's directory", path="--from-run"
        )
    noise = (summary or {}).get("noise_scale") or _newest(steps, "noise_scale")
    seconds = ((summary or {}).get("step_seconds") or {}).get("p50")
    if seconds is None:
        seconds = _newest(steps, "step_seconds")
    return EarlierRun(name=str(directory), noise_scale=noise, step_seconds=seconds)


def _summary(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _steps(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # torn, where the run is at it
            continue
    return [each for each in found if isinstance(each, dict) and each.get("event", "step") == "step"]


def _newest(steps: list[Mapping[str, Any]], name: str) -> float | None:
    values = [each[name] for each in steps if isinstance(each.get(name), int | float)]
    return values[-1] if values else None

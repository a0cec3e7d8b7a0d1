"""`metrics.jsonl`: what happened in a run, one JSON object a line, readable while it grows."""

import json
import math
import time
from pathlib import Path
from typing import Any, Self, TextIO


class MetricsLog:
    """Appends events to `metrics.jsonl`; on ranks other than 0 it does nothing.

    Every line has `event` and `time` (seconds since 1970). The events: `start`, `step` (a log period's means), `epoch`
    (a pass over the data began), `evaluation`, `checkpoint`, `end`. A resumed run goes on in the same file: after a
    `start` at step s, earlier lines of steps beyond s are of a past that was lost.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    @classmethod
    def open(cls, directory: Path | None) -> Self:
        """Opens the log in a run directory; None for a rank that writes none."""
        return cls((directory / "metrics.jsonl").open("a", encoding="utf-8") if directory is not None else None)

    def write(self, event: str, **values: Any) -> None:
        """Appends one line and hands it to the system at once. Numbers that JSON doesn't know become null."""
        if self._file is None:
            return
        line = {"event": event, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

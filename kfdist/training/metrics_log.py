"""`metrics.jsonl`: what happened in a run, one JSON object a line, readable while it grows."""

import json
import logging
import time
from io import FileIO
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


class MetricsLog:
    """Appends events to `metrics.jsonl`; on ranks other than 0 it does nothing.

    Every line has `event` and `time` (seconds since 1970). The events: `start`, `step` (a log period's means), `epoch`
    (a pass over the data began), `evaluation`, `checkpoint`, `end`. A resumed run goes on in the same file: after a
    `start` at step s, earlier lines of steps beyond s are of a past that was lost.

    A line that can't be written (a full disk) is lost, counted and told once; it never ends a run.

    Args:
        directory: The run directory; None for a rank that writes no log.

    Attributes:
        lost: Lines that could not be written.
    """

    def __init__(self, directory: Path | None) -> None:
        self.lost = 0
        self._file = FileIO(directory / "metrics.jsonl", "a") if directory is not None else None
        self._torn = False

    def write(self, event: str, **values: Any) -> None:
        """Appends one line and hands it to the system at once. Numbers that JSON doesn't know become null."""
        if self._file is None:
            return
        text = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        line = json.loads(text, parse_constant=lambda _: None)
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        # A line that was cut off before gets its end first, so that readers lose no more than that one.
        data = b"\n" + data if self._torn else data
        try:
            written = self._file.write(data)
        except OSError as error:
            self._lose(error)
        else:
            self._torn = written != len(data)
            if self._torn:
                self._lose(OSError("only a part of the line was written"))

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            _LOG.warning("metrics.jsonl can't be written (%s); the run goes on without it", error)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

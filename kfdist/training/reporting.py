"""What a run tells while it trains: on the terminal, and one JSON object a line in `metrics.jsonl`."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any, TextIO

from kfdist.training.progress import PlainProgress, Progress

_LOG = logging.getLogger(__name__)


def make_progress(*, worker_rank: int, total_steps: int, stream: TextIO | None = None) -> Progress:
    """Chooses how to show a run: live on a terminal, plain lines elsewhere, only on rank 0."""
    if worker_rank != 0:
        return Progress()
    output: TextIO = sys.stdout if stream is None else stream
    if not output.isatty():
        return PlainProgress(output)
    from kfdist.training.live_progress import LiveProgress

    return LiveProgress(output, total_steps)


class MetricsLog:
    """Appends events to `metrics.jsonl`; on ranks other than 0 it does nothing.

    Every line has `event` and `time` (seconds since 1970). The events: `start`, `step` (a log period's means), `epoch`
    (a pass over the data began), `evaluation`, `checkpoint`, `end`. A resumed run goes on in the same file: after a
    `start` at step s, earlier lines of steps beyond s are of a past that was lost.

    A line that can't be written (a full disk) is lost, counted and told once; it never ends a run.

    Args:
        directory: The run directory; None for a rank that writes no log.
        name: Another file's name, for other lines.
        tell: Gets each line, too.

    Attributes:
        lost: Lines that could not be written.
    """

    def __init__(
        self,
        directory: Path | None,
        name: str = "metrics.jsonl",
        *,
        tell: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.lost = 0
        self._tell = tell
        self._name = name
        self._file = FileIO(directory / name, "a") if directory is not None else None
        self._torn = directory is not None and _ends_within_a_line(directory / name)

    @property
    def writes(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def write(self, event: str, **values: Any) -> None:
        """Appends one line and hands it to the system at once. Numbers that JSON doesn't know become null."""
        if self._file is None:
            return
        text = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        line = json.loads(text, parse_constant=lambda _: None)
        if self._tell is not None:
            self._tell(line)
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
            _LOG.warning("%s can't be written (%s); the run goes on without it", self._name, error)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _ends_within_a_line(file: Path) -> bool:
    """Tells whether whoever wrote a file last was killed in a line."""
    with file.open("rb") as written:
        return written.seek(0, SEEK_END) > 0 and written.seek(-1, SEEK_END) >= 0 and written.read(1) != b"\n"

"""Logging, set up once by each command: plain lines to read, or one JSON object a line for programs.

Only the logger "kfdist" is touched; the root logger and other libraries' loggers stay as they were.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from typing_extensions import override

LOGGER = "kfdist"
"""The logger above all of kfdist's own."""

_MARK = "_kfdist_handler"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(
    *,
    level: int | str = logging.INFO,
    as_json: bool = False,
    stream: TextIO | None = None,
    fields: Mapping[str, str | int] | None = None,
) -> logging.Handler:
    """Sends kfdist's log to a stream; called again, it replaces what it set up before.

    Args:
        level: Lowest level that is written.
        as_json: One JSON object a line instead of plain text.
        stream: Where to; standard error by default, so that standard output stays the command's answer.
        fields: What stands in every line, such as run, epoch and rank.

    Returns:
        The handler it installed.

    Raises:
        ValueError: The level is unknown.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(fields or {}) if as_json else PlainFormatter(fields or {}))
    setattr(handler, _MARK, True)
    logger = logging.getLogger(LOGGER)
    logger.setLevel(level)
    for old in [old for old in logger.handlers if getattr(old, _MARK, False)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False
    return handler


class PlainFormatter(logging.Formatter):
    """Time, level, fields, message."""

    def __init__(self, fields: Mapping[str, str | int]) -> None:
        prefix = "".join(f"{name}={value} " for name, value in fields.items()).replace("%", "%%")
        super().__init__(f"%(asctime)s %(levelname)s {prefix}%(name)s: %(message)s", datefmt="%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what was passed as `extra` becomes fields of it."""

    def __init__(self, fields: Mapping[str, str | int]) -> None:
        super().__init__()
        self._fields = dict(fields)

    @override
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)

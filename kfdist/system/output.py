"""Standard output and error of commands that go on without a reader; their files are the record."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any

from typing_extensions import override


def open_missing_streams() -> None:
    """Opens the null device in place of standard streams that were closed (`>&-`).

    Otherwise the next file or socket that is opened takes the number, and what is meant for the terminal goes into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - open to the end


def escape_what_cannot_be_encoded() -> None:
    """Escapes what a stream's encoding lacks, instead of raising: bars, and names of files that are no UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_escaping())


def outlive_readers() -> None:
    """Loses what can't be written to standard output or error, instead of raising.

    For a pipe whose reader has gone, a terminal that was closed, a full disk; text that the stream's encoding lacks is
    escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError):
            stream.flush()
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(_Lossy(stream.fileno(), "wb", closefd=False)),
                encoding=stream.encoding,
                errors=_escaping(),
                line_buffering=True,
            ),
        )


def _escaping() -> str:
    """Returns the name of the error handler that escapes, but for marks that stand in columns of a table."""
    codecs.register_error("kfdist.escape", _escape)
    return "kfdist.escape"


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (stand_in := _STAND_INS.get(error.object[error.start])):
        return stand_in, error.start + 1
    return codecs.backslashreplace_errors(error)


_STAND_INS = {"…": "~"}
"""What is written for a character that the encoding lacks, in its width."""


class _Lossy(io.FileIO):
    """A file that takes everything, whatever becomes of it."""

    @override
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes

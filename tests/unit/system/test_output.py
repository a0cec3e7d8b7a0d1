"""A command that goes on although nobody can read what it prints."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kfdist.system.output import escape_what_cannot_be_encoded

_SCRIPT = """
import pathlib, sys
from kfdist.system.output import open_missing_streams, outlive_readers
open_missing_streams()
outlive_readers()
with open(sys.argv[1], "w") as record:
    for number in range(3):
        print("step \\udcff", number, flush=True)
        print("warning", number, file=sys.stderr, flush=True)
        print("step", number, file=record)
"""


def _a_closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _a_closed_terminal() -> int:
    terminal, end = os.openpty()
    os.close(terminal)
    return end


@pytest.mark.parametrize("output", [_a_closed_pipe, _a_closed_terminal, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_what_cannot_be_written_is_lost_and_nothing_else(tmp_path: Path, output: Callable[[], int]):
    descriptor = output()
    record = tmp_path / "record"
    try:
        process = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(record)], stdout=descriptor, stderr=descriptor, check=False
        )
    finally:
        os.close(descriptor)
    assert record.read_text() == "step 0\nstep 1\nstep 2\n"
    assert process.returncode in (0, 120)  # 120: what Python says of standard streams that it can't flush at its end


def test_a_file_never_takes_the_place_of_a_closed_output(tmp_path: Path):
    record = tmp_path / "record"
    command = [sys.executable, "-c", _SCRIPT, str(record)]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    subprocess.run([*shell, *command], check=True)
    assert record.read_text() == "step 0\nstep 1\nstep 2\n"


def test_what_can_be_written_is(tmp_path: Path):
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "record")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "step \\udcff 0\nstep \\udcff 1\nstep \\udcff 2\n"
    assert done.stderr == "warning 0\nwarning 1\nwarning 2\n"


def test_marks_in_columns_keep_their_width_where_the_encoding_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    escape_what_cannot_be_encoded()
    print("layer…weight  naïve", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"layer~weight  na\\xefve\n"  # pyright: ignore[reportAttributeAccessIssue]

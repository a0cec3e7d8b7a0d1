"""`kfdist` commands as processes of a test: started, read line by line, looked through, and never left behind."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MARK = "KFDIST_TEST_COMMAND"


@dataclass(frozen=True)
class Process:
    """A row of the process table, as `ps` would show it."""

    pid: int
    parent: int
    started: int
    title: str


def process_table() -> dict[int, Process]:
    """Returns every living process by its id."""
    table = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if fields[0] not in (b"Z", b"X"):
            table[pid] = Process(pid=pid, parent=int(fields[1]), started=int(fields[19]), title=title)
    return table


class Command:
    """A running `kfdist` command."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None, module: str = "kfdist") -> None:
        self.mark = uuid.uuid4().hex
        self.output: list[str] = []
        self._seen: dict[int, Process] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **(environment or {}), MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    @property
    def text(self) -> str:
        """Everything it has written and the test has read."""
        return "\n".join(self.output)

    def wait_for_line(self, word: str, seconds: float = 120.0) -> str:
        """Reads its output up to a line with `word` in it; fails the test if it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line with {word!r} within {seconds} s in:\n{self.text}") from None
            assert line is not None, f"ended without a line with {word!r}:\n{self.text}"
            self.output.append(line)
            if word in line:
                return line

    def signal(self, number: int = signal.SIGINT) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 120.0) -> int:
        """Waits for its end, reads the rest of its output and returns the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._drain(1.0)
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None
        self._drain(5.0)
        return code

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                line = self._lines.get(timeout=0.1)
            except queue.Empty:
                continue
            if line is None:
                return
            self.output.append(line)

    def family(self) -> list[Process]:
        """Returns its living descendants, and remembers them for `left_behind`."""
        table = process_table()
        found = []
        for process in table.values():
            ancestor = process
            while (above := table.get(ancestor.parent)) is not None and ancestor.pid != self.process.pid:
                ancestor = above
            if ancestor.pid == self.process.pid and process.pid != self.process.pid:
                found.append(process)
        self._seen.update({process.pid: process for process in found})
        return found

    def members(self, word: str) -> list[Process]:
        """Returns its living descendants with `word` in their title."""
        return [process for process in self.family() if word in process.title]

    def wait_for_member(self, word: str, seconds: float = 120.0) -> Process:
        """Waits until a descendant has `word` in its title."""
        deadline = time.monotonic() + seconds
        while not (found := self.members(word)):
            assert time.monotonic() < deadline, f"no process {word!r} in {[p.title for p in self.family()]}"
            time.sleep(0.1)
        return found[0]

    def left_behind(self, seconds: float = 0.0) -> list[Process]:
        """Returns what still lives of the processes ever seen by `family`, and of those that carry the mark."""
        deadline = time.monotonic() + seconds
        while (left := self._living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _living(self) -> list[Process]:
        mark = f"{MARK}={self.mark}".encode()
        left = []
        for process in process_table().values():
            seen = self._seen.get(process.pid)
            try:
                marked = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                marked = False
            # A later process may have the number of an earlier one; the start time tells them apart.
            if marked or (seen is not None and seen.started == process.started):
                left.append(process)
        return [process for process in left if process.pid != os.getpid()]

    def close(self) -> None:
        """Kills whatever is left of it."""
        self.family()
        self.process.kill()
        self.process.wait()
        for process in self.left_behind():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._reader.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(*arguments: str, seconds: float = 120.0, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs a command to its end; returns its exit code and its output."""
    with Command(*arguments, environment=environment) as command:
        return command.wait(seconds), command.text

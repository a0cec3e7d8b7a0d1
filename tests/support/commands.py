"""`kfdist` commands as processes of a test: started, read line by line, looked through, and never left behind.

What a failed expectation says begins with one line: which command, what it did instead, and its last words. The ends of
its output and of its run's logs follow.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kfdist.system.processes import describe_exit

MARK = "KFDIST_TEST_COMMAND"

_OUTPUT_LINES = 40
_LOG_LINES = 15


@dataclass(frozen=True)
class Process:
    """A row of the process table, as `ps` would show it."""

    pid: int
    parent: int
    started: int
    title: str

    def cpu_seconds(self) -> float:
        """Returns how long it has computed until now."""
        fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        module: str = "kfdist",
        host: Sequence[str] = (),
        directory: Path | None = None,
    ) -> None:
        """Starts it.

        Args:
            *arguments: Of the module.
            environment: Variables beside this process's.
            module: What python runs.
            host: The `prefix` of the host that it runs on.
            directory: Its working directory.
        """
        self.name = " ".join([module, *arguments])
        self.mark = uuid.uuid4().hex
        self.output: list[str] = []
        self._directories = [Path(text.removeprefix("run.dir=")) for text in arguments if text.startswith("run.dir=")]
        self._seen: dict[int, Process] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [*host, sys.executable, "-m", module, *arguments],
            cwd=directory,
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
                raise self.failure(f"wrote no line with {word!r} within {seconds:g} s") from None
            if line is None:
                code = self.process.wait(10)
                raise self.failure(f"{describe_exit(code)} without a line with {word!r}")
            self.output.append(line)
            if word in line:
                return line

    def wait_for_file(self, path: Path, seconds: float = 120.0) -> dict[str, Any]:
        """Waits until it has written a JSON file, such as its ready file, and returns the content."""
        self.wait_until(f"it wrote {path.name}", path.exists, seconds)
        return json.loads(path.read_text())

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        """Waits while it runs until something is so, `what` in words."""
        deadline = time.monotonic() + seconds
        while not condition():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                self._drain(1.0)
                how = f"still ran after {seconds:g} s" if code is None else describe_exit(code)
                raise self.failure(f"{how} before {what}")
            time.sleep(0.05)

    def signal(self, number: int = signal.SIGINT) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 120.0) -> int:
        """Waits for its end, reads the rest of its output and returns the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._drain(1.0)
            raise self.failure(f"still ran after {seconds:g} s") from None
        self._drain(5.0)
        return code

    def expect(self, code: int, seconds: float = 120.0) -> str:
        """Waits for its end, checks its exit code and returns everything it wrote."""
        ended = self.wait(seconds)
        if ended != code:
            raise self.failure(f"{describe_exit(ended)}, not with {code}")
        return self.text

    def failure(self, what: str) -> AssertionError:
        """Returns what a test fails with: what happened, in one line, and the ends of the output and the logs."""
        written = [line for line in self.output if line.strip()]
        reasons = [line for line in written if line.startswith("kfdist: ")] or written or ["(it wrote nothing)"]
        parts = [f"`{self.name}` {what}; it said: {reasons[-1]}", "its output ends:", *self.output[-_OUTPUT_LINES:]]
        for log in sorted(log for directory in self._directories for log in directory.glob("logs/*.log")):
            parts += [f"{log} ends:", *log.read_text(errors="replace").splitlines()[-_LOG_LINES:]]
        return AssertionError("\n".join(parts))

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
        self.wait_until(f"it had a process {word!r}", lambda: bool(self.members(word)), seconds)
        return self.members(word)[0]

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


def run(*arguments: str, code: int = 0, seconds: float = 120.0, **options: Any) -> str:
    """Runs a command to its end, checks its exit code and returns its output; options as for `Command`."""
    with Command(*arguments, **options) as command:
        return command.expect(code, seconds)

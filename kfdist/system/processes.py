"""The processes of one launch: started in sessions of their own, and found again by mark and by descent.

Such a process may start others (Ray's daemons, couriers, data loaders), may die before them, and may overwrite its
environment (Ray's workers set their title there). Two ways to find them all cover for each other: every child
inherits the mark `KFDIST_LAUNCH`, and the launcher is the subreaper of its descendants, so that an orphan becomes its
child.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kfdist.system.lifetime import LAUNCH_VARIABLE

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

_TAIL_LINES, _TAIL_BYTES = 30, 1 << 20
"""How much of the end of a log is told; of a long run's, which may have grown to gigabytes, no more is read."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """How to start one process.

    Attributes:
        name: What messages call it, such as "rank 0"; also names its log file.
        line: The program and its arguments.
        environment: All of its environment.
        log: File that its output is appended to.
        terminal: Descriptor that standard output goes to; None: to the log, too.
    """

    name: str
    line: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    terminal: int | None = None


class Child:
    """A started process of the launch."""

    def __init__(self, command: Command) -> None:
        """Starts the process in a new session, so that Ctrl-C at the terminal reaches the launcher alone.

        Raises:
            OSError: Its log can't be opened or the process not be started, as where descriptors are short.
        """
        self.command = command
        command.log.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it during the run
        with command.log.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command.line,
                env=dict(command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log if command.terminal is None else command.terminal,
                stderr=log,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.command.name

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Returns its exit code, minus the signal that killed it, or None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Sends it a signal; nothing happens if it has ended."""
        if self.poll() is None:
            self._process.send_signal(number)

    def log_tail(self) -> str:
        """Returns the end of what it wrote to its log; empty if it wrote nothing."""
        try:
            with self.command.log.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(its log {self.command.log} can't be read: {error.strerror})"
        return "\n".join(text.rstrip().splitlines()[-_TAIL_LINES:])


def describe_exit(code: int) -> str:
    """Says how a process ended, in words."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def become_subreaper() -> bool:
    """Makes this process the parent of its descendants' orphans; says whether the system could do it."""
    try:
        return ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def reap_orphans(children: Iterable[Child]) -> None:
    """Collects the exit statuses of adopted orphans, and leaves those of `children` to their own `poll`."""
    own = {child.pid for child in children}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            return


def launch_processes(launch: str, root: int, spared: frozenset[int] = frozenset()) -> set[int]:
    """Finds the living processes of a launch.

    Args:
        launch: The value of `KFDIST_LAUNCH` that marks them.
        root: The launcher; it isn't in the result, its descendants are.
        spared: Descendants that are no part of the launch, such as children the launcher had before it.
    """
    mark = f"{LAUNCH_VARIABLE}={launch}".encode()
    parents = living_processes()
    marked = {pid for pid in parents if mark in _told_by_kernel(pid, "environ").split(b"\0")}
    found = marked | {pid for pid in parents if _descends(pid, root, parents)}
    return {pid for pid in found - {root} - spared if not any(_descends(pid, spare, parents) for spare in spared)}


def children_of(pid: int) -> frozenset[int]:
    """Returns the process ids of a process's living children."""
    return frozenset(child for child, parent in living_processes().items() if parent == pid)


def sweep(launch: str, root: int, *, spared: frozenset[int] = frozenset(), seconds: float = 5.0) -> set[int]:
    """Kills every process of a launch until none is left.

    Args:
        launch: As in `launch_processes`.
        root: As in `launch_processes`.
        spared: As in `launch_processes`.
        seconds: How long to try.

    Returns:
        What is still alive after `seconds`.
    """
    return kill_all(lambda: launch_processes(launch, root, spared), seconds=seconds)


def kill_all(find: Callable[[], set[int]], *, seconds: float) -> set[int]:
    """Kills what `find` finds, over and over until it finds nothing.

    Returns:
        What is still alive after `seconds`; a process in an uninterruptible wait outlasts its SIGKILL.
    """
    deadline = time.monotonic() + seconds
    while (alive := find()) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return alive


def living_processes() -> dict[int, int]:
    """Maps the id of every living process to its parent's."""
    parents: dict[int, int] = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        try:
            # The command in parentheses may hold spaces and parentheses; state and parent follow the last one.
            state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if state not in (b"Z", b"X"):
            parents[pid] = int(parent)
    return parents


def command_line(pid: int) -> bytes:
    """Returns a process's arguments, each ended by a zero byte; empty where it has none or has ended."""
    return _told_by_kernel(pid, "cmdline")


def _told_by_kernel(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""  # it ended meanwhile, or belongs to somebody else


def _descends(pid: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    seen: set[int] = set()
    while (parent := parents.get(pid, 0)) and parent not in seen:
        if parent == ancestor:
            return True
        seen.add(pid := parent)
    return False

"""A pool's directory: private, short, locked while its pool lives; removed with what the pool's Ray leaves behind.

When a pool is killed with SIGKILL, its raylet dies with it, but Ray's agents live on for half a minute and more. Every
process of a Ray has its logs open in that Ray's directory; command lines and environments are no help, because Ray's
workers overwrite both with their title. A pool starts this module as a separate process, its guardian, which waits for
its end: `python -m kfdist.pool.ray_directory PID DIRECTORY`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.held_directories import abandoned, hold
from kfdist.system.lifetime import watch_process
from kfdist.system.processes import command_line, kill_all, living_processes
from kfdist.system.spawn import module_command

_PARENT = Path("/tmp")
"""Not $TMPDIR, which may be long."""

_PREFIX = "kfdist-ray-"

_LONGEST = 36
"""Ray puts sockets under its directory, whose paths must fit into the 107 characters of an AF_UNIX address."""

_SWEEP_SECONDS = 5.0


def make_directory(given: Path | None) -> tuple[Path, BinaryIO]:
    """Makes a pool's directory, for this user alone.

    Args:
        given: What to name it; None for a new name under /tmp.

    Returns:
        The directory, and a file whose lock is held until it is closed or this process ends.

    Raises:
        ConfigError: The name is too long, or taken.
        EnvironmentFault: It can't be made.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT)) if given is None else _make(given)
        return directory, hold(directory)
    except OSError as error:
        raise EnvironmentFault(
            f"a directory for the pool can't be made: {error.strerror} ({error.filename}); make room, or mend its "
            "owner and mode"
        ) from error


def remove_stale() -> None:
    """Removes the directories of pools that were killed together with their guardians."""
    for directory in abandoned(_PARENT, _PREFIX):
        sweep(directory, seconds=1.0)
        remove(directory)


def ray_processes(directory: Path) -> set[int]:
    """Finds the living processes of the Ray whose directory this is and of no other Ray, the caller left out.

    Another user's process that names the directory isn't one of them, nor is one that only reads there, such as `tail`.
    """
    prefix = f"{directory.resolve()}/"
    return {pid for pid in living_processes() if pid != os.getpid() and _belongs(pid, prefix)}


def raylet_of(directory: Path) -> int:
    """Returns the process of the raylet of the Ray whose directory this is; 0 where none is found."""
    programs = {pid: command_line(pid).split(b"\0")[0] for pid in ray_processes(directory)}
    return next((pid for pid, program in programs.items() if program.endswith(b"/raylet")), 0)


def sweep(directory: Path, *, seconds: float = _SWEEP_SECONDS, word: str = "") -> set[int]:
    """Kills the processes of a Ray until none is left; returns those that outlasted `seconds`.

    Args:
        directory: As in `ray_processes`.
        seconds: How long to try.
        word: Spares processes without this word in their command line.
    """
    sought = word.encode()
    return kill_all(lambda: {pid for pid in ray_processes(directory) if sought in command_line(pid)}, seconds=seconds)


def remove(directory: Path) -> None:
    """Removes a Ray's directory; what a dying process still writes into it may need another try."""
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def log_tail(files: Path, lines: int = 6) -> str:
    """Returns the last words of a Ray's own processes: what went to standard error, else what they logged last."""
    logs = [path for path in files.glob("session_2*/logs/*") if path.name.startswith(("gcs_server", "raylet"))]
    told = [path for path in logs if path.suffix in (".err", ".out") and path.stat().st_size]
    for path in sorted(told, key=lambda path: (path.suffix == ".err", path.stat().st_mtime), reverse=True):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # What is indented is a table of counters that Ray's processes log now and then.
        said = [line for line in text if line.strip() and not line.startswith("\t")]
        return "\n".join([f"{path.name}:", *said[-lines:]])
    return ""


def start_guardian(directory: Path) -> subprocess.Popen[bytes]:
    """Starts the process that cleans up if this one is killed; a byte on its input says that it need not."""
    try:
        return subprocess.Popen(
            module_command(__name__, str(os.getpid()), str(directory)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise EnvironmentFault(f"can't start a process ({error})") from error


def _make(given: Path) -> Path:
    if len(str(given.resolve())) > _LONGEST:
        raise ConfigError(
            f"{given} has more than {_LONGEST} characters, too long for the sockets that Ray puts there; "
            "choose a shorter one, such as /tmp/NAME",
            path="--directory",
        )
    try:
        given.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{given} exists; choose a new one, as it is removed at the end", path="--directory"
        ) from None
    return given.resolve()


def _belongs(pid: int, prefix: str) -> bool:
    try:
        if Path(f"/proc/{pid}").stat().st_uid != os.getuid():
            return False
        if _names(command_line(pid), prefix.encode()):
            return True
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(prefix) and _writes(pid, entry.name):
                    return True
    except OSError:
        pass  # It ended meanwhile, or belongs to another user.
    return False


def _names(command: bytes, prefix: bytes) -> bool:
    """Says whether a command is of a program of Ray's package, and names the directory."""
    rays = any(b"/ray/" in word and prefix not in word for word in command.split(b"\0"))
    return rays and prefix in command


def _writes(pid: int, descriptor: str) -> bool:
    """Says whether a process has opened a file for writing, as all of a Ray have their logs."""
    for line in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def main() -> None:
    """Waits for a process to end, then cleans up after it, unless it says on standard input that it did so itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pid", type=int)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def clean_up() -> None:
        sweep(arguments.directory)
        remove(arguments.directory)
        os._exit(0)

    watch_process(arguments.pid, clean_up)
    if sys.stdin.buffer.read(1):  # The pool has cleaned up itself.
        os._exit(0)
    time.sleep(3600)  # The pool's end closed the pipe; the watcher thread is cleaning up.


if __name__ == "__main__":
    main()

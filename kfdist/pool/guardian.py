"""Finds and ends what a private Ray leaves behind: `python -m kfdist.pool.guardian PID DIRECTORY`.

When a pool is killed with SIGKILL, its raylet dies with it, but Ray's agents live on for half a minute and more. Every
process of a Ray has its logs open in that Ray's directory; command lines and environments are no help, because Ray's
workers overwrite both with their title. A pool starts this module as a separate process, which waits for its end.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from kfdist.system.lifetime import watch_process
from kfdist.system.processes import command_line, kill_all, living_processes

_SWEEP_SECONDS = 5.0


def ray_processes(directory: Path) -> set[int]:
    """Finds the living processes of the Ray whose directory this is, the caller left out.

    Args:
        directory: Ray's temporary directory, one that no other Ray shares.
    """
    prefix = f"{directory.resolve()}/"
    return {pid for pid in living_processes() if pid != os.getpid() and _belongs(pid, prefix)}


def sweep(directory: Path, *, seconds: float = _SWEEP_SECONDS, word: str = "") -> set[int]:
    """Kills the processes of a Ray until none is left; returns those that outlasted `seconds`.

    Args:
        directory: As in `ray_processes`.
        seconds: How long to try.
        word: Spares processes without this word in their command line.
    """
    sought = word.encode()
    return kill_all(
        lambda: {pid for pid in ray_processes(directory) if sought in command_line(pid)},
        seconds=seconds,
    )


def remove(directory: Path) -> None:
    """Removes a Ray's directory; what a dying process still writes into it may need another try."""
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def _belongs(pid: int, prefix: str) -> bool:
    try:
        if prefix.encode() in command_line(pid):
            return True
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(prefix):
                    return True
    except OSError:
        pass  # It ended meanwhile, or belongs to another user.
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

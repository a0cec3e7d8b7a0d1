"""Temporary directories that say by a lock whether the process that made them still lives."""

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LOCK = "lock"
_YOUNG_SECONDS = 60.0
"""A directory that changed since may be one whose lock is about to be taken."""


def hold(directory: Path) -> BinaryIO:
    """Locks a directory until the file that this returns is closed, or this process ends.

    Raises:
        OSError: It can't be done.
    """
    held = (directory / _LOCK).open("wb")
    # The directory is new: `abandoned`, in another process, may hold it, but for an instant.
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


def abandoned(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields this user's directories whose holder has ended without removing them, each held until the next one.

    Processes that the holder started may still use them.
    """
    for directory in filter(_is_own, parent.glob(f"{prefix}*")):
        # Just removed, or held (BlockingIOError).
        with contextlib.suppress(OSError), (directory / _LOCK).open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - directory.stat().st_ctime > _YOUNG_SECONDS:
                yield directory


def _is_own(directory: Path) -> bool:
    """Tells whether `hold` made its lock: others may put links into the parent, and pipes, which block who opens them.

    Root could open other users' directories, too, and must leave them alone.
    """
    try:
        found, lock = directory.lstat(), (directory / _LOCK).lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and stat.S_ISREG(lock.st_mode)

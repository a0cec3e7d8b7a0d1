"""Temporary directories that say by a lock whether the process that made them still lives."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LOCK = "lock"
_YOUNG_SECONDS = 60.0
"""A directory that changed since may be one whose lock is about to be taken, or still be used by orphans."""


def hold(directory: Path) -> BinaryIO:
    """Locks a directory until the file that this returns is closed, or this process ends.

    Raises:
        OSError: It can't be done; a BlockingIOError if another process holds it.
    """
    held = (directory / _LOCK).open("wb")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def abandoned(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields the directories whose holder has ended without removing them, each held until the next one."""
    for directory in parent.glob(f"{prefix}*"):
        # Another user's (PermissionError), just removed, or held (BlockingIOError).
        with contextlib.suppress(OSError), (directory / _LOCK).open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - directory.stat().st_ctime > _YOUNG_SECONDS:
                yield directory

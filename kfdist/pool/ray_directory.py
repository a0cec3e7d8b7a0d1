"""A pool's directory: private, short, locked while its pool lives, removed at its end or by a later pool."""

import contextlib
import fcntl
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.pool import guardian

_PARENT = Path("/tmp")
"""Not $TMPDIR, which may be long."""

_PREFIX = "kfdist-ray-"
_LOCK = "lock"

_LONGEST = 36
"""Ray puts sockets under its directory, whose paths must fit into the 107 characters of an AF_UNIX address."""

_YOUNG_SECONDS = 60.0


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
        hold = (directory / _LOCK).open("wb")
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise EnvironmentFault(
            f"a directory for the pool can't be made: {error.strerror} ({error.filename}); choose another --directory"
        ) from error
    return directory, hold


def remove_stale() -> None:
    """Removes the directories of pools that were killed together with their guardians."""
    for directory in _PARENT.glob(f"{_PREFIX}*"):
        # Another user's (PermissionError), just removed, or locked by a living pool (BlockingIOError).
        with contextlib.suppress(OSError), (directory / _LOCK).open("rb") as hold:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that was just made isn't locked yet.
            if time.time() - directory.stat().st_ctime > _YOUNG_SECONDS:
                guardian.sweep(directory, seconds=1.0)
                guardian.remove(directory)


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

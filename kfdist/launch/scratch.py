"""The launch's temporary directory: the configurations, ready files and Ray's files of the processes it starts."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kfdist.errors import EnvironmentFault
from kfdist.system.held_directories import abandoned, hold
from kfdist.system.processes import command_line, living_processes

_PARENT = "/tmp"
"""Not TMPDIR: Ray's sockets will be in there, and a socket's path must be short."""

_PREFIX = "kfdist-run-"


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Makes a directory for this user alone, and removes it with all that is in it at the end.

    Those of launches that were killed are removed, too, once none of their processes lives.

    Raises:
        EnvironmentFault: It can't be made.
    """
    for left in abandoned(Path(_PARENT), _PREFIX):
        # What a launch starts has a file of it in its arguments; a pool outlives the killed launch for a while.
        if not any(f"{left}/".encode() in command_line(pid) for pid in living_processes()):
            shutil.rmtree(left, ignore_errors=True)
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_PARENT, ignore_cleanup_errors=True)
        held = hold(Path(made.name))
    except OSError as error:
        raise EnvironmentFault(
            f"a directory for temporary files can't be made in {_PARENT} ({error.strerror}); a launch needs a few MB "
            "there: make it writable, or make room"
        ) from error
    with held, made as path:
        yield Path(path)


def check_scratch(path: Path) -> None:
    """Makes the directory again if somebody has removed it, such as a cleaner of old files.

    Raises:
        EnvironmentFault: It can't be made, or belongs to somebody else now.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        foreign = path.stat().st_uid != os.getuid()
    except OSError as error:
        raise EnvironmentFault(f"the temporary directory {path} can't be made again ({error.strerror})") from error
    if foreign:
        raise EnvironmentFault(f"the temporary directory {path} was removed, and somebody else has made it again")

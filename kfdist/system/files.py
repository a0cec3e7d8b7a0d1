"""Files that are either wholly on the disk or not there at all, also when the power fails."""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kfdist.errors import EnvironmentFault


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a new file and waits until the disk has it.

    Args:
        path: The file.
        content: What it holds.
        private: Whether only its owner may read it.

    Raises:
        FileExistsError: There is such a file already.
        OSError: It can't be written, for instance because the disk is full.
    """
    mode = 0o600 if private else 0o666
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Puts `content` in the place of a file at once: readers see the old content or the new, never a part.

    Args:
        path: The file.
        content: What it holds.
        private: Whether only its owner may read it.

    Raises:
        OSError: It can't be written; the old content stays.
    """
    if not path.name:  # as of a variable that isn't set, which Path takes for the working directory
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, content, private=private)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Waits until the disk has the directory's entries, so that files made or renamed in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> list[Path]:
    """Makes a directory of a run and returns what had to be made, the innermost first.

    Raises:
        EnvironmentFault: It can't be made.
    """
    try:
        made = [directory for directory in (path, *path.parents) if not directory.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"can't make {path} ({error.strerror}); choose another run.dir") from error
    return made


def open_regular(path: str) -> BinaryIO:
    """Opens a regular file to read. Opening a FIFO, or reading a device, might wait for ever.

    Raises:
        OSError: It is no regular file, or can't be opened.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def from_home(path: str) -> Path:
    """Returns a path with the home in the place of its `~`; without one, of a user that nobody knows, as it is."""
    return Path(os.path.expanduser(path))


def check_working_directory() -> None:
    """Checks that Ray can start in the working directory.

    Raises:
        EnvironmentFault: It was removed, or its path isn't UTF-8, in which Ray writes it down.
    """
    try:
        path = os.getcwdb()
    except FileNotFoundError:
        raise EnvironmentFault("the working directory was removed; start in another one") from None
    try:
        path.decode()
    except UnicodeDecodeError:
        shown = path.decode(errors="backslashreplace")
        raise EnvironmentFault(
            f"the working directory {shown} isn't named in UTF-8, which Ray needs; start in another one, and say where "
            "the run's files are with run.dir"
        ) from None


def is_private(path: Path) -> bool:
    """Says whether only its owner, who is this user or root, may read a file."""
    found = os.stat(path)
    return not found.st_mode & 0o077 and found.st_uid in (os.getuid(), 0)


def write_ready_file(path: Path, content: Mapping[str, Any]) -> None:
    """Tells whoever waits for a file to appear that this process serves.

    Args:
        path: The file; a later call replaces it.
        content: What it says, as JSON.

    Raises:
        EnvironmentFault: It can't be written.
    """
    try:
        replace_file(path, (json.dumps(content) + "\n").encode())
    except OSError as error:
        raise EnvironmentFault(f"the ready file {path} can't be written: {error.strerror}; choose another") from None


def read_ready_file(path: Path) -> dict[str, Any] | None:
    """Returns what a process wrote to its ready file last; None while there is none, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError:  # none yet; removed with its folder; no descriptor left to read it with
        return None


def lock_holder(lock: Path) -> str | None:
    """Returns what is written in a file that a process holds locked (flock), None if nobody does."""
    if not lock.exists():
        return None
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().decode(errors="replace").strip()
    return None

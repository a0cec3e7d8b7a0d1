"""Files that are either wholly on the disk or not there at all, also when the power fails."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file and waits until the disk has it.

    Raises:
        FileExistsError: There is such a file already.
        OSError: It can't be written, for instance because the disk is full.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Puts `content` in the place of a file at once: readers see the old content or the new, never a part.

    Raises:
        OSError: It can't be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, content)
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

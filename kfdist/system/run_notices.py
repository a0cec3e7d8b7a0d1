"""Notices by which commands find the controllers and the runs that this user has on this machine.

A notice is a small file in a directory that only this user can open. Who posts it holds it locked (flock), which the
kernel undoes however that process ends: a notice without a lock is of the past, after kill -9 and after a reboot too,
and whoever comes across it removes it. Nothing secret stands in it, only where the certificates are.
"""

import fcntl
import json
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

_LOG = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "KFDIST_RUNTIME_DIR"
"""Environment variable with the one directory to use, made if it is missing."""

_RENEW_SECONDS = 60.0
"""How often a notice is touched, so that cleaners of old files leave it, and posted again if it was removed."""

_END_SECONDS = 1.0
"""How long a renewal that hangs may hold up the end; the lock goes with the process, and then the file, too."""

Place = tuple[int, int]
"""A directory's device and inode: the same however its path is written, and after it was moved."""


@dataclass(frozen=True, kw_only=True)
class RunNotice:
    """What one process says of itself.

    Attributes:
        pid: The process.
        run: The run that it serves or trains; empty for a controller that was started for none.
        directory: The run's directory, absolute; empty if `run` is.
        place: Where that was when the notice was posted; None if there was none yet.
        address: Where the run's controller serves gRPC; empty for a run that has none.
        database: The SQLite file of the controller that posted it; empty where a rank did.
        certificates: Directory of certificates; empty without TLS.
        token_file: File with the token; empty without TLS.
    """

    pid: int
    run: str = ""
    directory: str = ""
    place: Place | None = None
    address: str = ""
    database: str = ""
    certificates: str = ""
    token_file: str = ""


def place_of(directory: Path | str) -> Place | None:
    """Returns where a directory is, by which moved and differently written paths are told to be the same."""
    try:
        found = os.stat(directory)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def posted(notice: RunNotice) -> Iterator[None]:
    """Keeps a notice posted while the context lasts.

    Where that can't be done, a warning says so: the run is as good without it.
    """
    ended = threading.Event()
    posting = _Posting(notice)
    posting.renew()

    def keep() -> None:
        while not ended.wait(_RENEW_SECONDS):
            posting.renew()

    keeper = threading.Thread(target=keep, name="kfdist-notice", daemon=True)
    try:
        keeper.start()
    except RuntimeError as error:  # no more threads
        _LOG.warning("a cleaner of old files may remove the notice that `kfdist status` finds this by: %s", error)
    try:
        yield
    finally:
        ended.set()
        if keeper.ident is not None:
            keeper.join(_END_SECONDS)
        if not keeper.is_alive():
            posting.remove()


def notices() -> list[RunNotice]:
    """Returns the notices of all processes that live, and removes those of the past."""
    found = []
    for directory in _directories():
        if not _refusal(directory):
            for path in sorted(directory.glob("*.json")):
                if (notice := _read(path)) is not None:
                    found.append(notice)
    return found


class _Posting:
    """One notice's file, held locked."""

    def __init__(self, notice: RunNotice) -> None:
        self._content = json.dumps(asdict(notice)).encode()
        self._file: BinaryIO | None = None
        self._path = Path()
        self._told = False

    def renew(self) -> None:
        """Posts the notice if it isn't there, and touches it if it is."""
        try:
            if self._file is None or not self._in_place(self._file):
                self.remove()
                self._post()
            os.utime(self._path)
        except OSError as error:
            if not self._told:
                _LOG.warning(
                    "`kfdist status` won't find this by itself, only by its directory or its address: %s",
                    error,
                )
            self._told = True

    def remove(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # without its lock it is of the past, and whoever comes across it removes it
                if self._in_place(self._file):
                    self._path.unlink()
                self._file.close()
            self._file = None

    def _in_place(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(self._path.lstat(), os.fstat(file.fileno()))
        except OSError:
            return False

    def _post(self) -> None:
        directory = _make_directory()
        for left in directory.glob(".*.tmp"):  # of processes that were killed between the next lines
            with suppress(OSError):
                if time.time() - left.lstat().st_mtime > _RENEW_SECONDS:
                    left.unlink()
        name = uuid.uuid4().hex
        temporary, self._path = directory / f".{name}.tmp", directory / f"{name}.json"
        file = open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115 - held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(self._content)
            file.flush()
            temporary.rename(self._path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        self._file = file


def _read(path: Path) -> RunNotice | None:
    """Returns a notice whose process lives; removes one of the past."""
    with suppress(OSError), open(path, "rb", opener=_open_own) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse(file.read())
        path.unlink(missing_ok=True)
    return None


def _parse(content: bytes) -> RunNotice | None:
    """Reads a notice, also one of another version of kfdist."""
    try:
        values = json.loads(content)
        place = values.get("place")
        known = {name: values[name] for name in RunNotice.__dataclass_fields__ if name in values}
        return RunNotice(**{**known, "place": tuple(place) if place else None})
    except (ValueError, TypeError, AttributeError):
        return None


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _directories() -> list[Path]:
    """Returns where notices may be, the best place to post one first."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return [Path(chosen)]
    user = os.getuid()
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    # The session's directory goes with the user's last session, and a run may outlive that: then its notice moves on.
    places = [Path(session) / "kfdist"] if session.startswith("/") else []
    places += [Path(f"/run/user/{user}/kfdist"), Path(f"/tmp/kfdist-{user}")]
    return list(dict.fromkeys(places))


def _make_directory() -> Path:
    refusals = []
    for directory in _directories():
        try:
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        except OSError as error:
            refusals.append(f"{directory} can't be made ({error.strerror})")
            continue
        if not (refusal := _refusal(directory)):
            return directory
        refusals.append(refusal)
    raise OSError("; ".join(refusals))


def _refusal(directory: Path) -> str:
    """Returns why a directory isn't to be trusted; empty if it is this user's alone."""
    try:
        found = directory.lstat()
    except OSError as error:
        return f"{directory} can't be read ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return f"{directory} is no directory; remove it"
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        return f"{directory} is open to others; its owner must be you and its mode 0700"
    return ""

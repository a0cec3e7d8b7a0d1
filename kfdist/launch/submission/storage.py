"""Where Ray Train keeps its copies of checkpoints: a directory that nodes share, or a URI."""

import threading
import time
import uuid
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kfdist.errors import ConfigError, EnvironmentFault

_SCHEMES = ("abfs", "abfss", "gcs", "gs", "hdfs", "s3", "viewfs")
"""What pyarrow can write to, and nodes reach from everywhere."""

_SECRETS = ("key", "secret", "token", "password", "sig")
"""What the names of secret options of URIs have in them."""

_ANSWER_SECONDS = 60.0
_TICK_SECONDS = 0.2


def parse_storage(text: str) -> str:
    """Returns a directory or a URI as Ray Train takes it; a URI of a file is the directory that it names.

    Raises:
        ConfigError: It is neither, or has a secret in it.
    """
    parts = urlsplit(text)
    if "://" not in text:
        if not Path(text).is_absolute():
            raise ConfigError(
                f"is {text!r}; give an absolute path that all nodes share, or a URI such as s3://BUCKET/PATH",
                path="--storage",
            )
        return text
    if _has_secret(parts):
        raise ConfigError(
            "has a secret in it, which isn't shown here and would end up in logs; give the URI without it, and the "
            "nodes the credentials in their own environment",
            path="--storage",
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(
                f"is {text!r}, which names the host {parts.netloc!r}; write the directory, or file:///DIR with three "
                "slashes",
                path="--storage",
            )
        return unquote(parts.path)
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"is {text!r}, and Ray Train can't write to {parts.scheme!r}; give a directory that all nodes share, or a "
            f"URI that begins with one of: {', '.join(_SCHEMES)}",
            path="--storage",
        )
    if not parts.netloc:
        raise ConfigError(f"is {text!r}, which names no place; such as {parts.scheme}://BUCKET/PATH", path="--storage")
    return text


def _has_secret(parts: SplitResult) -> bool:
    place, _, after = parts.netloc.rpartition(":")
    cut = bool(place) and "@" in parts.path and not after.isdecimal()  # a slash in the password ends the place
    options = parse_qsl(parts.query, keep_blank_values=True)
    return bool(parts.password) or cut or any(word in name.lower() for name, _ in options for word in _SECRETS)


def prepare_storage(storage: str, run: str, asked: threading.Event) -> str:
    """Makes a run's place in the storage, so that what is wrong with it is one sentence, and soon.

    Ray Train itself would try to reach some storages for a quarter of an hour, and then show a stack trace.

    Args:
        storage: As `parse_storage` returns it.
        run: The run's name.
        asked: Set once somebody asks to stop; this returns then.

    Returns:
        A new file beside the run's checkpoints: workers that see it share the place. Empty where that is a URI.

    Raises:
        EnvironmentFault: Nothing can be written there.
    """
    if "://" not in storage:
        return _mark(Path(storage) / run, storage)
    failures: list[Exception] = []

    def reach() -> None:
        from pyarrow import fs

        try:
            system, path = fs.FileSystem.from_uri(storage)
            system.create_dir(f"{path}/{run}")
        except Exception as error:  # of whichever file system this is
            failures.append(error)

    thread = threading.Thread(target=reach, name="kfdist-storage", daemon=True)
    thread.start()
    deadline = time.monotonic() + _ANSWER_SECONDS
    while thread.is_alive() and not asked.is_set() and time.monotonic() < deadline:
        thread.join(_TICK_SECONDS)
    if failures or (thread.is_alive() and not asked.is_set()):
        reason = str(failures[0]).strip().partition("\n")[0] if failures else f"no answer in {_ANSWER_SECONDS:g} s"
        raise _unusable(storage, reason)
    return ""


def _mark(place: Path, storage: str) -> str:
    mark = place / f".kfdist-{uuid.uuid4().hex}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob(".kfdist-*"):
            old.unlink(missing_ok=True)
        mark.touch()
    except OSError as error:
        raise _unusable(storage, error.strerror or str(error)) from error
    return str(mark)


def _unusable(storage: str, reason: str) -> EnvironmentFault:
    return EnvironmentFault(f"Ray Train can't keep checkpoints in {storage} ({reason}); choose another --storage")

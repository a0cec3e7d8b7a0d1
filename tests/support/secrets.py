"""What of a directory of certificates must stand nowhere else, and where it does."""

from collections.abc import Iterable
from pathlib import Path


def secrets_of(certificates: Path) -> list[bytes]:
    """Returns the token, and of each private key the second line, as the first is alike in all."""
    found = [(certificates / "token").read_bytes().strip()]
    for file in certificates.iterdir():
        _, begun, rest = file.read_bytes().partition(b"-----BEGIN PRIVATE KEY-----\n")
        if begun:
            found.append(rest.splitlines()[1])
    return found


def secrets_found(certificates: Path, *, texts: Iterable[str], folder: Path) -> list[str]:
    """Returns the files below a folder, and the beginnings of texts, that hold a secret."""
    secrets = secrets_of(certificates)
    assert len(secrets) == 5  # the token, and four private keys
    assert all(any(secret in file.read_bytes() for file in certificates.iterdir()) for secret in secrets)
    places = [(text[:80], text.encode()) for text in texts]
    places += [(str(file), file.read_bytes()) for file in folder.rglob("*") if file.is_file()]
    return [name for name, content in places if any(secret in content for secret in secrets)]

"""Who a process is to others: the files that prove it, read anew when they change, and never passed on themselves."""

import logging
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

from kfdist.errors import EnvironmentFault
from kfdist.system.files import from_home

_LOG = logging.getLogger(__name__)

AUTHORITY_FILE = "ca.pem"
TOKEN_FILE = "token"
SHORTEST_TOKEN = 16

_LONGEST_FILE = 1 << 20

T = TypeVar("T")


class Role(StrEnum):
    """What a certificate says of its holder. Addresses aren't known when certificates are made; roles are."""

    CONTROLLER = "controller"
    OWNER = "owner"
    CLIENT = "client"

    @property
    def host_name(self) -> str:
        """The name that stands in the certificate and that the other side asks for."""
        return f"{self.value}.kfdist"

    @property
    def file_name(self) -> str:
        """The file with this role's private key and certificate."""
        return f"{self.value}.pem"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What TLS needs, as PEM.

    Attributes:
        own: The private key and the certificate of this process.
        authority: The certificate of the authority that all others' certificates must be signed by.
    """

    own: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "Identity()"  # a private key is for no log


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Where a process finds its certificate and the token. Paths only: what is in the files stays on the node.

    Attributes:
        role: Whose certificate it shows.
        certificates: Directory of `ca.pem` and the role's file; `~` is the home of whoever reads them.
        token_file: The file with the token.
    """

    role: Role
    certificates: str
    token_file: str

    @classmethod
    def at(cls, role: Role, certificates: str | None, token_file: str | None) -> "Credentials | None":
        """Returns the credentials that a configuration names; None if it names none, which confines to loopback.

        Args:
            role: Whose certificate to show.
            certificates: The directory; relative to this process's working directory.
            token_file: The token's file; `token` in the directory if None.
        """
        if certificates is None:
            return None
        token_file = token_file or os.path.join(certificates, TOKEN_FILE)
        return cls(role=role, certificates=_anchored(certificates), token_file=_anchored(token_file))

    @property
    def identity_files(self) -> tuple[Path, Path]:
        """This process's key with its certificate, and the authority's certificate, on this node."""
        directory = from_home(self.certificates)
        return directory / self.role.file_name, directory / AUTHORITY_FILE

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, on this node."""
        return *self.identity_files, from_home(self.token_file)

    def identity(self) -> Identity:
        """Reads key and certificates.

        Raises:
            EnvironmentFault: A file is missing, unreadable or no PEM of its kind; names the file and the node.
        """
        own, authority = self.identity_files
        identity = Identity(own=_read(own), authority=_read(authority))
        self.tls(ssl.PROTOCOL_TLS_SERVER)
        return identity

    def tls(self, protocol: int) -> ssl.SSLContext:
        """Returns a context of Python's ssl that shows this process's certificate and demands the other's.

        Args:
            protocol: `ssl.PROTOCOL_TLS_SERVER` or `ssl.PROTOCOL_TLS_CLIENT`.

        Raises:
            EnvironmentFault: As for `identity`.
        """
        own, authority = self.identity_files
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        for path, load in ((own, _load_chain), (authority, _load_authority)):
            try:
                load(context, path)
            except ssl.SSLError as error:
                wanted = "certificate" if path is authority else "private key with its certificate"
                raise _unusable(path, f"holds no {wanted} in PEM ({error.reason or 'unreadable'})") from None
            except OSError as error:
                raise _unusable(path, f"can't be read ({error.strerror})") from None
        return context

    def token(self) -> str:
        """Reads the token.

        Raises:
            EnvironmentFault: The file is missing or unreadable, or holds no token.
        """
        path = from_home(self.token_file)
        token = _read(path).decode("ascii", errors="replace").strip()
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise _unusable(
                path,
                f"holds {len(token)} characters that make no token; it must be {SHORTEST_TOKEN} or more printable ones "
                "of ASCII without blanks",
            )
        return token


class Reread(Generic[T]):
    """What was read from files, read again once one of them has changed; what can't be read leaves the old in force."""

    def __init__(self, files: Sequence[Path], read: Callable[[], T]) -> None:
        """Reads for the first time; raises what `read` raises."""
        self._files = files
        self._read = read
        self._stamp = stamp(files)
        self._value = read()

    @property
    def value(self) -> T:
        """What the files hold; the same object until they change."""
        if (now := stamp(self._files)) != self._stamp:
            self._stamp = now
            try:
                self._value = self._read()
            except EnvironmentFault as fault:
                _LOG.warning("%s; what was read before stays in force", fault)
        return self._value


def stamp(files: Sequence[Path]) -> tuple[tuple[int, int, int] | None, ...]:
    """Returns what changes when one of the files does."""
    return tuple(_stamp(file) for file in files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _anchored(path: str) -> str:
    return path if path.startswith("~") else os.path.abspath(path)


def _load_chain(context: ssl.SSLContext, path: Path) -> None:
    context.load_cert_chain(path, password="")  # without one, OpenSSL would ask a terminal for it


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    context.load_verify_locations(path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST_FILE)
    except OSError as error:
        raise _unusable(path, f"can't be read ({error.strerror})") from None


def _unusable(path: Path, what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{path} on node {socket.gethostname()} {what}; `kfdist certs init DIR` makes certificates and a token: copy "
        "them to every node, and name the place in security.certificates (KFDIST_SECURITY__CERTIFICATES)"
    )

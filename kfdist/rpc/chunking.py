"""Payloads as chunks: split on one side, joined and verified on the other."""

import hashlib
from collections.abc import Iterator

from kfdist.errors import KfdistError
from kfdist.types import CHUNK_BYTES


class PayloadError(KfdistError):
    """A payload differs from what its header said."""


class PayloadTooLarge(KfdistError):
    """A payload is larger than its receiver accepts; nothing was allocated for it."""


def digest_of(payload: bytes | bytearray | memoryview) -> str:
    """Returns the SHA-256 of a payload, hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


def split(payload: bytes | bytearray | memoryview, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yields a payload in order, in chunks of at most `chunk_bytes`; an empty one yields nothing.

    Args:
        payload: The bytes; copied chunk by chunk, so that a large one isn't held twice.
        chunk_bytes: Size of all chunks except the last.
    """
    view = memoryview(payload).cast("B")
    for start in range(0, len(view), chunk_bytes):
        yield bytes(view[start : start + chunk_bytes])


class Assembler:
    """Joins chunks; nothing is trusted until `finish` has compared the digest."""

    def __init__(self, size: int, digest: str, *, limit_bytes: int) -> None:
        """Begins a payload.

        Args:
            size: Bytes of the whole payload, as its header says.
            digest: Its SHA-256, hexadecimal, as its header says.
            limit_bytes: The largest payload that the receiver accepts.

        Raises:
            PayloadError: The size is negative, or the digest isn't a SHA-256.
            PayloadTooLarge: The size is over the limit.
        """
        if size < 0:
            raise PayloadError(f"payload_bytes is {size}; it must be 0 or more")
        if size > limit_bytes:
            raise PayloadTooLarge(f"payload_bytes is {size}; at most {limit_bytes} are taken")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise PayloadError(f"digest is {digest[:80]!r}; it must be a SHA-256, 64 lower-case hexadecimal digits")
        self._size = size
        self._digest = digest
        self._hash = hashlib.sha256()
        # Grows with what arrives: a header alone can't cause an allocation.
        self._received = bytearray()

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self._size - len(self._received)

    def add(self, chunk: bytes) -> None:
        """Appends the next chunk.

        Raises:
            PayloadError: It is empty, over CHUNK_BYTES, or more than was announced.
        """
        if not 0 < len(chunk) <= CHUNK_BYTES:
            raise PayloadError(f"a chunk has {len(chunk)} bytes; it must have 1 to {CHUNK_BYTES}")
        if len(chunk) > self.missing:
            raise PayloadError(f"the payload is longer than the {self._size} bytes its header says")
        self._hash.update(chunk)
        self._received += chunk

    def finish(self) -> bytearray:
        """Returns the whole payload, verified.

        Raises:
            PayloadError: Bytes are missing, or the digest differs.
        """
        if self.missing:
            raise PayloadError(f"the payload ended {self.missing} bytes short of the {self._size} its header says")
        found = self._hash.hexdigest()
        if found != self._digest:
            raise PayloadError(f"the payload's SHA-256 is {found}, its header says {self._digest}")
        return self._received

"""A result on its way from its courier rank to all ranks: what they agree on before it travels, and the payload."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from kfdist.comm.broadcast import PayloadBroadcast
from kfdist.types import JobResult

_DIGEST_WORDS = 8
HEADER_COLUMNS = 2 + _DIGEST_WORDS
"""How many int64 columns a header has."""


@dataclass(frozen=True)
class Header:
    """What all ranks know of a payload before it travels: its version, size and SHA-256."""

    version: int
    size: int
    digest: str

    @classmethod
    def of(cls, result: JobResult) -> "Header":
        """Describes a frozen result."""
        return cls(result.version, len(result.payload), result.digest)

    def columns(self) -> list[int]:
        """Lays it out as non-negative int64 columns, so that a maximum with -1 leaves it alone."""
        words = [int(self.digest[8 * i : 8 * i + 8], 16) for i in range(_DIGEST_WORDS)]
        return [self.version, self.size, *words]

    @classmethod
    def read(cls, columns: Sequence[int]) -> "Header | None":
        """Reads it back; None where nobody had one (WAIT)."""
        if columns[0] < 0:
            return None
        return cls(columns[0], columns[1], "".join(f"{word:08x}" for word in columns[2:]))

    def fits(self, payload: bytes) -> bool:
        """Says whether a payload is the one described, whole."""
        return hashlib.sha256(payload).hexdigest() == self.digest


NO_HEADER = [-1] * HEADER_COLUMNS
"""The columns of a rank that has no result to describe."""


@dataclass
class Flight:
    """A broadcast under way.

    Attributes:
        header: As all ranks agreed.
        broadcast: Carries the payload.
        payload: What has arrived at this rank; None until then.
    """

    header: Header
    broadcast: PayloadBroadcast
    payload: bytes | None = None

"""What ranks exchange without a step waiting for it: the agreed table, and payloads from one rank to all."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator, Pending
from kfdist.comm.host_copy import HostCopy
from kfdist.linalg.uploads import sent
from kfdist.types import JobResult


class _Arriving:
    """What a collective leaves in a tensor, read on the host when it is there."""

    def __init__(self, tensor: Tensor, work: Pending, *, is_read: bool = True) -> None:
        self._tensor = tensor
        self._work = work
        self._copy: HostCopy | None = None
        if tensor.is_cuda:
            # The compute stream waits (the host doesn't), so that no gradient reduction of the next step overtakes this
            # collective on some ranks only.
            work.wait()
            self._copy = HostCopy([tensor], aside=True) if is_read else None

    def is_completed(self) -> bool:
        return self._work.is_completed() if self._copy is None else self._copy.ready()

    def wait(self) -> Tensor:
        if self._copy is not None:
            return self._copy.wait()[0]
        self._work.wait()
        return self._tensor


class TableExchange:
    """The agreed table and the agreed rounds: small int64 vectors, reduced by MAX over all ranks.

    A table is reduced once a step without waiting for it in that step: `start` is called by every rank at the end of
    step t and `complete` at the end of step t+1; the result is never polled, so no rank can see it earlier than
    another. Over NCCL the table is a device tensor whose copy on the host is read one step later.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._table: _Arriving | list[int] | None = None
        self.bytes_sent = 0

    def start(self, columns: Sequence[int], digest: Tensor | None = None) -> None:
        """Starts reducing this rank's columns; all ranks must give equally many.

        Args:
            columns: The rank's contribution.
            digest: An int64 scalar h that fills the last two columns as (h, not h), without leaving its device.
        """
        if self._table is not None:
            raise AssertionError("a table was started while another is running")
        if digest is None and self._communicator.process_group is None:
            self._table = list(columns)  # its own maximum
            self.bytes_sent += len(columns) * 8
            return
        table = sent(torch.tensor(columns, dtype=torch.int64, device="cpu"), self._communicator.device)
        if digest is not None:
            table[-2:] = torch.stack([digest, ~digest])
        self.bytes_sent += table.numel() * 8
        self._table = _Arriving(table, self._communicator.all_reduce_max(table))

    def complete(self) -> list[int] | None:
        """Waits for the running table and returns it; None if none was started."""
        if self._table is None:
            return None
        arriving, self._table = self._table, None
        return arriving if isinstance(arriving, list) else arriving.wait().tolist()

    def agree(self, columns: Sequence[int]) -> list[int]:
        """One blocking round: returns the elementwise maximum of all ranks' columns. All ranks must enter."""
        round_ = torch.tensor(columns, dtype=torch.int64, device="cpu").to(self._communicator.device)
        self.bytes_sent += round_.numel() * 8
        self._communicator.all_reduce_max(round_).wait()
        return round_.tolist()

    def share(self, values: Sequence[float]) -> list[float]:
        """Returns rank 0's float64 values on all ranks."""
        shared = torch.tensor(values, dtype=torch.float64, device="cpu").to(self._communicator.device)
        self._communicator.broadcast(shared, 0).wait()
        return shared.tolist()


_DIGEST_WORDS = 8
_NO_DIGEST = 8 * _DIGEST_WORDS * "0"
HEADER_COLUMNS = 2 + _DIGEST_WORDS
"""How many int64 columns a header has."""

NO_HEADER = [-1] * HEADER_COLUMNS
"""The columns of a rank that has no result to describe."""


@dataclass(frozen=True)
class Header:
    """What all ranks know of a result before it travels: its version, its payload's size and SHA-256."""

    version: int
    size: int
    digest: str

    @classmethod
    def of(cls, result: JobResult, *, alone: bool = False) -> Self:
        """Describes a frozen result; for a rank that is `alone` without a SHA-256: nobody else gets it."""
        return cls(result.version, len(result.payload), _NO_DIGEST if alone else result.digest)

    def columns(self) -> list[int]:
        """Lays it out as non-negative int64 columns, so that a maximum with -1 leaves it alone."""
        words = [int(self.digest[8 * i : 8 * i + 8], 16) for i in range(_DIGEST_WORDS)]
        return [self.version, self.size, *words]

    @classmethod
    def read(cls, columns: Sequence[int]) -> Self | None:
        """Reads it back; None where nobody had one (WAIT)."""
        if columns[0] < 0:
            return None
        return cls(columns[0], columns[1], "".join(f"{word:08x}" for word in columns[2:]))


class PayloadBroadcast:
    """One result's payload on its way from its courier rank to all ranks, as raw bytes.

    Args:
        communicator: All its ranks make the same broadcasts in the same order, from their main threads.
        header: As all ranks agreed.
        source: The rank that has the payload.
        payload: The bytes, on the source; None elsewhere.

    Attributes:
        header: As all ranks agreed.
        payload: What has arrived at this rank; None before `receive`.
    """

    def __init__(self, communicator: Communicator, header: Header, *, source: int, payload: bytes | None) -> None:
        self.header = header
        self.payload: bytes | None = None
        self._sent = payload
        if payload is not None and communicator.process_group is None:
            buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        elif payload is not None:
            buffer = sent(torch.frombuffer(bytearray(payload), dtype=torch.uint8), communicator.device)
        else:
            buffer = torch.empty(header.size, dtype=torch.uint8, device=communicator.device)
        work = communicator.broadcast(buffer, source)
        self._arriving = _Arriving(buffer, work, is_read=payload is None)

    def is_completed(self) -> bool:
        """Says, without blocking, whether `wait` would return at once."""
        return self._arriving.is_completed()

    def wait(self) -> bytes:
        """Returns the payload; on the source the very bytes it was given."""
        arrived = self._arriving.wait()
        return self._sent if self._sent is not None else arrived.cpu().numpy().tobytes()

    def receive(self) -> bool:
        """Waits for the payload, keeps it, and says whether it is the one that the header describes, whole.

        The source's link has compared the digest already, in its own thread. The other ranks' links never see the
        bytes: they come to the thread that trains, which has to know before it may tell the others that it has them.
        """
        self.payload = self.wait()
        return self.payload is self._sent or hashlib.sha256(self.payload).hexdigest() == self.header.digest

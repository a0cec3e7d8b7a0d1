"""The agreed table and the agreed rounds: small int64 vectors, reduced by MAX over all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator, Pending
from kfdist.comm.host_copy import HostCopy


class TableExchange:
    """Reduces one table a step without waiting for it in that step.

    `start` is called by every rank at the end of step t and `complete` at the end of step t+1; the result is never
    polled, so no rank can see it earlier than another. Over NCCL the table is a device tensor whose copy on the host is
    read one step later.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._work: Pending | None = None
        self._table: Tensor | None = None
        self._copy: HostCopy | None = None
        self.bytes_sent = 0

    def start(self, columns: Sequence[int], digest: Tensor | None = None) -> None:
        """Starts reducing this rank's columns; all ranks must give equally many.

        Args:
            columns: The rank's contribution.
            digest: An int64 scalar h that fills the last two columns as (h, not h), without leaving its device.
        """
        if self._table is not None:
            raise AssertionError("a table was started while another is running")
        self._table = torch.tensor(columns, dtype=torch.int64).to(self._communicator.device, non_blocking=True)
        if digest is not None:
            self._table[-2:] = torch.stack([digest, ~digest])
        self.bytes_sent += self._table.numel() * 8
        self._work = self._communicator.all_reduce_max(self._table)
        if self._table.is_cuda:
            # The compute stream waits (not the host), so that no gradient reduction of the next step overtakes this.
            self._work.wait()
            self._copy = HostCopy([self._table], aside=True)

    def complete(self) -> list[int] | None:
        """Waits for the running table and returns it; None if none was started."""
        if self._table is None or self._work is None:
            return None
        if self._copy is not None:
            result = self._copy.wait()[0].tolist()
        else:
            self._work.wait()
            result = self._table.tolist()
        self._table = self._work = self._copy = None
        return result

    def agree(self, columns: Sequence[int]) -> list[int]:
        """One blocking round: returns the elementwise maximum of all ranks' columns. All ranks must enter."""
        round_ = torch.tensor(columns, dtype=torch.int64).to(self._communicator.device)
        self.bytes_sent += round_.numel() * 8
        self._communicator.all_reduce_max(round_).wait()
        return round_.tolist()

    def share(self, values: Sequence[float], source: int = 0) -> list[float]:
        """Returns rank `source`'s float64 values on all ranks."""
        shared = torch.tensor(values, dtype=torch.float64).to(self._communicator.device)
        self._communicator.broadcast(shared, source).wait()
        return shared.tolist()

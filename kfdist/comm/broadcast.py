"""Payloads from one rank to all, as raw bytes, without waiting for them."""

import torch

from kfdist.comm.communicator import Communicator
from kfdist.comm.host_copy import HostCopy


class PayloadBroadcast:
    """One payload on its way from the courier rank to all ranks.

    Args:
        communicator: All its ranks make the same broadcasts in the same order, from their main threads.
        payload: The bytes, on the source; None elsewhere.
        size: How many bytes, as the agreed header said.
        source: The rank that has them.
    """

    def __init__(self, communicator: Communicator, payload: bytes | None, *, size: int, source: int) -> None:
        self._payload = payload
        self._copy: HostCopy | None = None
        device = communicator.device
        if payload is not None:
            self._buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
        else:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._work = communicator.broadcast(self._buffer, source)
        if device.type == "cuda":
            # The compute stream waits (the host doesn't), so that no gradient reduction of the next step overtakes this
            # collective on some ranks only.
            self._work.wait()
            if payload is None:
                self._copy = HostCopy([self._buffer], aside=True)

    def is_completed(self) -> bool:
        """Says, without blocking, whether `wait` would return at once."""
        return self._copy.ready() if self._copy is not None else self._work.is_completed()

    def wait(self) -> bytes:
        """Returns the payload; on the source the very bytes it was given."""
        if self._copy is not None:
            return self._copy.wait()[0].numpy().tobytes()
        self._work.wait()
        return self._payload if self._payload is not None else self._buffer.cpu().numpy().tobytes()

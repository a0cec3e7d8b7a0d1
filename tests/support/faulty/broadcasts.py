"""Broadcasts under the test's script of faults; for ranks that are their own processes (see `tests.support.ranks`)."""

import itertools

from kfdist.comm.background import Header, PayloadBroadcast
from kfdist.comm.communicator import Communicator
from kfdist.runtime.adopt import exchange
from tests.support.faults import corrupted, reach

_NUMBERS = itertools.count()


class FaultyBroadcast(PayloadBroadcast):
    """Looks unfinished for longer than it is, or arrives with a wrong bit."""

    def __init__(self, communicator: Communicator, header: Header, *, source: int, payload: bytes | None) -> None:
        super().__init__(communicator, header, source=source, payload=payload)
        self._faults = reach("late", "corrupt", payload=next(_NUMBERS))
        self._looks = sum(fault.random().randint(0, fault.value[0]) for fault in self._faults if fault.kind == "late")

    def is_completed(self) -> bool:
        self._looks -= 1
        return self._looks < 0 and super().is_completed()

    def wait(self) -> bytes:
        payload = super().wait()
        return bytes(corrupted(payload)) if any(fault.kind == "corrupt" for fault in self._faults) else payload


def install() -> None:
    """Has this process make its broadcasts so."""
    exchange.PayloadBroadcast = FaultyBroadcast

"""How long a rank that ends waits for its courier."""

import os
import socket
import threading

import pytest

from kfdist.links.rank import pump as module
from kfdist.links.rank.pump import Mailbox, Pump, RemoteOptions
from kfdist.links.socket_messages import MAX_MESSAGE_BYTES, CourierSetup
from kfdist.types import InForce
from tests.support.jobs import context


class DeafCourier:
    """Takes everything and never ends by itself; `patience` is how long its end was waited for at first."""

    pid, greeted, beats = 1, True, 0

    def __init__(self, *arguments: object) -> None:
        del arguments
        self.channel, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.setblocking(False)
        self.exit_descriptor = os.eventfd(0)
        self.patience: list[float] = []

    def end(self, seconds: float = 0.0) -> int:
        self.patience.append(seconds)
        self.channel.close()
        self.peer.close()
        return 0


@pytest.mark.parametrize(("phase", "brief"), [("stopped", True), ("finished", False)])
def test_a_rank_that_was_asked_to_stop_does_not_wait_long_for_a_controller_that_hangs(
    monkeypatch: pytest.MonkeyPatch, phase: str, brief: bool
):
    couriers: list[DeafCourier] = []
    monkeypatch.setattr(module, "CourierProcess", lambda *told: couriers.append(DeafCourier()) or couriers[-1])
    mailbox = Mailbox.open()
    setup = CourierSetup(address="127.0.0.1:9", rank_pid=os.getpid(), context=context(), credentials=None)
    pump = Pump(mailbox, setup, RemoteOptions())
    huge = InForce(fixed={"damping": "x" * MAX_MESSAGE_BYTES})  # is not told, and ends nothing
    mailbox.inbox.extend([(20, "running", ()), huge, (20, phase, ()), None])
    thread = threading.Thread(target=pump.run)
    thread.start()
    thread.join()
    assert pump.fault is None
    assert (couriers[0].patience[0] <= 1.5) == brief
    mailbox.close()

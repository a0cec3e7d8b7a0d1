"""Broadcasts that look slow or arrive damaged; for ranks that are their own processes (see `tests.support.ranks`)."""

import random

from kfdist.comm.broadcast import PayloadBroadcast


def slow_broadcasts(*, seed: int, longest_polls: int) -> None:
    """Makes this process see its payloads arrive only after a random number of looks at each."""
    numbers = random.Random(seed)
    looks: dict[int, int] = {}
    is_completed = PayloadBroadcast.is_completed

    def late(self: PayloadBroadcast) -> bool:
        left = looks.setdefault(id(self), numbers.randint(0, longest_polls))
        looks[id(self)] = left - 1
        if left > 0 or not is_completed(self):
            return False
        del looks[id(self)]
        return True

    PayloadBroadcast.is_completed = late


def damage_broadcasts(*, numbers: range) -> None:
    """Flips a byte of some of the payloads that this process receives, counted from 0."""
    received = 0
    wait = PayloadBroadcast.wait

    def damaged(self: PayloadBroadcast) -> bytes:
        nonlocal received
        payload = wait(self)
        if received in numbers:
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        received += 1
        return payload

    PayloadBroadcast.wait = damaged

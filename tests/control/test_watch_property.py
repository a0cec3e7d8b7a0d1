"""Watching a run while everything breaks off at random: the reader sees each revision once, in order, none missing."""

import random
import threading
import time
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient, RunView
from tests.support.controller import Member, address_of_its_own
from tests.support.killed_controllers import KilledController
from tests.support.waits import eventually

MUTATIONS = 60


class Reader(threading.Thread):
    """Watches a run from the last revision it has seen, again and again, until it has seen the wanted one.

    Its stream is broken off by the test at any moment; it knows nothing but what has reached it.
    """

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.seen: list[RunView] = []
        self.last = 2**62
        self.streams = 0
        self._address = address
        self._is_broken_off = False

    def run(self) -> None:
        while not self.seen or self.seen[-1].revision < self.last:
            self.streams += 1
            self._is_broken_off = False
            with ControlClient(self._address) as client:
                for view in client.watch("r", from_revision=self.seen[-1].revision if self.seen else 0):
                    self.seen.append(view)
                    if self._is_broken_off or view.revision >= self.last:
                        break

    def break_off(self) -> None:
        """Has it drop its stream after the next change that reaches it."""
        self._is_broken_off = True


def mutate(draw: random.Random, client: ControlClient, member: Member, step: int) -> RunView | None:
    """Changes the run in some way; returns what was answered, None for a beat, which answers no run."""
    match draw.randrange(6):
        case 0:
            return client.pause("r")
        case 1:
            return client.resume("r")
        case 2:
            return client.update_settings("r", damping=draw.uniform(0.01, 1.0))
        case 3:
            return client.refresh("r")
        case 4:
            member.beat_worker("r", step=step)
            return None
        case _:
            return client.checkpoint("r")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_no_gap_and_no_repetition_whatever_breaks_off(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    controller = KilledController(tmp_path, address_of_its_own())
    controller.start()
    with ControlClient(controller.address) as client:
        answered = [client.create("r")]
    readers = [Reader(controller.address) for _ in range(3)]
    for reader in readers:
        reader.start()
    eventually(lambda: [len(reader.seen) for reader in readers], lambda counts: 0 not in counts)
    kills = sorted(draw.sample(range(1, MUTATIONS), 3))
    for first, end in zip([0, *kills], [*kills, MUTATIONS], strict=True):
        if first:
            controller.kill()
            controller.start()
        with Member(controller.address) as member, ControlClient(controller.address) as client:
            member.register_worker("r")
            for step in range(first, end):
                run = mutate(draw, client, member, step)
                answered += [run] if run is not None else []
                for reader in readers:
                    if draw.random() < 0.2:
                        reader.break_off()
                if draw.random() < 0.3:
                    time.sleep(draw.uniform(0, 0.02))
            last = client.checkpoint("r").revision
    for reader in readers:
        reader.last = last
    eventually(lambda: [reader.seen[-1].revision for reader in readers], lambda seen: seen == [last] * 3, seconds=60)
    for reader in readers:
        revisions = [run.revision for run in reader.seen]
        assert revisions == list(range(revisions[0], last + 1))
        assert reader.streams > 1
        told = {run.revision: run for run in reader.seen}
        assert all(told[run.revision] == run for run in answered if run.revision > revisions[0]), "as callers were told"
    controller.kill()

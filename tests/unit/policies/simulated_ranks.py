"""Ranks that run the adoption protocol without processes: real ledgers and tables, messages in a test's hands.

A rank goes through a step in three moves, each at its own pace: it completes the last table and offers headers, it
enters broadcasts, it adopts and starts the next table. As in the real thing, a table or a round is complete once every
rank has given its columns, and not before; everything else (results, payloads) may come at any time, in any order.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from kfdist.policies.adoption import AdoptionLedger, AgreedTable, decode_table, encode_table

NOTHING = -1

Broadcast = tuple[int, int]
"""(group, serial number)."""


@dataclass
class SimulatedRank:
    """One rank's own knowledge; `World` holds what passes between ranks."""

    number: int
    ledger: AdoptionLedger
    step: int = 0
    move: int = 0
    table: AgreedTable | None = None
    to_adopt: dict[int, int] = field(default_factory=dict)
    entering: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    open: dict[Broadcast, int] = field(default_factory=dict)
    held: set[Broadcast] = field(default_factory=set)


class World:
    """All ranks, what travels between them, and what has happened."""

    def __init__(self, ranks: int, groups: int) -> None:
        self.groups = groups
        self.ranks = [SimulatedRank(number, AdoptionLedger(groups)) for number in range(ranks)]
        self.tables: dict[int, list[list[int] | None]] = defaultdict(lambda: [None] * ranks)
        self.rounds: dict[tuple[int, int], list[list[int] | None]] = defaultdict(lambda: [None] * ranks)
        self.slots: list[set[int]] = [set() for _ in range(groups)]
        self.produced: list[set[int]] = [set() for _ in range(groups)]
        self.waits: dict[int, set[int]] = defaultdict(set)
        self.decisions: dict[tuple[int, str], object] = {}
        self.adoptions: dict[tuple[int, int], int] = {}
        self.good: dict[Broadcast, set[int]] = defaultdict(set)

    def courier(self, group: int) -> int:
        return group % len(self.ranks)

    # What the outside does -------------------------------------------------------------------------------------------

    def produce(self, group: int) -> None:
        """An owner finishes a newer version; the courier rank freezes and announces it."""
        version = max(self.produced[group], default=NOTHING) + 1
        self.produced[group].add(version)
        self.slots[group].add(version)
        self.ranks[self.courier(group)].ledger.announce(group, version)

    def travelling(self) -> list[tuple[int, Broadcast]]:
        """What has been sent and not been received: (rank, broadcast)."""
        return [(rank.number, key) for rank in self.ranks for key in sorted(rank.open) if key not in rank.held]

    def deliver(self, number: int, key: Broadcast, *, damaged: bool) -> None:
        """A payload arrives at a rank, whole or not; the rank checks its digest."""
        rank, (group, serial) = self.ranks[number], key
        rank.held.add(key)
        assert rank.ledger.serial[group] == serial, "a broadcast was forgotten while its payload travelled"
        if damaged:
            rank.ledger.reject(group)
        else:
            self.good[key].add(number)
            rank.ledger.receive(group)

    # What a rank does ----------------------------------------------------------------------------------------------

    def advance(self, number: int) -> bool:
        """Lets a rank make its next move; False if it has to wait for the others."""
        rank = self.ranks[number]
        moved = (self._complete, self._enter, self._adopt)[rank.move](rank)
        if moved:
            rank.move = (rank.move + 1) % 3
        return moved

    def _complete(self, rank: SimulatedRank) -> bool:
        if rank.step > 0:
            columns = self.tables[rank.step - 1]
            if any(each is None for each in columns):
                return False
            rank.table = decode_table(_maximum(columns), self.groups)
            self._agrees(rank.step, "table", rank.table)
            rank.to_adopt = {group: rank.ledger.entered[group] for group in rank.ledger.swaps(rank.table)}
            for group in rank.ledger.give_ups(rank.table):
                self._abandon(rank, group)
            rank.entering = rank.ledger.entries(rank.table)
        self._agrees(rank.step, "adopts", dict(rank.to_adopt))
        self._agrees(rank.step, "enters", list(rank.entering))
        self.rounds[rank.step, 0][rank.number] = self._headers(rank, rank.entering)
        return True

    def _enter(self, rank: SimulatedRank) -> bool:
        columns = self.rounds[rank.step, 0]
        if any(each is None for each in columns):
            return False
        for group, version in zip(rank.entering, _maximum(columns), strict=True):
            assert version != NOTHING, "a version was announced and is not in its slot"
            rank.ledger.enter(group, version)
            rank.open[group, rank.ledger.serial[group]] = version
            if rank.number == self.courier(group):
                assert version in self.slots[group], "a slot was freed before everyone had it"
        rank.waiting = sorted(self.waits[rank.step] - rank.to_adopt.keys())
        for group in rank.waiting:
            if rank.ledger.in_flight(group):
                self._abandon(rank, group)
        self.rounds[rank.step, 1][rank.number] = self._headers(rank, rank.waiting)
        return True

    def _adopt(self, rank: SimulatedRank) -> bool:
        columns = self.rounds[rank.step, 1]
        if any(each is None for each in columns):
            return False
        awaited = {
            group: version
            for group, version in zip(rank.waiting, _maximum(columns), strict=True)
            if version > rank.ledger.adopted[group]
        }
        for group, version in sorted({**rank.to_adopt, **awaited}.items()):
            self._check_adoption(rank, group, version, awaited=group in awaited)
            rank.ledger.adopt(group, version)
            for key in [key for key in rank.open if key[0] == group]:
                del rank.open[key]
            if rank.number == self.courier(group):
                self.slots[group] = {slot for slot in self.slots[group] if slot > version}
        rank.to_adopt, rank.entering, rank.waiting = {}, [], []
        self.tables[rank.step][rank.number] = encode_table(
            rank.ledger, revision=rank.step if rank.number == 0 else None, stop=False
        )
        rank.step += 1
        return True

    def _headers(self, rank: SimulatedRank, groups: list[int]) -> list[int]:
        return [
            max(self.slots[group], default=NOTHING) if self.courier(group) == rank.number else NOTHING
            for group in groups
        ]

    def _abandon(self, rank: SimulatedRank, group: int) -> None:
        """Waits for the payload, as the real thing does, and forgets it."""
        del rank.open[group, rank.ledger.serial[group]]
        rank.ledger.give_up(group)

    # What must hold --------------------------------------------------------------------------------------------------

    def _agrees(self, step: int, what: str, decision: object) -> None:
        """Every rank decides the same at a step, however much later it gets there."""
        assert self.decisions.setdefault((step, what), decision) == decision, f"step {step}: {what}"

    def _check_adoption(self, rank: SimulatedRank, group: int, version: int, *, awaited: bool) -> None:
        assert version > rank.ledger.adopted[group], "a version went back"
        assert version in self.produced[group], "a version was adopted that no owner produced"
        assert self.adoptions.setdefault((rank.step, group), version) == version, "ranks adopted different versions"
        if not awaited:
            key = (group, rank.ledger.serial[group])
            assert rank.open[key] == version
            assert self.good[key] == set(range(len(self.ranks))), "a version was adopted that some rank lacks"


def _maximum(columns: list[list[int] | None]) -> list[int]:
    return [max(values) for values in zip(*(each for each in columns if each is not None), strict=True)]

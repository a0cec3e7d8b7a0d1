"""Ranks that run the adoption protocol without processes: real tracks and tables, messages in a test's hands.

A rank goes through a step in three moves, each at its own pace: it completes the last table and offers headers, it
enters broadcasts, it adopts and starts the next table. As in the real thing, a table or a round is complete once every
rank has given its columns, and not before; everything else (results, payloads) may come at any time, in any order.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from kfdist.comm.background import Header, PayloadBroadcast
from kfdist.curvature.inverters import make_inverter
from kfdist.policies.adoption import AgreedTable, decode_table, encode_table
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.track import Track
from kfdist.types import GroupSpec, JobResult

NOTHING = -1

Broadcast = tuple[int, int]
"""(group, serial number)."""


@dataclass
class SimulatedRank:
    """One rank's own knowledge; `World` holds what passes between ranks."""

    number: int
    tracks: list[Track]
    step: int = 0
    move: int = 0
    table: AgreedTable | None = None
    to_adopt: dict[int, int] = field(default_factory=dict)
    entering: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)

    def open(self) -> dict[Broadcast, PayloadBroadcast]:
        """The broadcasts under way."""
        flights = [(track.group.index, track.ledger.serial, track.flight) for track in self.tracks]
        return {(group, serial): flight for group, serial, flight in flights if flight is not None}


class Nowhere(PayloadBroadcast):
    """A broadcast whose payload a test delivers."""

    def __init__(self, version: int) -> None:
        self.header = Header(version, 0, "")
        self.payload = None


class World:
    """All ranks, what travels between them, and what has happened."""

    def __init__(self, ranks: int, groups: int) -> None:
        self.groups = groups
        self.ranks = [SimulatedRank(number, make_tracks(groups, ranks)) for number in range(ranks)]
        self.tables: dict[int, list[list[int] | None]] = defaultdict(lambda: [None] * ranks)
        self.rounds: dict[tuple[int, int], list[list[int] | None]] = defaultdict(lambda: [None] * ranks)
        self.produced: list[set[int]] = [set() for _ in range(groups)]
        self.waits: dict[int, set[int]] = defaultdict(set)
        self.decisions: dict[tuple[int, str], object] = {}
        self.adoptions: dict[tuple[int, int], int] = {}
        self.good: dict[Broadcast, set[int]] = defaultdict(set)

    def courier(self, group: int) -> Track:
        """The group's track on its courier rank."""
        return self.ranks[group % len(self.ranks)].tracks[group]

    # What the outside does -------------------------------------------------------------------------------------------

    def produce(self, group: int) -> None:
        """An owner finishes a newer version; the courier rank freezes and announces it."""
        version = max(self.produced[group], default=NOTHING) + 1
        self.produced[group].add(version)
        track = self.courier(group)
        track.jobs.put(JobResult(group=track.group.name, version=version, payload=b"", seconds=0.0, owner="x"))
        track.ledger.announce(version)

    def travelling(self) -> list[tuple[int, Broadcast]]:
        """What has been sent and not been received: (rank, broadcast)."""
        return [
            (rank.number, key)
            for rank in self.ranks
            for key, flight in sorted(rank.open().items(), key=lambda item: item[0])
            if flight.payload is None
        ]

    def deliver(self, number: int, key: Broadcast, *, damaged: bool) -> None:
        """A payload arrives at a rank, whole or not; the rank checks its digest."""
        track = self.ranks[number].tracks[key[0]]
        assert track.flight is not None, "a broadcast was forgotten while its payload travelled"
        assert track.ledger.serial == key[1], "a broadcast was forgotten while its payload travelled"
        track.flight.payload = b""
        if damaged:
            track.ledger.reject()
        else:
            self.good[key].add(number)
            track.ledger.receive()

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
            rank.table = decode_table(_maximum(columns))
            self._agrees(rank.step, "table", rank.table)
            both = list(enumerate(zip(rank.tracks, rank.table.groups, strict=True)))
            rank.to_adopt = {
                group: track.ledger.entered for group, (track, agreed) in both if track.ledger.swaps(agreed)
            }
            for track, agreed in (pair for _, pair in both):
                if track.ledger.gives_up(agreed):
                    track.abandon()
            rank.entering = [group for group, (track, agreed) in both if track.ledger.enters(agreed)]
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
            track = rank.tracks[group]
            track.ledger.enter(version)
            track.flight = Nowhere(version)
            if track is self.courier(group):
                assert version in track.jobs.results, "a slot was freed before everyone had it"
        rank.waiting = sorted(self.waits[rank.step] - rank.to_adopt.keys())
        for group in rank.waiting:
            rank.tracks[group].abandon()
        self.rounds[rank.step, 1][rank.number] = self._headers(rank, rank.waiting)
        return True

    def _adopt(self, rank: SimulatedRank) -> bool:
        columns = self.rounds[rank.step, 1]
        if any(each is None for each in columns):
            return False
        awaited = {
            group: version
            for group, version in zip(rank.waiting, _maximum(columns), strict=True)
            if version > rank.tracks[group].ledger.adopted
        }
        for group, version in sorted({**rank.to_adopt, **awaited}.items()):
            self._check_adoption(rank, group, version, awaited=group in awaited)
            rank.tracks[group].adopt(version)
        rank.to_adopt, rank.entering, rank.waiting = {}, [], []
        self.tables[rank.step][rank.number] = encode_table(
            [track.ledger for track in rank.tracks], revision=rank.step if rank.number == 0 else None, stop=False
        )
        rank.step += 1
        return True

    def _headers(self, rank: SimulatedRank, groups: list[int]) -> list[int]:
        return [max(rank.tracks[group].jobs.results, default=NOTHING) for group in groups]

    # What must hold --------------------------------------------------------------------------------------------------

    def _agrees(self, step: int, what: str, decision: object) -> None:
        """Every rank decides the same at a step, however much later it gets there."""
        assert self.decisions.setdefault((step, what), decision) == decision, f"step {step}: {what}"

    def _check_adoption(self, rank: SimulatedRank, group: int, version: int, *, awaited: bool) -> None:
        track = rank.tracks[group]
        assert version > track.ledger.adopted, "a version went back"
        assert version in self.produced[group], "a version was adopted that no owner produced"
        assert self.adoptions.setdefault((rank.step, group), version) == version, "ranks adopted different versions"
        if not awaited:
            key = (group, track.ledger.serial)
            assert track.flight is not None and track.flight.header.version == version
            assert self.good[key] == set(range(len(self.ranks))), "a version was adopted that some rank lacks"


def make_tracks(groups: int, ranks: int) -> list[Track]:
    """Makes a rank's tracks of groups without blocks; their courier ranks take turns."""
    inverter = make_inverter("kfac")
    return [
        Track.of(
            BlockGroup(
                index=index,
                name=str(index),
                blocks=(),
                inverter=inverter,
                needs={},
                courier_rank=index % ranks,
                spec=GroupSpec(name=str(index), cost=1.0, position=index, bytes=1),
            ),
            queued=False,
        )
        for index in range(groups)
    ]


def _maximum(columns: list[list[int] | None]) -> list[int]:
    return [max(values) for values in zip(*(each for each in columns if each is not None), strict=True)]

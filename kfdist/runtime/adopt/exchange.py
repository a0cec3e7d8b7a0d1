"""Brings results from courier ranks to all ranks: agreed headers, payloads in the background, verified by digest."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kfdist.comm.background import HEADER_COLUMNS, NO_HEADER, Header, PayloadBroadcast
from kfdist.comm.communicator import Communicator
from kfdist.errors import EnvironmentFault, KfdistError
from kfdist.policies.adoption import AgreedTable
from kfdist.runtime.adopt.agreement import WAITING_ROUND_SECONDS, Agreement
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.track import Track
from kfdist.types import JobResult

_MOST_ATTEMPTS = 3


class Arrival(NamedTuple):
    """A result that every rank holds, verified."""

    version: int
    payload: bytes


@dataclass
class SnapshotExchange:
    """The broadcast of snapshots. All ranks make the same calls in the same order, from their main threads.

    Attributes:
        tracks: All groups.
        communicator: Carries the payloads.
        book: Brings results to this rank.
        agreement: Carries the rounds.
        counters: Counts what was sent again, and the seconds of waits.
        wait_limit_seconds: Longest agreed wait.
        bytes_sent: Payload bytes this rank broadcast.
    """

    tracks: Sequence[Track]
    communicator: Communicator
    book: JobBook
    agreement: Agreement
    counters: PipelineCounters
    wait_limit_seconds: float
    bytes_sent: int = field(default=0, init=False)
    _travelling: list[Track] = field(init=False)

    def __post_init__(self) -> None:
        self._travelling = [track for track in self.tracks if not track.group.own]

    # asap: headers when the table says so, payloads in the background -----------------------------------------------

    def received_by_all(self, table: AgreedTable) -> dict[int, Arrival]:
        """Returns, by group, the broadcasts that every rank holds, as the agreed table shows."""
        arrived = {}
        for track, agreed in zip(self._travelling, table.groups, strict=True):
            if track.ledger.swaps(agreed):
                assert track.flight is not None and track.flight.payload is not None, "all ranks have it, so this one"
                arrived[track.group.index] = Arrival(track.flight.header.version, track.flight.payload)
        return arrived

    def enter(self, table: AgreedTable) -> None:
        """All ranks enter the broadcasts that the agreed table calls for.

        Raises:
            EnvironmentFault: A group's snapshots keep reaching some rank damaged; on all ranks alike.
        """
        both = list(zip(self._travelling, table.groups, strict=True))
        self._give_up([track for track, agreed in both if track.ledger.gives_up(agreed)])
        entered = [track for track, agreed in both if track.ledger.enters(agreed)]
        if not entered:
            return
        own = [self._own_header(track, track.jobs.newest) for track in entered]
        columns = self.agreement.agree([column for header in own for column in header])
        for track, header in zip(entered, _read_headers(columns), strict=True):
            if header is None:
                raise KfdistError(
                    f"group {track.group.name!r} was announced but its courier rank {track.group.courier_rank} no "
                    "longer holds a result"
                )
            track.ledger.enter(header.version)
            track.flight = self._broadcast(track, header)

    def poll(self) -> None:
        """Notes, without blocking, which payloads have arrived at this rank whole."""
        for track in self.tracks:
            if track.flight is not None and track.flight.payload is None and track.flight.is_completed():
                _receive(track, track.flight)

    def finish(self) -> None:
        """Completes every broadcast under way on this rank; `close` needs quiet groups."""
        for track in self.tracks:
            if track.flight is not None and track.flight.payload is None:
                _receive(track, track.flight)

    def abandon(self, track: Track) -> None:
        """All ranks forget the group's broadcast under way; its result stays with the courier rank."""
        if track.flight is not None:
            track.flight.wait()
        track.abandon()

    def _give_up(self, tracks: Sequence[Track]) -> None:
        """Drops broadcasts that reached some rank with a wrong digest; they are entered again."""
        for track in tracks:
            self.abandon(track)
            track.rejections += 1
            self.counters.resent += 1
        self._check_attempts([track for track in tracks if track.rejections >= _MOST_ATTEMPTS])

    # fixed-lag, first step, hard bound: agreed waits ---------------------------------------------------------------

    def await_results(self, step: int, wanted: Mapping[int, int], *, exact: bool) -> dict[int, Arrival]:
        """Waits, in agreed rounds, until every wanted result is on all ranks, verified.

        Args:
            step: The step that waits, for the controller.
            wanted: Version by group; equal on all ranks.
            exact: Whether only that version will do (fixed-lag), or any from it on (asap).

        Returns:
            What arrived, by group; equal on all ranks.

        Raises:
            Interrupted: A stop was asked for, or the wait limit passed; on all ranks in the same round.
        """
        begun, told = time.monotonic(), False
        missing = dict(wanted)
        arrived: dict[int, Arrival] = {}
        while missing:
            self.book.collect()
            held = {group: _wanted(self.tracks[group], version, exact=exact) for group, version in missing.items()}
            own = [self._own_header(self.tracks[group], result) for group, result in held.items()]
            waited = time.monotonic() - begun
            columns = self.agreement.round(
                [column for header in own for column in header], expired=waited > self.wait_limit_seconds
            )
            if paused := self.agreement.wait_while_paused(step):
                begun, told = begun + paused, False
            headers = dict(zip(missing, _read_headers(columns), strict=True))
            ready = {group: header for group, header in headers.items() if header is not None}
            arrived |= self._transfer(ready)
            missing = {group: version for group, version in missing.items() if group not in arrived}
            if missing and waited > WAITING_ROUND_SECONDS and not told:
                self.agreement.tell(step, "waiting")
                told = True
            if any(self._is_mine(self.tracks[group]) and held[group] is None for group in missing):
                self.book.wait(WAITING_ROUND_SECONDS)
        if told:
            self.agreement.tell(step, "running")
        self.counters.waited_seconds += time.monotonic() - begun
        return arrived

    def _transfer(self, headers: Mapping[int, Header]) -> dict[int, Arrival]:
        """Broadcasts payloads and waits; repeated while some rank's digest differs, which no rank may then use."""
        remaining = dict(headers)
        arrived: dict[int, Arrival] = {}
        for _ in range(_MOST_ATTEMPTS):
            if not remaining:
                return arrived
            broadcasts = {group: self._broadcast(self.tracks[group], header) for group, header in remaining.items()}
            wrong = [int(not broadcast.receive()) for broadcast in broadcasts.values()]
            for (group, broadcast), is_wrong in zip(broadcasts.items(), self.agreement.agree(wrong), strict=True):
                if is_wrong:
                    self.counters.resent += 1
                else:
                    assert broadcast.payload is not None
                    arrived[group] = Arrival(broadcast.header.version, broadcast.payload)
                    del remaining[group]
        self._check_attempts([self.tracks[group] for group in remaining])
        return arrived

    # shared --------------------------------------------------------------------------------------------------------

    def _is_mine(self, track: Track) -> bool:
        return track.group.courier_rank == self.communicator.rank

    def _own_header(self, track: Track, result: JobResult | None) -> list[int]:
        alone = self.communicator.world_size == 1
        return Header.of(result, alone=alone).columns() if self._is_mine(track) and result is not None else NO_HEADER

    def _broadcast(self, track: Track, header: Header) -> PayloadBroadcast:
        payload = None
        if self._is_mine(track):
            result = track.jobs.results.get(header.version)
            if result is None:
                raise KfdistError(f"version {header.version} of {track.group.name!r} left its slot too early")
            payload = result.payload
            self.bytes_sent += len(payload)
        return PayloadBroadcast(self.communicator, header, source=track.group.courier_rank, payload=payload)

    def _check_attempts(self, damaged: Collection[Track]) -> None:
        if damaged:
            names = ", ".join(repr(track.group.name) for track in damaged)
            raise EnvironmentFault(
                f"the snapshots of {names} reached some rank with a wrong SHA-256 {_MOST_ATTEMPTS} times in a row; "
                "check the network and the memory of the ranks' machines"
            )


def _receive(track: Track, flight: PayloadBroadcast) -> None:
    """Takes in a payload and notes whether it is whole."""
    if flight.receive():
        track.ledger.receive()
    else:
        track.ledger.reject()


def _wanted(track: Track, version: int, *, exact: bool) -> JobResult | None:
    if exact:
        return track.jobs.results.get(version)
    newest = track.jobs.newest
    return newest if newest is not None and newest.version >= version else None


def _read_headers(columns: Sequence[int]) -> list[Header | None]:
    return [Header.read(columns[i : i + HEADER_COLUMNS]) for i in range(0, len(columns), HEADER_COLUMNS)]

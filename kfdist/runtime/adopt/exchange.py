"""Brings results from courier ranks to all ranks: agreed headers, payloads in the background, verified by digest."""

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kfdist.comm.broadcast import PayloadBroadcast
from kfdist.comm.communicator import Communicator
from kfdist.errors import EnvironmentFault, KfdistError
from kfdist.policies.adoption import AdoptionLedger, AgreedTable
from kfdist.runtime.adopt.agreement import WAITING_ROUND_SECONDS, Agreement
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import JobResult

_DIGEST_WORDS = 8
_HEADER_COLUMNS = 2 + _DIGEST_WORDS
_NO_HEADER = [-1] * _HEADER_COLUMNS
_MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Header:
    """What all ranks know of a payload before it travels: its version, size and SHA-256."""

    version: int
    size: int
    digest: str

    @classmethod
    def of(cls, result: JobResult) -> "Header":
        """Describes a frozen result."""
        return cls(result.version, len(result.payload), result.digest)

    def columns(self) -> list[int]:
        """Lays it out as non-negative int64 columns, so that a maximum with -1 leaves it alone."""
        words = [int(self.digest[8 * i : 8 * i + 8], 16) for i in range(_DIGEST_WORDS)]
        return [self.version, self.size, *words]

    @classmethod
    def read(cls, columns: Sequence[int]) -> "Header | None":
        """Reads it back; None where nobody had one (WAIT)."""
        if columns[0] < 0:
            return None
        return cls(columns[0], columns[1], "".join(f"{word:08x}" for word in columns[2:]))


class SnapshotExchange:
    """The broadcast of snapshots. All ranks make the same calls in the same order, from their main threads.

    Args:
        groups: All groups, in model order.
        communicator: Carries the payloads.
        ledger: This rank's view of the protocol.
        book: This rank's frozen results.
        agreement: Carries the rounds.
        wait_limit_seconds: Longest agreed wait.

    Attributes:
        bytes_sent: Payload bytes this rank broadcast.
        resent: Broadcasts that reached some rank with a wrong digest and were made again; the same on all ranks.
        waited_seconds: Spent in agreed waits; the pipeline sets it to zero at each step.
    """

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        communicator: Communicator,
        ledger: AdoptionLedger,
        book: JobBook,
        agreement: Agreement,
        wait_limit_seconds: float,
    ) -> None:
        self._groups = groups
        self._communicator = communicator
        self._ledger = ledger
        self._book = book
        self._agreement = agreement
        self._wait_limit_seconds = wait_limit_seconds
        self._travelling: dict[int, tuple[Header, PayloadBroadcast]] = {}
        self._arrived: dict[int, bytes] = {}
        self._rejections: dict[int, int] = {}
        self.bytes_sent = 0
        self.resent = 0
        self.waited_seconds = 0.0

    # asap: headers when the table says so, payloads in the background -----------------------------------------------

    def received_by_all(self, table: AgreedTable) -> dict[int, tuple[int, bytes]]:
        """Returns (version, payload) by group of the broadcasts that every rank holds, as the agreed table shows."""
        return {group: (self._ledger.entered[group], self._arrived[group]) for group in self._ledger.swaps(table)}

    def enter(self, table: AgreedTable) -> None:
        """All ranks enter the broadcasts that the agreed table calls for.

        Raises:
            EnvironmentFault: A group's snapshots keep reaching some rank damaged; on all ranks alike.
        """
        self._give_up(self._ledger.give_ups(table))
        entered = self._ledger.entries(table)
        if not entered:
            return
        own = [self._own_header(group, self._book.newest(self._groups[group].name)) for group in entered]
        columns = self._agreement.agree([column for header in own for column in header])
        for group, header in zip(entered, _read_headers(columns), strict=True):
            if header is None:
                raise KfdistError(
                    f"group {self._groups[group].name!r} was announced but its courier rank "
                    f"{self._groups[group].courier_rank} no longer holds a result"
                )
            self._ledger.enter(group, header.version)
            self._travelling[group] = (header, self._broadcast(group, header))

    def poll(self) -> None:
        """Notes, without blocking, which payloads have arrived at this rank whole."""
        for group, (header, broadcast) in self._travelling.items():
            if group not in self._arrived and broadcast.is_completed():
                self._receive(group, header, broadcast)

    def finish(self) -> None:
        """Completes every broadcast in flight on this rank; `close` needs quiet groups."""
        for group, (header, broadcast) in self._travelling.items():
            if group not in self._arrived:
                self._receive(group, header, broadcast)

    def abandon(self, group: int) -> None:
        """All ranks forget the group's running broadcast; its result stays with the courier rank."""
        _, broadcast = self._travelling.pop(group)
        broadcast.wait()
        self._arrived.pop(group, None)
        self._ledger.give_up(group)

    def adopt(self, group: int, version: int) -> None:
        """All ranks take a version into use: forgets its broadcast and frees its slot and the older ones."""
        self._ledger.adopt(group, version)
        self._travelling.pop(group, None)
        self._arrived.pop(group, None)
        self._rejections.pop(group, None)
        self._book.release(self._groups[group].name, version)

    def _give_up(self, groups: Sequence[int]) -> None:
        """Drops broadcasts that reached some rank with a wrong digest; they are entered again."""
        for group in groups:
            self.abandon(group)
            self._rejections[group] = self._rejections.get(group, 0) + 1
            self.resent += 1
        self._check_attempts([group for group in groups if self._rejections[group] >= _MOST_ATTEMPTS])

    # fixed-lag, first step, hard bound: agreed waits ---------------------------------------------------------------

    def await_results(self, step: int, wanted: Mapping[int, int], *, exact: bool) -> dict[int, tuple[int, bytes]]:
        """Waits, in agreed rounds, until every wanted result is on all ranks, verified.

        Args:
            step: The step that waits, for the controller.
            wanted: Version by group; equal on all ranks.
            exact: Whether only that version will do (fixed-lag), or any from it on (asap).

        Returns:
            (version, payload) by group, equal on all ranks.

        Raises:
            Interrupted: A stop was asked for, or the wait limit passed; on all ranks in the same round.
        """
        begun, told = time.monotonic(), False
        missing = dict(wanted)
        arrived: dict[int, tuple[int, bytes]] = {}
        while missing:
            self._book.collect()
            own = [self._own_header(g, self._wanted(g, version, exact=exact)) for g, version in missing.items()]
            waited = time.monotonic() - begun
            columns = self._agreement.round(
                [column for header in own for column in header], expired=waited > self._wait_limit_seconds
            )
            headers = dict(zip(missing, _read_headers(columns), strict=True))
            ready = {group: header for group, header in headers.items() if header is not None}
            for group, payload in self._transfer(ready).items():
                arrived[group] = (ready[group].version, payload)
                del missing[group]
            if missing and waited > WAITING_ROUND_SECONDS and not told:
                self._agreement.tell(step, "waiting")
                told = True
            if missing and self._lacks_own(missing, exact=exact):
                self._book.wait(WAITING_ROUND_SECONDS)
        if told:
            self._agreement.tell(step, "running")
        self.waited_seconds += time.monotonic() - begun
        return arrived

    def _transfer(self, headers: Mapping[int, Header]) -> dict[int, bytes]:
        """Broadcasts payloads and waits; repeated while some rank's digest differs, which no rank may then use."""
        remaining = dict(headers)
        arrived: dict[int, bytes] = {}
        for _ in range(_MOST_ATTEMPTS):
            if not remaining:
                return arrived
            broadcasts = {group: self._broadcast(group, header) for group, header in remaining.items()}
            payloads = {group: broadcast.wait() for group, broadcast in broadcasts.items()}
            wrong = [int(_sha256(payloads[group]) != header.digest) for group, header in remaining.items()]
            for group, is_wrong in zip(list(remaining), self._agreement.agree(wrong), strict=True):
                if is_wrong:
                    self.resent += 1
                else:
                    arrived[group] = payloads[group]
                    del remaining[group]
        self._check_attempts(remaining)
        return arrived

    # shared --------------------------------------------------------------------------------------------------------

    def _wanted(self, group: int, version: int, *, exact: bool) -> JobResult | None:
        name = self._groups[group].name
        if exact:
            return self._book.result(name, version)
        newest = self._book.newest(name)
        return newest if newest is not None and newest.version >= version else None

    def _lacks_own(self, missing: Mapping[int, int], *, exact: bool) -> bool:
        """Whether this rank is the courier rank of something missing, and so waits before the next round."""
        return any(
            self._groups[group].courier_rank == self._communicator.rank
            and self._wanted(group, version, exact=exact) is None
            for group, version in missing.items()
        )

    def _own_header(self, group: int, result: JobResult | None) -> list[int]:
        mine = self._groups[group].courier_rank == self._communicator.rank
        return Header.of(result).columns() if mine and result is not None else _NO_HEADER

    def _broadcast(self, group: int, header: Header) -> PayloadBroadcast:
        source = self._groups[group].courier_rank
        payload = None
        if source == self._communicator.rank:
            result = self._book.result(self._groups[group].name, header.version)
            if result is None:
                raise KfdistError(f"version {header.version} of {self._groups[group].name!r} left its slot too early")
            payload = result.payload
            self.bytes_sent += len(payload)
        return PayloadBroadcast(self._communicator, payload, size=header.size, source=source)

    def _receive(self, group: int, header: Header, broadcast: PayloadBroadcast) -> None:
        payload = broadcast.wait()
        self._arrived[group] = payload
        if _sha256(payload) == header.digest:
            self._ledger.receive(group)
        else:
            self._ledger.reject(group)

    def _check_attempts(self, damaged: Collection[int]) -> None:
        if damaged:
            names = ", ".join(repr(self._groups[group].name) for group in damaged)
            raise EnvironmentFault(
                f"the snapshots of {names} reached some rank with a wrong SHA-256 {_MOST_ATTEMPTS} times in a row; "
                "check the network and the memory of the ranks' machines"
            )


def _read_headers(columns: Sequence[int]) -> list[Header | None]:
    step = _HEADER_COLUMNS
    return [Header.read(columns[i : i + step]) for i in range(0, len(columns), step)]


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()

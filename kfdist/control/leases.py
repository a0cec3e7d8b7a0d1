"""Who is alive: leases by the monotonic clock, and what follows when one runs out.

A member is alive while its last message is younger than the lease. Times of messages aren't stored: a restarted
controller gives every member one full lease, and members return through the stream that they open anyway.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kfdist.control.control_records import Change, OwnerRecord, RunRecord
from kfdist.control.exporter import Exporter
from kfdist.control.ledger import Ledger
from kfdist.control.run_rules import silent
from kfdist.control.series import Sender
from kfdist.errors import EnvironmentFault

_LOG = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""How long a member may be silent. Members send a message every one or two seconds."""

FLUSH_SECONDS = 0.5
"""Longest time until steps and counts are committed and shown to watchers."""


@dataclass(frozen=True)
class RankProcess:
    """A process that registers as a rank.

    Attributes:
        pid: Its id where it runs; 0 if it isn't said.
        word: A random word of its own; empty if it isn't said, as by couriers of before.
    """

    pid: int
    word: str = ""

    def is_another(self, process: "RankProcess") -> bool:
        """Tells whether they are surely two: by their words, as containers have ids in common, else by their ids."""
        if self.word and process.word:
            return self.word != process.word
        return 0 not in (self.pid, process.pid) and self.pid != process.pid


@dataclass
class _Crew:
    """The ranks of one start of a run: the time of each one's last message, and its process, also once it has ended."""

    epoch: int
    heard: dict[int, float] = field(default_factory=dict)
    processes: dict[int, RankProcess] = field(default_factory=dict)


class Members:
    """The leases of all ranks and owners. Used from one event loop."""

    def __init__(
        self,
        ledger: Ledger,
        exporter: Exporter,
        *,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Gives every live owner and every run one lease from now.

        Args:
            ledger: Records who is alive and which runs are lost.
            exporter: Learns which ranks send messages and which went silent.
            lease_seconds: How long a member may be silent.
            clock: Seconds that never go back.
        """
        self._ledger = ledger
        self._exporter = exporter
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._swept = clock()
        self._crews: dict[str, _Crew] = {}
        self._runs = {record.name: self._swept for record in ledger.runs()}
        self._owners = {owner.owner_id: self._swept for owner in ledger.live_owners()}
        self._count_retired_owners()

    async def hear_owner(self, owner: OwnerRecord) -> None:
        """Renews an owner's lease; a new, changed or returning owner is dealt groups at once."""
        self._owners[owner.owner_id] = self._clock()
        if self._ledger.owners.get(owner.owner_id) != replace(owner, live=True):
            await self._ledger.put_owners([replace(owner, live=True)])

    def hear_worker(self, run: str, epoch: int, worker_rank: int, process: RankProcess | None = None) -> None:
        """Renews a rank's lease; ranks of an older start are forgotten.

        Args:
            run: The run.
            epoch: Its start.
            worker_rank: The rank.
            process: Its process, where it registers.
        """
        crew = self._crews.get(run)
        if crew is None or crew.epoch < epoch:
            for old_rank in crew.heard if crew else ():
                self._exporter.forget_gauges(run, Sender("worker", str(old_rank)))
            crew = self._crews[run] = _Crew(epoch)
        crew.heard[worker_rank] = self._runs[run] = self._clock()
        if process is not None and (process.pid or process.word):
            crew.processes[worker_rank] = process
        self._exporter.heard(run)
        self._ledger.note(run, live_workers=len(crew.heard))

    def forget_crew(self, run: str) -> None:
        """Forgets the ranks of a start that has ended: others begin one of the same number."""
        crew = self._crews.pop(run, None)
        for worker_rank in crew.heard if crew is not None else ():
            self._exporter.forget_gauges(run, Sender("worker", str(worker_rank)))

    def process_of(self, run: str, epoch: int, worker_rank: int) -> RankProcess | None:
        """Returns which process has registered as a rank of a start; None if none has since the controller began."""
        crew = self._crews.get(run)
        return crew.processes.get(worker_rank) if crew is not None and crew.epoch == epoch else None

    def is_alive(self, run: str, worker_rank: int) -> bool:
        """Tells whether a rank of a run's newest start is within its lease."""
        crew = self._crews.get(run)
        return crew is not None and worker_rank in crew.heard

    def release_worker(self, run: str, worker_rank: int) -> None:
        """Ends the lease of a rank that said that it has ended."""
        self._runs[run] = self._clock()
        self._exporter.release(run, Sender("worker", str(worker_rank)))
        crew = self._crews.get(run)
        if crew is not None:
            crew.heard.pop(worker_rank, None)
            self._ledger.note(run, live_workers=len(crew.heard))

    async def sweep(self) -> None:
        """Acts on leases that have run out, and commits what was noted.

        Raises:
            EnvironmentFault: The ledger can't be written; the next sweep tries again.
        """
        now = self._clock()
        if now - self._swept > self.lease_seconds / 2:
            # The controller itself was stopped or starved, and members' messages from that time are still unread.
            self._renew(now - self._swept)
        self._swept = now
        self._drop_silent_workers(now)
        await self._drop_silent_owners(now)
        self._count_retired_owners()
        for record in self._ledger.runs():
            self._runs.setdefault(record.name, now)
            if self._judge(record, now).events:
                await self._ledger.change(record.name, self._judge_now)
        await self._ledger.flush()

    async def watch_leases(self) -> None:
        """Sweeps until cancelled."""
        period = min(FLUSH_SECONDS, self.lease_seconds / 4)
        while True:
            await asyncio.sleep(period)
            try:
                await self.sweep()
            except EnvironmentFault as fault:  # the disk may have room again later; until then, memory holds the state
                _LOG.error("%s", fault)

    def _expired(self, heard: float, now: float) -> bool:
        return now - heard > self.lease_seconds

    def _renew(self, seconds: float) -> None:
        self._runs = {run: heard + seconds for run, heard in self._runs.items()}
        self._owners = {owner_id: heard + seconds for owner_id, heard in self._owners.items()}
        for crew in self._crews.values():
            crew.heard = {worker_rank: heard + seconds for worker_rank, heard in crew.heard.items()}

    def _drop_silent_workers(self, now: float) -> None:
        for run, crew in self._crews.items():
            silent_ranks = [rank for rank, heard in crew.heard.items() if self._expired(heard, now)]
            for worker_rank in silent_ranks:
                del crew.heard[worker_rank]
                self._exporter.forget_gauges(run, Sender("worker", str(worker_rank)))
            if silent_ranks:
                self._ledger.note(run, live_workers=len(crew.heard))

    async def _drop_silent_owners(self, now: float) -> None:
        silent_owners = [owner_id for owner_id, heard in self._owners.items() if self._expired(heard, now)]
        # One whose registration could not be committed is heard of, and known to nobody.
        known = [self._ledger.owners[each] for each in silent_owners if each in self._ledger.owners]
        await self._ledger.put_owners([replace(owner, live=False) for owner in known])
        for owner_id in silent_owners:
            if self._expired(self._owners[owner_id], now):  # else it returned during the commit
                del self._owners[owner_id]
                self._exporter.forget_owner(owner_id)

    def _count_retired_owners(self) -> None:
        self._exporter.retired(sum(owner.draining and not owner.live for owner in self._ledger.owners.values()))

    def _judge(self, record: RunRecord, now: float) -> Change:
        crew = self._crews.get(record.name)
        if (crew and crew.heard) or not self._expired(self._runs.get(record.name, now), now):
            return Change(record)
        return silent(record, lease_seconds=self.lease_seconds)

    def _judge_now(self, record: RunRecord | None) -> Change:
        assert record is not None  # runs are never removed
        return self._judge(record, self._clock())

"""The controller's memory of runs: changed one transaction at a time, durable before anyone learns of it, watched.

One event loop owns the ledger. A transaction computes new records, commits them in the store's thread, and only then
puts them in place and tells watchers. Small changes (a rank's step, counts of members) are noted and committed with the
next transaction or `flush`. So every revision that anyone has seen survives the controller's end, and the revisions of
a run are consecutive.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from kfdist.checks import suggestion
from kfdist.control import dealing, owner_rules
from kfdist.control.control_records import AssignmentRecord, Change, Event, OwnerRecord, RunRecord
from kfdist.control.dealing import Groups
from kfdist.control.mutations import Request, answer_to, repeated
from kfdist.control.series import KeptCounters
from kfdist.control.steering import replanned
from kfdist.control.store import Batch, EventRecord, RunUpdate, Store
from kfdist.control.watchers import QUEUED_CHANGES, Watchers
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, run_pb2
from kfdist.rpc.status import Refusal
from kfdist.types import GroupName

MAX_RUNS = 1000
"""Runs in one file; a list of them fits in one message."""

Rule = Callable[[RunRecord | None], Change]
"""Maps a run's record, None if there is none, to what becomes of it."""

Result = TypeVar("Result")


class Ledger:
    """Runs, owners and assignments; the module's docstring says how they change."""

    def __init__(
        self, store: Store, *, on_change: Callable[[RunRecord], None], queued_changes: int = QUEUED_CHANGES
    ) -> None:
        """Reads what the store has.

        Args:
            store: The open file; the ledger is its only user from now on, and closes it.
            on_change: Called with every stored record at once, then with every new one.
            queued_changes: How many changes a watch may leave unread.
        """
        self._store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kfdist-store")
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watchers = Watchers(queued_changes=queued_changes)
        self._on_change = on_change
        contents = store.load()
        self._runs = contents.runs
        self._assignments = contents.assignments
        self._owners = contents.owners
        self._notes: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, dict[GroupName, float]] = {}
        for record in self._runs.values():
            on_change(record)
            self.note(record.name, live_owners=len(self.live_owners()))

    # Reading.

    @property
    def owners(self) -> Mapping[str, OwnerRecord]:
        """Every live owner, and the last of those that aren't, by name."""
        return self._owners

    def live_owners(self) -> list[OwnerRecord]:
        """Returns the owners alive within the lease, by name."""
        return sorted((owner for owner in self._owners.values() if owner.live), key=lambda owner: owner.owner_id)

    def owner(self, owner_id: str) -> OwnerRecord:
        """Returns an owner's record, as committed.

        Raises:
            Refusal: NOT_FOUND.
        """
        if owner_id not in self._owners:
            known = ", ".join(owner.owner_id for owner in self.live_owners()[:20]) or "none"
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"there is no owner {owner_id[:100]!r}; those that are alive: {known}"
            )
        return self._owners[owner_id]

    def runs(self) -> list[RunRecord]:
        """Returns all runs, the newest first."""
        return list(reversed(self._runs.values()))

    def run(self, name: str) -> RunRecord:
        """Returns a run's record, as committed.

        Raises:
            Refusal: NOT_FOUND.
        """
        if name not in self._runs:
            hint = suggestion(name[:100], self._runs) or f"; there are {len(self._runs)} runs"
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"there is no run {name[:100]!r} here{hint}")
        return self._runs[name]

    def assignment(self, run: str) -> AssignmentRecord:
        """Returns who inverts what in a run; an empty record before rank 0 has registered."""
        return self._assignments.get(run) or AssignmentRecord(run=run)

    def measure(self, run: str, seconds: Mapping[GroupName, float]) -> None:
        """Notes what recent inversions of a run took, by group; kept in memory alone, as ranks say it again."""
        usable = {group: value for group, value in seconds.items() if math.isfinite(value) and value >= 0}
        self._seconds.setdefault(run, {}).update(usable)

    async def replan(self, name: str, who: str, request: Request) -> run_pb2.Run:
        """Deals a run's groups anew by what their inversions took.

        Raises:
            Refusal: NOT_FOUND; FAILED_PRECONDITION: nothing has been measured, or the run has ended; INVALID_ARGUMENT:
                the request id was used for another request.
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        dealt: list[AssignmentRecord] = []

        def rule(record: RunRecord | None) -> Change:
            assert record is not None  # runs are never removed
            assignment, text = dealing.redealt(self.assignment(name), self._seconds.get(name, {}), self._takers())
            dealt.append(assignment)
            return replanned(record, text, who)

        return await self.change(self.run(name).name, rule, request=request, dealt=dealt)

    async def events(self, run: str, after: int, limit: int) -> list[EventRecord]:
        """Returns at most `limit` events of a run after the event `after`, oldest first."""
        return await self._in_thread(self._store.events, run, after, limit)

    async def watch(self, name: str, from_revision: int) -> AsyncGenerator[run_pb2.Run]:
        """Yields a run at every change after a revision: in order, each once, none missing.

        Args:
            name: The run.
            from_revision: The last revision that the caller has seen; 0 begins with the run as it is.

        Raises:
            Refusal: NOT_FOUND; OUT_OF_RANGE: the revision lies in the future, or changes after it are no longer kept;
                RESOURCE_EXHAUSTED: the caller reads too slowly.
        """
        now = self.run(name)
        if from_revision > now.revision:
            raise Refusal(
                grpc.StatusCode.OUT_OF_RANGE, f"from_revision is {from_revision}; run {name!r} is at {now.revision}"
            )
        with self._watchers.watch(name) as watch:
            seen = from_revision
            if from_revision == 0:
                seen = now.revision
                yield now.message()
            elif from_revision < now.revision:
                for revision, message in await self._in_thread(self._store.changes, name, from_revision):
                    if revision != seen + 1:
                        raise Refusal(
                            grpc.StatusCode.OUT_OF_RANGE,
                            f"from_revision is {from_revision}; changes up to {revision - 1} are no longer kept: "
                            "get the run and watch from its revision",
                        )
                    seen = revision
                    yield run_pb2.Run.FromString(message)
            while True:
                change = await watch.next()
                if change.revision > seen:  # else it was committed after the subscription and also read from the file
                    seen = change.revision
                    yield change

    # Changing.

    async def change(
        self,
        name: str,
        rule: Rule,
        *,
        request: Request | None = None,
        config: str | None = None,
        groups: Groups | None = None,
        dealt: Sequence[AssignmentRecord] = (),
    ) -> run_pb2.Run:
        """Applies a rule to a run, durably. Once begun it completes, even if its caller goes away.

        Args:
            name: The run.
            rule: What happens to it; it may refuse.
            request: The mutation's identity; one answered before gets the same answer, and nothing changes.
            config: The run's new configuration.
            groups: The run's new groups, dealt at once.
            dealt: Who is to invert what from now on; the rule may fill it.

        Returns:
            The run's message after the change.

        Raises:
            Refusal: By the rule; INVALID_ARGUMENT: the request id was used for another request;
                RESOURCE_EXHAUSTED: too many runs.
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        work = self._change(name, rule, request=request, config=config, groups=groups, dealt=dealt)
        return await self._completed(work)

    def note(self, name: str, **fields: Any) -> None:
        """Notes new values of a record's fields, to be committed with its next change or flush."""
        if name in self._runs:
            self._notes.setdefault(name, {}).update(fields)

    def keep_counters(self, counters: Mapping[str, KeptCounters]) -> None:
        """Makes the counters of some runs durable. Waits, so it isn't for the event loop.

        Raises:
            EnvironmentFault: The file can't be written; nothing was changed.
            RuntimeError: The ledger is closed.
        """
        self._thread.submit(self._store.keep_counters, counters).result()

    async def flush(self) -> None:
        """Commits what was noted, all runs in one transaction."""
        if self._notes:
            await self._completed(self._flush())

    async def put_owners(self, changed: Sequence[OwnerRecord]) -> None:
        """Records owners and deals the groups of every unfinished run among the live ones."""
        if changed:
            await self._completed(self._put_owners(changed))

    async def drain(self, owner_id: str, draining: bool, who: str, request: Request) -> inversion_pb2.Owner:
        """Lets an owner have no new jobs, or have them again; its groups are dealt at once.

        Raises:
            Refusal: NOT_FOUND; FAILED_PRECONDITION: no other owner would take jobs; INVALID_ARGUMENT: the request id
                was used for another request.
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        return await self._completed(self._drain(owner_id, draining, who, request))

    async def close(self) -> None:
        """Completes running transactions, commits what was noted and closes the store."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        try:
            await self.flush()
        finally:
            self._thread.shutdown()
            self._store.close()

    async def _change(
        self,
        name: str,
        rule: Rule,
        *,
        request: Request | None,
        config: str | None,
        groups: Groups | None,
        dealt: Sequence[AssignmentRecord],
    ) -> run_pb2.Run:
        async with self._lock:
            if request is not None:
                known = await self._in_thread(self._store.answer, request.request_id)
                if known is not None:
                    return run_pb2.Run.FromString(repeated(known, request))
            before = self._runs.get(name)
            with self._taken_notes([name]) as notes:
                change = rule(replace(before, **notes.get(name, {})) if before else None)
                if before is None:
                    if len(self._runs) >= MAX_RUNS:
                        raise Refusal(
                            grpc.StatusCode.RESOURCE_EXHAUSTED,
                            f"there are {MAX_RUNS} runs; start a controller with another file (control.database)",
                        )
                    change = replace(change, record=replace(change.record, live_owners=len(self.live_owners())))
                updates = () if change.record == before and not change.events else (_update(before, change, config),)
                run = run_pb2.Run.FromString(updates[0].message) if updates else change.record.message()
                await self._commit(
                    Batch(
                        runs=updates,
                        assignments=(*dealt, *([self._with_groups(name, groups)] if groups else ())),
                        answer=answer_to(request, run) if request else None,
                    )
                )
            return run

    async def _flush(self) -> None:
        async with self._lock:
            with self._taken_notes(list(self._notes)) as notes:
                updates = []
                for name, fields in notes.items():
                    record = replace(self._runs[name], **fields)
                    if record != self._runs[name]:
                        updates.append(_update(self._runs[name], Change(record)))
                if updates:
                    await self._commit(Batch(runs=tuple(updates)))

    async def _put_owners(self, changed: Sequence[OwnerRecord]) -> None:
        async with self._lock:
            # Whoever says where an owner is knows nothing of whether it is drained.
            known = self._owners
            changed = [
                replace(owner, draining=known[owner.owner_id].draining) if owner.owner_id in known else owner
                for owner in changed
            ]
            told = (owner_rules.moved(known.get(owner.owner_id), owner) for owner in changed)
            events = [event for event in told if event is not None]
            await self._commit(self._with_owners(changed, lambda record: events))

    async def _drain(self, owner_id: str, draining: bool, who: str, request: Request) -> inversion_pb2.Owner:
        async with self._lock:
            known = await self._in_thread(self._store.answer, request.request_id)
            if known is not None:
                return inversion_pb2.Owner.FromString(repeated(known, request))
            before = self.owner(owner_id)
            after = owner_rules.drained(before, draining, takers=self._takers())

            def tell(record: RunRecord) -> list[Event]:
                step = self._notes.get(record.name, {}).get("step", record.step)
                return [owner_rules.draining_event(after, step, who)]

            batch = self._with_owners([after], tell) if after != before else Batch()
            await self._commit(replace(batch, answer=answer_to(request, after.message())))
            return after.message()

    def _with_owners(self, changed: Sequence[OwnerRecord], tell: Callable[[RunRecord], Sequence[Event]]) -> Batch:
        """Returns what becomes of runs and their groups when owners have changed, and tells each run's log."""
        owners = owner_rules.changed(self._owners, changed)
        live = sum(owner.live for owner in owners.values())
        takers = [owner.owner_id for owner in owners.values() if owner.takes_jobs]
        updates, assignments = [], []
        for record in self._runs.values():
            told = () if record.state.ended else tuple(tell(record))
            moved = replace(record, live_owners=live)
            if moved != record or told:
                updates.append(_update(record, Change(moved, told)))
            if not record.state.ended and record.name in self._assignments:
                assignments.append(dealing.dealt(self._assignments[record.name], takers))
        return Batch(
            runs=tuple(updates),
            assignments=tuple(assignments),
            owners=tuple(changed),
            forgotten_owners=owner_rules.forgettable(owners),
        )

    def _takers(self) -> list[str]:
        """Returns the names of the owners that groups are dealt to."""
        return [owner.owner_id for owner in self.live_owners() if owner.takes_jobs]

    async def _commit(self, batch: Batch) -> None:
        """Makes a batch durable, without assignments that are as they were, and then known to everybody."""
        moved = tuple(each for each in batch.assignments if each != self._assignments.get(each.run))
        await self._in_thread(self._store.commit, replace(batch, assignments=moved))
        owners = owner_rules.changed(self._owners, batch.owners)
        self._owners = {name: owner for name, owner in owners.items() if name not in batch.forgotten_owners}
        self._assignments |= {assignment.run: assignment for assignment in moved}
        for update in batch.runs:
            self._runs[update.record.name] = update.record
            self._on_change(update.record)
            self._watchers.publish(run_pb2.Run.FromString(update.message))

    @contextmanager
    def _taken_notes(self, names: Iterable[str]) -> Iterator[Mapping[str, Mapping[str, Any]]]:
        """Takes the notes of some runs, by run; where they could not be committed, they are noted again."""
        taken = {name: self._notes.pop(name) for name in names if name in self._notes}
        try:
            yield taken
        except BaseException:
            for name, fields in taken.items():
                self._notes[name] = fields | self._notes.get(name, {})
            raise

    def _with_groups(self, name: str, groups: Groups) -> AssignmentRecord:
        before = self.assignment(name)
        after = dealing.registered(before, groups, self._takers())
        if (after.policy, after.groups) != (before.policy, before.groups):  # what was measured was of others
            self._seconds.pop(name, None)
        return after

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _completed(self, work: Coroutine[Any, Any, Result]) -> Result:
        # A caller that goes away cancels its handler, yet a commit once begun must reach the memory.
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: with its caller gone, nobody else does


def _update(before: RunRecord | None, change: Change, config: str | None = None) -> RunUpdate:
    record = replace(change.record, revision=before.revision + 1 if before else 1)
    return RunUpdate(record=record, message=record.message().SerializeToString(), events=change.events, config=config)

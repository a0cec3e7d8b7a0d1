"""The courier's jobs: each goes to one owner after the other until one has done it."""

import asyncio
import contextlib
import logging
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from kfdist.errors import EnvironmentFault
from kfdist.links.courier.known_owners import KnownOwner, OwnerDirectory
from kfdist.links.courier.transfer import AttemptFailed, Reason, attempt
from kfdist.links.link import LinkCounters
from kfdist.links.shared_memory import write_at
from kfdist.links.socket_messages import CourierSetup, Done, Submit, Taken
from kfdist.rpc._generated.kfdist.v1.inversion_pb2 import InvertHeader, InvertResultHeader, ListPeersRequest
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import InversionServiceStub
from kfdist.rpc.channels import open_aio_channel
from kfdist.rpc.handshake import explain, token_refused
from kfdist.rpc.status import code_of
from kfdist.system.credentials import Credentials, Role, stamp
from kfdist.telemetry.tracing import Hop, Tracing
from kfdist.types import MAX_DEADLINE_SECONDS

_LOG = logging.getLogger(__name__)

_CALLS_PER_OWNER = 2
"""One inversion runs while the next one's payload travels; more would only fill the owner's memory."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_LARGEST_STRETCH = 8
"""A deadline that was too short is doubled, up to this factor, so that a slow machine gets on, too."""

_LONGEST_LOOK_AWAY_SECONDS = 0.5
_WARNING_PERIOD_SECONDS = 10.0
_PROBE_SECONDS = 1.0
_KEPT_OF_SECONDS = 0.7
"""What the average of a group's inversion seconds keeps of the old ones."""

_POOL_START_SECONDS = 20.0
"""Ranks and pool start together, and the pool takes longer; only later is a want of owners worth a word."""


class _Connection:
    """A channel to one owner at one address, and the slots of calls on it."""

    def __init__(self, owner: KnownOwner, credentials: Credentials | None) -> None:
        self.owner = owner
        self._files = credentials.files if credentials is not None else ()
        self._stamp = stamp(self._files)
        self.channel = open_aio_channel(owner.address, credentials, server=Role.OWNER)
        self.stub = InversionServiceStub(self.channel)
        self.slots = asyncio.Semaphore(_CALLS_PER_OWNER)
        self._closing: asyncio.Task[None] | None = None

    def is_current(self, owner: KnownOwner) -> bool:
        """Tells whether it leads to where the owner is, with the certificate and the token of now."""
        return self.owner.address == owner.address and self._stamp == stamp(self._files)

    def abandon(self) -> None:
        """Ends all calls on it."""
        self._closing = asyncio.create_task(self.channel.close())


@dataclass(kw_only=True, eq=False)
class _Parcel:
    """A job on its way.

    Attributes:
        submit: What the rank said.
        payload: Its input, mapped.
        hop: Its way through this courier.
        attempts: Submissions so far.
        tried: Owners that failed it since all were tried last.
        rounds: How often all owners were tried.
        stretch: Factor on its deadline.
        stranded: Whether it was counted as having no owner of its fingerprint.
    """

    submit: Submit
    payload: memoryview
    hop: Hop
    attempts: int = 0
    tried: set[str] = field(default_factory=set)
    rounds: int = 0
    stretch: int = 1
    stranded: bool = False


class Dispatcher:
    """Carries jobs to owners, one task a job.

    Attributes:
        seconds: What recent inversions took, by group: a moving average.
    """

    def __init__(
        self,
        setup: CourierSetup,
        directory: OwnerDirectory,
        *,
        done: Callable[[Done], None],
        count: Callable[[LinkCounters], None],
        fenced: Callable[[str], None],
        tracing: Tracing,
        controller_is_unheard: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begins without jobs.

        Args:
            setup: What the rank knows of its run, and what to show to owners.
            directory: The owners; kept up to date by others, who call `owners_changed`.
            done: Called when a result lies in its memfd.
            count: Called with what there is to count.
            fenced: Called with the reason when an owner has seen a newer start of the run.
            tracing: Makes a span of each hop of a job.
            controller_is_unheard: Tells whether nobody answers where the controller should be.
        """
        self._context = setup.context
        self._credentials = setup.credentials
        self._directory = directory
        self._done = done
        self._count = count
        self._fenced = fenced
        self._tracing = tracing
        self._address = setup.address
        self._controller_is_unheard = controller_is_unheard
        self._on_their_way_back: dict[int, tuple[Hop, Hop]] = {}
        self._connections: dict[str, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._begun = time.monotonic()
        self._quiet_until = 0.0
        self.seconds: dict[str, float] = {}

    def submit(self, group: asyncio.TaskGroup, submit: Submit, input_descriptor: int, output_descriptor: int) -> None:
        """Takes a job over, and its descriptors with it.

        Args:
            group: Where its task belongs; a fault of our own in it must end the courier, which its rank then replaces.
            submit: The job.
            input_descriptor: Memfd of its payload.
            output_descriptor: Memfd for its result.
        """
        self._keep(group.create_task(self._carry(submit, input_descriptor, output_descriptor)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel_all(self) -> None:
        """Forgets all jobs."""
        for task in list(self._tasks):
            task.cancel()

    def taken(self, taken: Taken) -> None:
        """Ends the trace of a job whose result the rank has looked at."""
        for hop in self._on_their_way_back.pop(taken.ticket, ()):
            hop.end(at_ns=taken.at_ns, fault="" if taken.intact else Reason.CORRUPT)

    def owners_changed(self) -> None:
        """Ends the calls to owners that are gone, so that their jobs go elsewhere, and wakes the jobs that wait."""
        for connection in list(self._connections.values()):
            if not self._directory.is_current(connection.owner):
                del self._connections[connection.owner.owner_id]
                connection.abandon()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _carry(self, submit: Submit, input_descriptor: int, output_descriptor: int) -> None:
        job = self._tracing.begin(
            "job",
            at_ns=submit.submitted_ns,
            group=submit.group,
            version=submit.version,
            epoch=self._context.epoch,
            payload_bytes=submit.payload_bytes,
        )
        hop = self._tracing.begin("courier", parent=job)
        try:
            payload = _map(input_descriptor, submit.payload_bytes)
            header, result = await self._invert(_Parcel(submit=submit, payload=payload, hop=hop))
            self._measure(submit.group, header.seconds)
            # In the event loop, as a thread might still write when this task is cancelled and its descriptor reused.
            write_at(output_descriptor, 0, result)
            hop.end()
            if job.traceparent:  # then the rank will say that it has taken the result
                back = self._tracing.begin("back", parent=job, payload_bytes=header.payload_bytes)
                self._on_their_way_back[submit.ticket] = back, job
            self._done(
                Done(
                    ticket=submit.ticket,
                    payload_bytes=header.payload_bytes,
                    digest=header.digest,
                    seconds=header.seconds,
                    owner=header.owner_id,
                )
            )
        finally:
            os.close(input_descriptor)
            os.close(output_descriptor)

    def _measure(self, group: str, seconds: float) -> None:
        before = self.seconds.get(group, seconds)
        self.seconds[group] = _KEPT_OF_SECONDS * before + (1 - _KEPT_OF_SECONDS) * seconds

    async def _invert(self, parcel: _Parcel) -> tuple[InvertResultHeader, bytearray]:
        """Tries owners until one has done the job."""
        while True:
            owner = await self._choose(parcel)
            try:
                connection = self._connect(owner)
            except EnvironmentFault as fault:  # of the files of the credentials
                self._learn(owner, parcel, AttemptFailed(Reason.REFUSED, str(fault), owner_at_fault=True))
                continue
            async with connection.slots:
                if not self._directory.takes_jobs(owner):
                    continue  # It fell ill or was drained while this job waited for it.
                parcel.attempts += 1
                hop = self._tracing.begin("attempt", parent=parcel.hop, owner=owner.owner_id, number=parcel.attempts)
                try:
                    answer = await attempt(
                        connection.stub, self._header(parcel), parcel.payload, self._count, hop.metadata
                    )
                except AttemptFailed as failure:
                    hop.end(fault=f"{failure.reason}: {failure}")
                    self._learn(owner, parcel, failure)
                else:
                    hop.end()
                    self._directory.trust(owner)
                    return answer

    def _header(self, parcel: _Parcel) -> InvertHeader:
        submit = parcel.submit
        seconds = min(submit.deadline_seconds * parcel.stretch, MAX_DEADLINE_SECONDS)  # owners refuse longer ones
        return InvertHeader(
            run=self._context.run,
            epoch=self._context.epoch,
            group=submit.group,
            version=submit.version,
            digest=submit.digest,
            payload_bytes=submit.payload_bytes,
            deadline_milliseconds=max(1, round(seconds * 1000)),
            fingerprint=submit.fingerprint,
        )

    async def _choose(self, parcel: _Parcel) -> KnownOwner:
        """Waits for the best owner that hasn't failed the job in this round."""
        submit = parcel.submit
        while True:
            changed = self._changed
            candidates = self._directory.order(submit.group, submit.fingerprint)
            fresh = [owner for owner in candidates if owner.owner_id not in parcel.tried]
            if fresh:
                return fresh[0]
            if candidates:
                pause = min(_FIRST_PAUSE_SECONDS * 2**parcel.rounds, _LONGEST_PAUSE_SECONDS)
                parcel.rounds = min(parcel.rounds + 1, 16)
                parcel.tried.clear()
                await self._rest(pause)
            else:
                self._explain_waiting(parcel)
                # A suspension may end without any change, so this doesn't wait for one for long.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LONGEST_LOOK_AWAY_SECONDS):
                        await changed.wait()

    async def _rest(self, seconds: float) -> None:
        """Sleeps, until an owner comes or comes back at most: a pause grows with the outage that this ends."""
        arrivals, ends = self._directory.arrivals, time.monotonic() + seconds
        while self._directory.arrivals == arrivals and (left := ends - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _connect(self, owner: KnownOwner) -> _Connection:
        connection = self._connections.get(owner.owner_id)
        if connection is None or not connection.is_current(owner):
            # Calls on the old one go on: a renewed certificate counts for new connections.
            connection = self._connections[owner.owner_id] = _Connection(owner, self._credentials)
        return connection

    def _learn(self, owner: KnownOwner, parcel: _Parcel, failure: AttemptFailed) -> None:
        parcel.tried.add(owner.owner_id)
        self._count(LinkCounters(resubmissions={failure.reason: 1}))
        if failure.owner_at_fault:
            self._directory.suspend(owner)
        if failure.reason is Reason.DEADLINE:
            parcel.stretch = min(2 * parcel.stretch, _LARGEST_STRETCH)
        if failure.reason is Reason.STALE_EPOCH:
            self._fenced(str(failure))
        told = self._warn(
            f"{owner.owner_id} at {owner.address} didn't do group {parcel.submit.group!r} version "
            f"{parcel.submit.version} (attempt {parcel.attempts}): {failure}; it goes out again"
        )
        if told and failure.reason in (Reason.OWNER_LOST, Reason.CRASH):
            self._keep(asyncio.create_task(self._explain_refusal(owner)))

    async def _explain_refusal(self, owner: KnownOwner) -> None:
        """Says whether it is for want of trust that an owner does nothing; jobs don't wait for that.

        A stream that its server ends while it is written to may end as INTERNAL, whatever the server said; a call of
        one message tells.
        """
        address, seconds = owner.address, _PROBE_SECONDS
        reason = await asyncio.to_thread(explain, address, self._credentials, server=Role.OWNER, seconds=seconds)
        if not reason:
            try:
                await self._connect(owner).stub.ListPeers(ListPeersRequest(), timeout=seconds)
            except (grpc.aio.AioRpcError, EnvironmentFault) as error:
                if isinstance(error, grpc.RpcError) and code_of(error) is grpc.StatusCode.UNAUTHENTICATED:
                    reason = token_refused(address, Role.OWNER)
        if reason:
            _LOG.warning("%s: %s", owner.owner_id, reason)

    def _explain_waiting(self, parcel: _Parcel) -> None:
        owners = self._directory.owners
        fingerprint = parcel.submit.fingerprint
        if owners and all(owner.draining for owner in owners):
            self._warn("every owner is drained; jobs wait until one isn't (kfdist undrain OWNER) or another comes")
        elif not owners and time.monotonic() - self._begun > _POOL_START_SECONDS:
            why = "is the pool running?"
            if self._controller_is_unheard():
                why = f"no controller answers at {self._address}, to name them: does `kfdist serve` run there?"
            self._warn(f"no owner is known yet; jobs wait for one ({why})")
        elif owners and not self._directory.matching(fingerprint):
            others = sorted({owner.fingerprint for owner in owners})
            self._warn(
                f"no owner has the run's fingerprint {fingerprint!r}; theirs: {others}. Under fixed-lag owners must "
                "compute as the ranks do: give both the same device, threads and library versions, or use asap"
            )
            if not parcel.stranded:
                parcel.stranded = True
                self._count(LinkCounters(resubmissions={Reason.FINGERPRINT: 1}))

    def _warn(self, message: str) -> bool:
        """Logs a message unless another one is younger than the warning period; returns whether it did."""
        due = time.monotonic() >= self._quiet_until
        if due:
            self._quiet_until = time.monotonic() + _WARNING_PERIOD_SECONDS
            _LOG.warning("%s", message)
        return due


def _map(descriptor: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b"")

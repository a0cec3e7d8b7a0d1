"""The courier's conversation with the controller: registration, heartbeats, settings, and who the owners are.

The controller may be away at any time, from before the start to long after the end. Jobs don't wait for it; this module
comes back to it by itself, and asks owners for their peers meanwhile.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import grpc
import grpc.aio

from kfdist.errors import EnvironmentFault
from kfdist.links.courier.known_owners import KnownOwner, OwnerDirectory
from kfdist.links.link import LinkCounters
from kfdist.links.socket_messages import CourierSetup
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import InversionServiceStub
from kfdist.rpc._generated.kfdist.v1.membership_pb2_grpc import MembershipServiceStub
from kfdist.rpc.beats import BEAT_SECONDS, BeatStream, group_messages, in_force_message, settings_of
from kfdist.rpc.certificate_faults import expiry_samples
from kfdist.rpc.channels import CALL_SECONDS, open_aio_channel
from kfdist.rpc.status import code_of, details_of, refusal_of
from kfdist.system.credentials import Role
from kfdist.types import InForce, MetricSample, RunSettings

_LOG = logging.getLogger(__name__)

_SAMPLES_PER_BEAT = 2000
_QUEUED_SAMPLES = 20_000
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 2.0
_PEERS_SECONDS = 3.0
_LAST_WORD_SECONDS = 8.0
"""How long a controller that isn't known to be away may take to hear that the rank has ended, which it would call lost
otherwise: a short run may end before its courier has registered it, and a busy machine takes seconds for that."""


class ControllerSession:
    """Talks to the controller for one rank until told to end.

    Attributes:
        in_force: What the run goes by, as the rank last said; None before it has.
    """

    def __init__(
        self,
        setup: CourierSetup,
        directory: OwnerDirectory,
        *,
        owners_changed: Callable[[], None],
        settings_changed: Callable[[RunSettings], None],
        count: Callable[[LinkCounters], None],
        fenced: Callable[[str], None],
        inversion_seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begins without a connection.

        Args:
            setup: The controller, the rank and its run.
            directory: Kept up to date.
            owners_changed: Called after each update of the directory.
            settings_changed: Called with newer settings of the run.
            count: Called with the samples that find no place while the controller is away.
            fenced: Called with the reason when the controller knows a newer start of the run.
            inversion_seconds: What recent inversions took, by group; it may change at any time.
        """
        self._setup = setup
        self._context = setup.context
        self._directory = directory
        self._owners_changed = owners_changed
        self._settings_changed = settings_changed
        self._count = count
        self._fenced = fenced
        self.in_force: InForce | None = None
        self._inversion_seconds = inversion_seconds
        self._revision = 0
        self._step, self._phase = setup.context.step, "running"
        self._samples: deque[MetricSample] = deque()
        self._due = asyncio.Event()
        self._ending = False
        self._connected = False
        self._away = False
        self._told = ""

    @property
    def is_unheard(self) -> bool:
        """Whether nobody has answered where the controller should be, when it was last tried."""
        return self._away and not self._told

    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        """Takes in where the rank stands; it is told at the next beat, a new phase at once."""
        if phase != self._phase:
            self._due.set()
        self._step, self._phase = step, phase
        self._samples.extend(samples)
        surplus = len(self._samples) - _QUEUED_SAMPLES
        if surplus > 0:
            for _ in range(surplus):
                self._samples.popleft()  # the oldest: a gauge's newer value, or a counter's total, replaces it anyway
            self._count(LinkCounters(samples_dropped=surplus))

    async def run(self) -> None:
        """Keeps the conversation up until `end`."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                async with self._channel() as channel:
                    stub = MembershipServiceStub(channel)
                    await self._register(stub)
                    await self._heartbeat(stub)
                return
            except EnvironmentFault as fault:
                self._tell(str(fault))  # of the files of the credentials
            except grpc.aio.AioRpcError as error:
                if code_of(error) is grpc.StatusCode.ABORTED:
                    self._fenced(details_of(error))
                    return
                await self._tell_refusal(error)
            except TimeoutError:
                pass  # like nobody there and most refusals, it may be over at the next try
            finally:
                reached, self._connected = self._connected, False
            self._away = True
            if self._ending:
                return
            pause = _FIRST_PAUSE_SECONDS if reached else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def _channel(self) -> grpc.aio.Channel:
        return open_aio_channel(self._setup.address, self._setup.credentials, server=Role.CONTROLLER)

    async def _tell_refusal(self, error: grpc.aio.AioRpcError) -> None:
        """Says once why a controller that is there refuses this rank; nobody there is no news."""
        if self._ending and code_of(error) is grpc.StatusCode.UNAVAILABLE:
            return  # to find out why takes seconds
        address, credentials = self._setup.address, self._setup.credentials
        answered = self._connected
        self._tell(await refusal_of(error, address, credentials, server=Role.CONTROLLER, answered=answered))

    def _tell(self, reason: str) -> None:
        if reason and reason != self._told:
            self._told = reason
            _LOG.warning("the controller at %s refuses this rank: %s", self._setup.address, reason)

    async def end(self, conversation: asyncio.Task[None]) -> None:
        """Tells the controller the last beat if it is there, and ends `conversation`, the task of `run`."""
        self._ending = True
        self._due.set()
        _, late = await asyncio.wait([conversation], timeout=0.0 if self._away else _LAST_WORD_SECONDS)
        for task in late:
            task.cancel()

    async def keep_finding_owners(self) -> None:
        """Asks owners for their peers for as long as the controller is away; never returns."""
        while True:
            await asyncio.sleep(_PEERS_SECONDS)
            for owner in [] if self._connected else self._directory.owners:
                with contextlib.suppress(grpc.aio.AioRpcError, EnvironmentFault):
                    async with open_aio_channel(owner.address, self._setup.credentials, server=Role.OWNER) as channel:
                        request = inversion_pb2.ListPeersRequest()
                        response = await InversionServiceStub(channel).ListPeers(request, timeout=_PEERS_SECONDS)
                    self._learn_owners(response.owners)
                    break

    async def _register(self, stub: MembershipServiceStub) -> None:
        context = self._context
        leads = context.worker_rank == 0
        request = membership_pb2.RegisterWorkerRequest(
            run=context.run,
            epoch=context.epoch,
            worker_rank=context.worker_rank,
            world_size=context.world_size,
            groups=group_messages(context.groups) if leads else (),
            fingerprint=context.fingerprint,
            assignment=context.assignment if leads else "",
            pid=self._setup.rank_pid,
            process=self._setup.process,
        )
        response = await stub.RegisterWorker(request, timeout=CALL_SECONDS)
        self._learn_settings(response.settings)

    async def _heartbeat(self, stub: MembershipServiceStub) -> None:
        """Beats until told to end; then once more, with all that is left to tell."""
        stream = BeatStream(stub)
        expiries = expiry_samples(self._setup.credentials, "rank")
        assignment_revision = -1
        try:
            while True:
                last = self._ending
                with self._taken_samples() as samples:
                    response = await stream.beat(self._standing(), [*samples, *expiries()])
                self._connected, self._away = True, False
                self._learn_settings(response.settings)
                self._learn_owners(response.owners)
                if response.assignment_revision != assignment_revision:
                    assignment_revision = await self._learn_assignment(stub)
                if last and not self._samples:
                    return
                if not last and len(self._samples) < _SAMPLES_PER_BEAT:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(BEAT_SECONDS):
                            await self._due.wait()
                    self._due.clear()
        finally:
            stream.close()

    def _standing(self) -> membership_pb2.WorkerBeat:
        return membership_pb2.WorkerBeat(
            run=self._context.run,
            epoch=self._context.epoch,
            worker_rank=self._context.worker_rank,
            step=self._step,
            phase=self._phase,
            inversion_seconds=self._inversion_seconds,
            in_force=None if self.in_force is None else in_force_message(self.in_force),
        )

    @contextlib.contextmanager
    def _taken_samples(self) -> Iterator[list[MetricSample]]:
        """Takes samples from the queue, and puts them back if they could not be told."""
        samples = [self._samples.popleft() for _ in range(min(len(self._samples), _SAMPLES_PER_BEAT))]
        try:
            yield samples
        except BaseException:
            self._samples.extendleft(reversed(samples))
            raise

    def _learn_settings(self, settings: membership_pb2.RunSettings) -> None:
        if settings.revision > self._revision:
            self._revision = settings.revision
            self._settings_changed(settings_of(settings))

    def _learn_owners(self, owners: Iterable[inversion_pb2.Owner]) -> None:
        self._directory.update(
            KnownOwner(
                owner_id=owner.owner_id,
                address=owner.address,
                fingerprint=owner.fingerprint,
                draining=owner.draining,
            )
            for owner in owners
        )
        self._owners_changed()

    async def _learn_assignment(self, stub: MembershipServiceStub) -> int:
        request = membership_pb2.GetAssignmentRequest(run=self._context.run)
        response = await stub.GetAssignment(request, timeout=CALL_SECONDS)
        self._directory.assign(response.owner_by_group)
        self._learn_owners(response.owners)
        return response.revision

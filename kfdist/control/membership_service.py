"""MembershipService: ranks (through their couriers) and owners register, and send heartbeats with telemetry."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import grpc
from typing_extensions import override

from kfdist.control import run_rules, validation
from kfdist.control.control_records import PHASES, Change, Event, OwnerRecord, RunRecord
from kfdist.control.dealing import Groups
from kfdist.control.exporter import Exporter
from kfdist.control.leases import Members, RankProcess
from kfdist.control.ledger import Ledger
from kfdist.control.mutations import Request
from kfdist.control.series import Sender
from kfdist.policies.epochs import largest_epoch
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, membership_pb2_grpc
from kfdist.rpc.authentication import caller_of
from kfdist.rpc.beats import groups_of, in_force_of, samples_of, settings_message
from kfdist.rpc.status import Refusal, answers, streams
from kfdist.types import MAX_OWNERS, MetricSample

SILENT_SECONDS = 60.0
"""How long a heartbeat stream may be silent before it is ended. Members send a message every one or two seconds."""


class MembershipService(membership_pb2_grpc.MembershipServiceServicer):
    """The service of protos/kfdist/v1/membership.proto, which documents the calls."""

    def __init__(self, ledger: Ledger, members: Members, exporter: Exporter) -> None:
        """Serves ledger, members and exporter; holds no state."""
        self._ledger = ledger
        self._members = members
        self._exporter = exporter

    @override
    @answers
    async def RegisterWorker(
        self, request: membership_pb2.RegisterWorkerRequest, context: Any
    ) -> membership_pb2.RegisterWorkerResponse:
        del context
        validation.check_worker(request)
        groups = None
        if request.worker_rank == 0 and request.groups:
            groups = Groups(policy=request.assignment or "round_robin", specs=groups_of(request.groups))
        process = RankProcess(request.pid, request.process)
        anew = self._begins_anew(request, process)
        await self._ledger.change(request.run, lambda record: _registered(record, request, anew=anew), groups=groups)
        self._members.hear_worker(request.run, request.epoch, request.worker_rank, process)
        settings = self._ledger.run(request.run).settings
        return membership_pb2.RegisterWorkerResponse(settings=settings_message(settings))

    def _begins_anew(self, request: membership_pb2.RegisterWorkerRequest, process: RankProcess) -> bool:
        """Tells whether a rank is of a run whose starts are counted anew: another was it, in a start that has ended.

        The ranks of that start are forgotten, so that the first one alone begins it.

        Raises:
            Refusal: ABORTED: another process is it, and two runs have one name.
        """
        known = self._members.process_of(request.run, request.epoch, request.worker_rank)
        if known is None or not process.is_another(known):
            return False
        if self._ledger.run(request.run).state.ended:
            self._members.forget_crew(request.run)
            return True
        if self._members.is_alive(request.run, request.worker_rank):
            raise Refusal(
                grpc.StatusCode.ABORTED,
                f"rank {request.worker_rank} of run {request.run!r}, start {request.epoch}, is process {known.pid} "
                "already: another run has this name; give one of them another name (run.name), or another controller; "
                f"or, if it was killed, start again in {self._members.lease_seconds:.0f} s",
            )
        return False

    @override
    @answers
    async def RegisterOwner(
        self, request: membership_pb2.RegisterOwnerRequest, context: Any
    ) -> membership_pb2.RegisterOwnerResponse:
        del context
        validation.check_owner(request)
        before = self._ledger.owners.get(request.owner.owner_id)
        if before is None and len(self._ledger.owners) >= MAX_OWNERS:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_OWNERS} owners are known; let fewer serve this controller, or start another one",
            )
        owner = OwnerRecord(
            owner_id=request.owner.owner_id,
            address=request.owner.address,
            fingerprint=request.owner.fingerprint,
            restarts=request.restarts,
            pid=request.pid,
        )
        await self._members.hear_owner(owner)
        if before is not None and before.restarts < owner.restarts:
            for run in self._ledger.runs():
                if not run.state.ended:
                    restarts = owner.restarts - before.restarts
                    self._exporter.count(run.name, "kfdist_restarts_total", {"process": "owner"}, restarts)
        return membership_pb2.RegisterOwnerResponse(owners=self._owners())

    @override
    @streams
    async def Heartbeat(
        self, request_iterator: AsyncIterator[membership_pb2.HeartbeatRequest], context: Any
    ) -> AsyncGenerator[membership_pb2.HeartbeatResponse]:
        del context
        requests = aiter(request_iterator)
        while (request := await _next_beat(requests)) is not None:
            match request.WhichOneof("member"):
                case "worker":
                    yield await self._hear_worker(request)
                case "owner":
                    yield await self._hear_owner(request)
                case _:
                    raise Refusal(
                        grpc.StatusCode.INVALID_ARGUMENT, "member is not set; it must be a worker or an owner"
                    )

    @override
    @answers
    async def GetAssignment(
        self, request: membership_pb2.GetAssignmentRequest, context: Any
    ) -> membership_pb2.GetAssignmentResponse:
        del context
        assignment = self._ledger.assignment(self._ledger.run(request.run).name)
        return membership_pb2.GetAssignmentResponse(
            revision=assignment.revision,
            owner_by_group=dict(assignment.owner_by_group),
            owners=self._owners(),
        )

    @override
    @answers
    async def DrainOwner(
        self, request: membership_pb2.DrainOwnerRequest, context: Any
    ) -> membership_pb2.DrainOwnerResponse:
        return membership_pb2.DrainOwnerResponse(owner=await self._drain("DrainOwner", request, context, draining=True))

    @override
    @answers
    async def UndrainOwner(
        self, request: membership_pb2.UndrainOwnerRequest, context: Any
    ) -> membership_pb2.UndrainOwnerResponse:
        owner = await self._drain("UndrainOwner", request, context, draining=False)
        return membership_pb2.UndrainOwnerResponse(owner=owner)

    async def _drain(self, method: str, request: Any, context: Any, *, draining: bool) -> inversion_pb2.Owner:
        validation.check_request_id(request.request_id)
        identity = Request.of(method, request)
        return await self._ledger.drain(request.owner_id, draining, caller_of(context), identity)

    async def _hear_worker(self, request: membership_pb2.HeartbeatRequest) -> membership_pb2.HeartbeatResponse:
        beat = request.worker
        record = self._ledger.run(beat.run)
        validation.check_beat(beat)
        _check_epoch(record, beat.epoch)
        if beat.epoch > record.epoch or not 0 <= beat.worker_rank < record.world_size:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"rank {beat.worker_rank} of run {beat.run!r}, start {beat.epoch}, isn't registered; do that first",
            )
        sender = Sender("worker", str(beat.worker_rank))
        samples = self._bounded(request)
        self._exporter.ingest(beat.run, sender, self._life(beat), samples)
        if PHASES[beat.phase].ended:
            self._members.release_worker(beat.run, beat.worker_rank)
        else:
            self._members.hear_worker(beat.run, beat.epoch, beat.worker_rank)
        if beat.inversion_seconds:
            self._ledger.measure(beat.run, beat.inversion_seconds)
        if beat.worker_rank == 0 and not record.state.ended:
            if samples:
                self._ledger.note(beat.run, gauges=self._exporter.gauges_of(beat.run, sender))
            await self._report(record, beat)
        return membership_pb2.HeartbeatResponse(
            settings=settings_message(self._ledger.run(beat.run).settings),
            owners=self._owners(),
            assignment_revision=self._ledger.assignment(beat.run).revision,
        )

    def _life(self, beat: membership_pb2.WorkerBeat) -> str:
        """Returns what names a rank's life, in which it counts: starts may have one number, one after the other."""
        process = self._members.process_of(beat.run, beat.epoch, beat.worker_rank)
        word = process.word if process is not None else ""
        return f"{beat.epoch}/{word}" if word else str(beat.epoch)

    async def _report(self, record: RunRecord, beat: membership_pb2.WorkerBeat) -> None:
        in_force = in_force_of(beat.in_force) if beat.HasField("in_force") else None
        change = run_rules.reported(record, phase=beat.phase, step=beat.step, in_force=in_force)
        moved = change.record
        if not change.events and (moved.state, moved.begun) == (record.state, record.begun):
            named = () if in_force is None else ("in_force", "obeyed_revision", "obeyed_step")
            self._ledger.note(beat.run, step=beat.step, **{name: getattr(moved, name) for name in named})
            return

        def rule(now: RunRecord | None) -> Change:
            assert now is not None  # runs are never removed
            _check_epoch(now, beat.epoch)
            return run_rules.reported(now, phase=beat.phase, step=beat.step, in_force=in_force)

        # Durable before the answer: a run that reported its end is never found running again.
        await self._ledger.change(beat.run, rule)

    async def _hear_owner(self, request: membership_pb2.HeartbeatRequest) -> membership_pb2.HeartbeatResponse:
        beat = request.owner
        owner = self._ledger.owners.get(beat.owner_id)
        if owner is None or (beat.address and beat.address != owner.address):
            at = f" at {beat.address[:100]}" if owner is not None else ""
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"owner {beat.owner_id[:100]!r} isn't registered{at}; register it first"
            )
        await self._members.hear_owner(owner)
        self._ingest(owner, self._bounded(request))
        return membership_pb2.HeartbeatResponse(owners=self._owners())

    def _ingest(self, owner: OwnerRecord, samples: Sequence[MetricSample]) -> None:
        """Takes an owner's samples; each names the run that it belongs to, if to any, as an owner works for many."""
        runs = {run.name: run for run in self._ledger.runs()} if samples else {}
        for name, of_run in _by_run(samples).items():
            if name and name not in runs:
                self._exporter.drop("unknown_run", len(of_run))
            elif not name or not runs[name].state.ended:
                sender = Sender("owner", owner.owner_id)
                self._exporter.ingest(name, sender, f"{owner.restarts}/{owner.pid}", of_run)

    def _owners(self) -> list[inversion_pb2.Owner]:
        """Returns the messages of the live owners, as couriers get them."""
        return [owner.message() for owner in self._ledger.live_owners()]

    def _bounded(self, request: membership_pb2.HeartbeatRequest) -> list[MetricSample]:
        surplus = len(request.samples) - validation.MAX_SAMPLES
        if surplus > 0:
            self._exporter.drop("too_many_samples", surplus)
        return samples_of(request.samples[: validation.MAX_SAMPLES])


def _by_run(samples: Iterable[MetricSample]) -> dict[str, list[MetricSample]]:
    """Returns samples by their label `run`, without it; those that have none under the empty name."""
    found: dict[str, list[MetricSample]] = {}
    for sample in samples:
        labels = dict(sample.labels)
        run = labels.pop("run", "")
        found.setdefault(run, []).append(replace(sample, labels=labels))
    return found


async def _next_beat(
    requests: AsyncIterator[membership_pb2.HeartbeatRequest],
) -> membership_pb2.HeartbeatRequest | None:
    """Returns the next message of a stream, None at its end; a silent one must not hold its place for ever."""
    try:
        async with asyncio.timeout(SILENT_SECONDS):
            return await anext(requests, None)
    except TimeoutError:
        raise Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"no beat came for {SILENT_SECONDS:g} s; register and beat again"
        ) from None


def _registered(record: RunRecord | None, request: membership_pb2.RegisterWorkerRequest, *, anew: bool) -> Change:
    """Applies a registration: makes an unknown run known, and opens its start for the first rank of it.

    Args:
        record: The run.
        request: The registration.
        anew: Whether a start of this number has ended, and this is another one.
    """
    events: list[Event] = []
    if record is None:
        made = run_rules.created(None, name=request.run, directory="", total_steps=0, now_ns=time.time_ns())
        record = made.record
        events += made.events
    _check_epoch(record, request.epoch)
    _check_not_far_ahead(record, request.epoch)
    if request.epoch > record.epoch or record.world_size == 0 or anew:
        opened = run_rules.started(record, epoch=request.epoch, world_size=request.world_size)
        record = opened.record
        events += opened.events
    if request.world_size != record.world_size:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"world_size is {request.world_size}; start {record.epoch} of run {record.name!r} has {record.world_size}",
        )
    if request.worker_rank == 0:
        record = replace(record, fingerprint=request.fingerprint)
    text = f"rank {request.worker_rank} of {request.world_size} at start {request.epoch}, process {request.pid}"
    return Change(record, (*events, Event(kind="worker_registered", text=text)))


def _check_epoch(record: RunRecord, epoch: int) -> None:
    if epoch < record.epoch:
        raise Refusal(
            grpc.StatusCode.ABORTED,
            f"start {epoch} of run {record.name!r} is over: {record.epoch} is the newest. If its run directory was "
            "deleted, so that counting began anew, or the clock that numbers a library user's starts was set back, give"
            " the run another name or the controller another file",
        )


def _check_not_far_ahead(record: RunRecord, epoch: int) -> None:
    """Refuses a number that no start can have come to: all later starts would be refused for it."""
    most = largest_epoch(record.epoch, in_directory=bool(record.directory), now_ns=time.time_ns())
    if epoch > most:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"epoch is {epoch}; the newest start of run {record.name!r} is {record.epoch}, and the next one may be "
            f"{most} at most, by this machine's clock or by those that its directory counts; give a smaller number, set"
            " the clocks of both machines right, or give the run another name",
        )

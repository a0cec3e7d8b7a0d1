"""RunService: users create, watch and steer runs."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from typing_extensions import override

from kfdist.checks import count
from kfdist.control import run_rules, steering, validation
from kfdist.control.control_records import Change, RunRecord, timestamp
from kfdist.control.exporter import Exporter
from kfdist.control.ledger import Ledger
from kfdist.control.mutations import Request
from kfdist.rpc._generated.kfdist.v1 import run_pb2, run_pb2_grpc
from kfdist.rpc.authentication import caller_of
from kfdist.rpc.beats import changes_of, sample_messages
from kfdist.rpc.status import answers, streams
from kfdist.types import Desired

EVENTS_PER_CALL = 1000
"""Most events in one answer, as run.proto says."""


class RunService(run_pb2_grpc.RunServiceServicer):
    """The service of protos/kfdist/v1/run.proto, which documents the calls."""

    def __init__(self, ledger: Ledger, exporter: Exporter) -> None:
        """Serves ledger and exporter; holds no state."""
        self._ledger = ledger
        self._exporter = exporter

    @override
    @answers
    async def Create(self, request: run_pb2.CreateRequest, context: Any) -> run_pb2.CreateResponse:
        del context
        validation.check_create(request)

        def rule(record: RunRecord | None) -> Change:
            return run_rules.created(
                record,
                name=request.name,
                directory=request.directory,
                total_steps=request.total_steps,
                now_ns=time.time_ns(),
            )

        run = await self._ledger.change(
            request.name, rule, request=Request.of("Create", request), config=request.config
        )
        return run_pb2.CreateResponse(run=run)

    @override
    @answers
    async def Get(self, request: run_pb2.GetRequest, context: Any) -> run_pb2.GetResponse:
        del context
        return run_pb2.GetResponse(run=self._ledger.run(request.name).message())

    @override
    @answers
    async def List(self, request: run_pb2.ListRequest, context: Any) -> run_pb2.ListResponse:
        del request, context
        return run_pb2.ListResponse(runs=[record.message() for record in self._ledger.runs()])

    @override
    @streams
    async def Watch(self, request: run_pb2.WatchRequest, context: Any) -> AsyncGenerator[run_pb2.WatchResponse]:
        del context
        count("from_revision", request.from_revision, least=0)
        async with aclosing(self._ledger.watch(request.name, request.from_revision)) as changes:
            async for run in changes:
                yield run_pb2.WatchResponse(run=run)

    @override
    @answers
    async def Pause(self, request: run_pb2.PauseRequest, context: Any) -> run_pb2.PauseResponse:
        return run_pb2.PauseResponse(run=await self._wish("Pause", request, context, Desired.PAUSED))

    @override
    @answers
    async def Resume(self, request: run_pb2.ResumeRequest, context: Any) -> run_pb2.ResumeResponse:
        return run_pb2.ResumeResponse(run=await self._wish("Resume", request, context, Desired.RUNNING))

    @override
    @answers
    async def UpdateSettings(
        self, request: run_pb2.UpdateSettingsRequest, context: Any
    ) -> run_pb2.UpdateSettingsResponse:
        validation.check_names(request.as_configured)
        changes, who = changes_of(request), caller_of(context)

        def rule(record: RunRecord) -> Change:
            validation.check_changes(changes, record.in_force)
            if changes.get("adoption") == "fixed-lag":
                validation.check_owners_compute_alike(record, self._ledger.live_owners())
            return steering.tuned(record, changes, who)

        return run_pb2.UpdateSettingsResponse(run=await self._steer("UpdateSettings", request, rule))

    @override
    @answers
    async def Checkpoint(self, request: run_pb2.CheckpointRequest, context: Any) -> run_pb2.CheckpointResponse:
        who = caller_of(context)
        run = await self._steer("Checkpoint", request, lambda record: steering.checkpointed(record, who))
        return run_pb2.CheckpointResponse(run=run)

    @override
    @answers
    async def Refresh(self, request: run_pb2.RefreshRequest, context: Any) -> run_pb2.RefreshResponse:
        who = caller_of(context)

        def rule(record: RunRecord) -> Change:
            known = [spec.name for spec in self._ledger.assignment(record.name).groups]
            return steering.refreshed(record, validation.matching_groups(request.groups, known), who)

        return run_pb2.RefreshResponse(run=await self._steer("Refresh", request, rule))

    @override
    @answers
    async def Replan(self, request: run_pb2.ReplanRequest, context: Any) -> run_pb2.ReplanResponse:
        validation.check_request_id(request.request_id)
        run = await self._ledger.replan(request.name, caller_of(context), Request.of("Replan", request))
        return run_pb2.ReplanResponse(run=run)

    @override
    @answers
    async def Stop(self, request: run_pb2.StopRequest, context: Any) -> run_pb2.StopResponse:
        return run_pb2.StopResponse(run=await self._wish("Stop", request, context, Desired.STOPPED))

    @override
    @answers
    async def ListEvents(self, request: run_pb2.ListEventsRequest, context: Any) -> run_pb2.ListEventsResponse:
        del context
        name = self._ledger.run(request.name).name
        events = await self._ledger.events(name, request.after_event_id, EVENTS_PER_CALL)
        return run_pb2.ListEventsResponse(
            events=[
                run_pb2.Event(event_id=each.event_id, time=timestamp(each.time_ns), kind=each.kind, text=each.text)
                for each in events
            ]
        )

    @override
    @answers
    async def ListSamples(self, request: run_pb2.ListSamplesRequest, context: Any) -> run_pb2.ListSamplesResponse:
        del context
        samples = self._exporter.samples(self._ledger.run(request.name).name)
        return run_pb2.ListSamplesResponse(samples=sample_messages(samples))

    async def _wish(self, method: str, request: Any, context: Any, wish: Desired) -> run_pb2.Run:
        who = caller_of(context)
        return await self._steer(method, request, lambda record: steering.desired(record, wish, who))

    async def _steer(self, method: str, request: Any, rule: Callable[[RunRecord], Change]) -> run_pb2.Run:
        validation.check_request_id(request.request_id)
        name = self._ledger.run(request.name).name

        def known(record: RunRecord | None) -> Change:
            assert record is not None  # runs are never removed
            return rule(record)

        return await self._ledger.change(name, known, request=Request.of(method, request))

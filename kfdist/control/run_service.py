"""RunService: people create, watch and steer runs."""

import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.message import Message

from kfdist.control import run_rules, validation
from kfdist.control.ledger import Ledger, Request
from kfdist.control.protos import event_message, run_message
from kfdist.control.run_rules import Change, RunRecord
from kfdist.rpc._generated.kfdist.v1 import run_pb2, run_pb2_grpc
from kfdist.rpc.status import answers, streams
from kfdist.types import Desired

EVENTS_PER_CALL = 1000


class RunService(run_pb2_grpc.RunServiceServicer):
    """The service of protos/kfdist/v1/run.proto."""

    def __init__(self, ledger: Ledger) -> None:
        """Serves this ledger; keeps nothing itself."""
        self._ledger = ledger

    @answers
    async def Create(self, request: run_pb2.CreateRequest, context: Any) -> run_pb2.CreateResponse:
        """Makes a run known, or prepares a known one for its next start."""
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
            request.name, rule, request=_identity("Create", request.request_id, request), config=request.config
        )
        return run_pb2.CreateResponse(run=run)

    @answers
    async def Get(self, request: run_pb2.GetRequest, context: Any) -> run_pb2.GetResponse:
        """Gets one run."""
        del context
        return run_pb2.GetResponse(run=run_message(self._ledger.run(request.name)))

    @answers
    async def List(self, request: run_pb2.ListRequest, context: Any) -> run_pb2.ListResponse:
        """Lists all runs, the newest first."""
        del request, context
        return run_pb2.ListResponse(runs=[run_message(record) for record in self._ledger.runs()])

    @streams
    async def Watch(self, request: run_pb2.WatchRequest, context: Any) -> AsyncGenerator[run_pb2.WatchResponse]:
        """Sends a run at every change."""
        del context
        validation.check_revision(request.from_revision)
        async with aclosing(self._ledger.watch(request.name, request.from_revision)) as changes:
            async for run in changes:
                yield run_pb2.WatchResponse(run=run)

    @answers
    async def Pause(self, request: run_pb2.PauseRequest, context: Any) -> run_pb2.PauseResponse:
        """Asks all ranks to wait at the same step."""
        del context
        return run_pb2.PauseResponse(run=await self._wish("Pause", request, Desired.PAUSED))

    @answers
    async def Resume(self, request: run_pb2.ResumeRequest, context: Any) -> run_pb2.ResumeResponse:
        """Lets a paused run go on."""
        del context
        return run_pb2.ResumeResponse(run=await self._wish("Resume", request, Desired.RUNNING))

    @answers
    async def UpdateSettings(
        self, request: run_pb2.UpdateSettingsRequest, context: Any
    ) -> run_pb2.UpdateSettingsResponse:
        """Changes the damping."""
        del context
        damping = validation.check_damping(request)
        run = await self._steer("UpdateSettings", request, lambda record: run_rules.damped(record, damping))
        return run_pb2.UpdateSettingsResponse(run=run)

    @answers
    async def Checkpoint(self, request: run_pb2.CheckpointRequest, context: Any) -> run_pb2.CheckpointResponse:
        """Asks for a checkpoint."""
        del context
        return run_pb2.CheckpointResponse(run=await self._steer("Checkpoint", request, run_rules.checkpointed))

    @answers
    async def Stop(self, request: run_pb2.StopRequest, context: Any) -> run_pb2.StopResponse:
        """Asks all ranks to write a checkpoint and end at the same step."""
        del context
        return run_pb2.StopResponse(run=await self._wish("Stop", request, Desired.STOPPED))

    @answers
    async def ListEvents(self, request: run_pb2.ListEventsRequest, context: Any) -> run_pb2.ListEventsResponse:
        """Lists what happened in a run, oldest first, at most EVENTS_PER_CALL at a time."""
        del context
        name = self._ledger.run(request.name).name
        events = await self._ledger.events(name, request.after_event_id, EVENTS_PER_CALL)
        return run_pb2.ListEventsResponse(events=[event_message(event) for event in events])

    async def _wish(self, method: str, request: Any, wish: Desired) -> run_pb2.Run:
        return await self._steer(method, request, lambda record: run_rules.desired(record, wish))

    async def _steer(self, method: str, request: Any, rule: Callable[[RunRecord], Change]) -> run_pb2.Run:
        validation.check_request_id(request.request_id)
        name = self._ledger.run(request.name).name

        def known(record: RunRecord | None) -> Change:
            assert record is not None  # runs are never removed
            return rule(record)

        return await self._ledger.change(name, known, request=_identity(method, request.request_id, request))


def _identity(method: str, request_id: str, request: Message) -> Request:
    content = f"{method}\n".encode() + request.SerializeToString(deterministic=True)
    return Request(request_id=request_id, digest=hashlib.sha256(content).hexdigest())

"""InversionService as an owner serves it: payloads in, one inversion at a time, results out. Needs no Ray."""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from kfdist.checks import count, number
from kfdist.owner.executor import DeadlineExceeded, Execution, ExecutionFailed, Executor, PayloadRefused
from kfdist.owner.fair_room import FairRoom
from kfdist.policies.epochs import largest_epoch
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2
from kfdist.rpc.chunking import Assembler, PayloadError, split
from kfdist.rpc.status import Refusal, answers, streams
from kfdist.telemetry.tracing import HEADER, Hop, Tracing
from kfdist.types import MAX_DEADLINE_SECONDS

_LONGEST_NAME = 1024
_LONGEST_DEADLINE_MILLISECONDS = MAX_DEADLINE_SECONDS * 1000
_EPOCHS_KEPT = 1024

MAX_OUTLINE_BYTES = 8 << 20
"""Longest header of a payload, which says what is in it: reading one of JSON takes up to thirty times its size. A job
has less than a kilobyte for each of its blocks."""


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """How much an owner accepts.

    Attributes:
        payload_bytes: Largest payload of one job.
        buffered_bytes: Payloads held at a time; further ones wait on the wire. A single payload is always accepted.
        kept_bytes: Results kept for couriers that ask again.
        idle_seconds: How long a sender may pause between two messages.
        slowest_bytes_per_second: How slowly a payload may arrive on the whole, as others may wait for its room.
    """

    payload_bytes: int = 4 << 30
    buffered_bytes: int = 4 << 30
    kept_bytes: int = 256 << 20
    idle_seconds: float = 30.0
    slowest_bytes_per_second: float = 1e6


@dataclass(kw_only=True)
class _Running:
    """An inversion that runs or waits for its turn, and how many calls wait for it."""

    task: asyncio.Task[Execution]
    waiters: int = 0
    begun: bool = False


class InversionServicer:
    """Serves inversions to couriers. Lives in one event loop.

    Attributes:
        peers: The owners it knows of, by name, itself among them; set by others.
        completed: Inversions that gave a result.
        failed: Inversions that didn't, by reason.
        processes_lost: Inversion processes that were killed or crashed, by the run whose job they had.
        tracing: Makes a span of each hop of a job here.
    """

    def __init__(self, owner_id: str, executor: Executor, limits: ServiceLimits | None = None) -> None:
        """Begins without jobs; uses the executor from one thread at a time."""
        self.tracing = Tracing("kfdist-owner", owner=owner_id)
        self.peers: dict[str, inversion_pb2.Owner] = {}
        self.completed = 0
        self.failed: Counter[str] = Counter()
        self.processes_lost: Counter[str] = Counter()
        self._owner_id = owner_id
        self._executor = executor
        self._limits = limits or ServiceLimits()
        self._turn = FairRoom(1)
        self._room = FairRoom(self._limits.buffered_bytes)
        self._running: dict[str, _Running] = {}
        self._kept: OrderedDict[str, Execution] = OrderedDict()
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._fingerprint = ""

    @property
    def queue_depth(self) -> int:
        """Inversions that run or wait for their turn."""
        return len(self._running)

    def set_fingerprint(self, fingerprint: str) -> None:
        """Records what the executor's numbers depend on; until then this owner refuses jobs, which go to others."""
        self._fingerprint = fingerprint

    def set_peers(self, owners: Iterable[inversion_pb2.Owner]) -> None:
        """Records the live owners; an empty list is ignored."""
        self.peers = {owner.owner_id: owner for owner in owners} or self.peers

    def change_peers(self, owners: Iterable[inversion_pb2.Owner], gone: Iterable[str] = ()) -> None:
        """Records some owners that live and some that don't; what is known of others stays."""
        self.peers |= {owner.owner_id: owner for owner in owners}
        for owner_id in gone:
            self.peers.pop(owner_id, None)

    @answers
    async def ListPeers(self, request: Any, context: Any) -> inversion_pb2.ListPeersResponse:
        """Lists the owners this owner knows of."""
        del request, context
        return inversion_pb2.ListPeersResponse(owners=self.peers.values())

    @streams
    async def Invert(self, request_iterator: Any, context: Any) -> AsyncGenerator[inversion_pb2.InvertResponse]:
        """Inverts one group; see inversion.proto."""
        hop = self.tracing.begin("owner", parent=dict(context.invocation_metadata() or ()).get(HEADER, ""))
        fault = "the call was broken off"
        try:
            requests = _Requests(request_iterator, self._limits)
            header = await requests.header()
            self._check(header)
            done = await self._execution(header, requests, hop)
            for part in self._answer(done):
                yield part
            fault = ""
        except Exception as error:
            fault = str(error)
            raise
        finally:
            hop.end(fault=fault)

    def _answer(self, done: Execution) -> Iterator[inversion_pb2.InvertResponse]:
        yield inversion_pb2.InvertResponse(
            header=inversion_pb2.InvertResultHeader(
                payload_bytes=len(done.result), digest=done.digest, seconds=done.seconds, owner_id=self._owner_id
            )
        )
        for chunk in split(done.result):
            yield inversion_pb2.InvertResponse(chunk=chunk)

    def _check(self, header: inversion_pb2.InvertHeader) -> None:
        """Refuses what must not be accepted, before memory is allocated for it."""
        for field in ("run", "group"):
            number(field, len(getattr(header, field)), least=1, most=_LONGEST_NAME, hint="how many characters it has")
        for field in ("epoch", "version"):
            count(field, getattr(header, field), least=0)
        number("deadline_milliseconds", header.deadline_milliseconds, least=1, most=_LONGEST_DEADLINE_MILLISECONDS)
        count("payload_bytes", header.payload_bytes, least=1, hint="a job is never empty")
        if not self._fingerprint:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"the inversion process of {self._owner_id} is starting")
        if header.fingerprint and header.fingerprint != self._fingerprint:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the job needs an owner of fingerprint {header.fingerprint!r}; "
                f"{self._owner_id} has {self._fingerprint!r}",
            )
        self._check_epoch(header.run, header.epoch)

    def _check_epoch(self, run: str, epoch: int) -> None:
        known = self._epochs.get(run, 0)
        number("epoch", epoch, least=0, most=largest_epoch(known, in_directory=False, now_ns=time.time_ns()))
        newest = max(epoch, known)
        self._epochs.pop(run, None)  # so that it comes last
        self._epochs[run] = newest
        while len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.popitem(last=False)
        if epoch < newest:
            raise Refusal(
                grpc.StatusCode.ABORTED,
                f"run {run!r} was started again: this call is of epoch {epoch}, {self._owner_id} has seen {newest}",
            )

    async def _execution(self, header: inversion_pb2.InvertHeader, requests: "_Requests", hop: Hop) -> Execution:
        """Returns a job's execution: a kept one, that of a running call, or a new one."""
        key = f"{header.run}/{header.epoch}/{header.group}/{header.version}/{header.digest}"
        if key not in self._kept and key not in self._running:
            assembler = Assembler(header.payload_bytes, header.digest, limit_bytes=self._limits.payload_bytes)
            await self._room.enter(header.run, header.payload_bytes)
            taken = False
            try:
                payload = await requests.payload(assembler)
                if key not in self._kept and key not in self._running:  # a duplicate may have been faster
                    self._begin(key, header.run, payload, header.deadline_milliseconds / 1000, hop)
                    taken = True
            finally:
                if not taken:
                    self._room.leave(header.payload_bytes)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return await self._join(key)

    def _begin(self, key: str, run: str, payload: bytearray, deadline_seconds: float, hop: Hop) -> None:
        async def invert() -> Execution:
            await self._turn.enter(run, 1)
            in_child, fault = self.tracing.begin("child", parent=hop), ""
            try:
                running.begun = True
                execution = await asyncio.to_thread(self._executor.run, payload, deadline_seconds)
            except ExecutionFailed as failure:
                fault = str(failure)
                raise self._refusal(run, failure) from failure
            finally:
                in_child.end(fault=fault)
                self._turn.leave(1)
            self._keep(key, execution)
            return execution

        def end(task: asyncio.Task[Execution]) -> None:
            # A callback, as a task that is cancelled before its first step never enters its own `finally`.
            self._room.leave(len(payload))
            if self._running.get(key) is running:
                del self._running[key]
            if not task.cancelled():
                task.exception()  # Retrieved, since asyncio would complain where no caller is left to do so.

        running = self._running[key] = _Running(task=asyncio.create_task(invert()))
        running.task.add_done_callback(end)

    async def _join(self, key: str) -> Execution:
        """Waits for a running inversion, which is dropped if its last caller leaves before it has begun."""
        running = self._running[key]
        running.waiters += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if running.waiters == 0 and not running.begun:
                self._running.pop(key, None)
                running.task.cancel()

    def _keep(self, key: str, execution: Execution) -> None:
        self._kept[key] = execution
        self.completed += 1
        while len(self._kept) > 1 and sum(len(kept.result) for kept in self._kept.values()) > self._limits.kept_bytes:
            self._kept.popitem(last=False)

    def _refusal(self, run: str, failure: ExecutionFailed) -> Refusal:
        match failure:
            case DeadlineExceeded():
                reason, code = "deadline", grpc.StatusCode.DEADLINE_EXCEEDED
            case PayloadRefused():
                reason, code = "refused", grpc.StatusCode.INVALID_ARGUMENT
            case _:
                reason, code = "crash", grpc.StatusCode.INTERNAL
        self.failed[reason] += 1
        if failure.process_lost:
            self.processes_lost[run] += 1
        return Refusal(code, f"{self._owner_id}: {failure}")


class _Requests:
    """The request stream of one call, message by message."""

    def __init__(self, request_iterator: Any, limits: ServiceLimits) -> None:
        self._iterator = aiter(request_iterator)
        self._idle_seconds = limits.idle_seconds
        self._slowest = limits.slowest_bytes_per_second

    async def _next(self) -> inversion_pb2.InvertRequest | None:
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(self._iterator, None)
        except TimeoutError:
            raise PayloadError(f"nothing was sent for {self._idle_seconds:g} s in the middle of a payload") from None

    async def header(self) -> inversion_pb2.InvertHeader:
        first = await self._next()
        part = first.WhichOneof("part") if first is not None else None
        if first is None or part != "header":
            raise PayloadError(f"the first message is {part or 'empty'}; it must be the header")
        return first.header

    async def payload(self, assembler: Assembler) -> bytearray:
        # Twice, for a sender that has fallen silent to be told so, however small its payload is.
        seconds = 2 * self._idle_seconds + assembler.missing / self._slowest
        try:
            async with asyncio.timeout(seconds):
                while (request := await self._next()) is not None:
                    part = request.WhichOneof("part")
                    if part != "chunk":
                        raise PayloadError(f"a message after the first is {part or 'empty'}; it must be a chunk")
                    assembler.add(request.chunk)
        except TimeoutError:
            raise PayloadError(
                f"{assembler.missing} bytes of the payload were missing after {seconds:g} s; it must arrive at "
                f"{self._slowest:g} bytes a second at least"
            ) from None
        payload = assembler.finish()
        if (outline := int.from_bytes(payload[:8], "little")) > MAX_OUTLINE_BYTES:
            raise PayloadError(
                f"the payload is no kfdist job: its header has {outline} bytes; at most {MAX_OUTLINE_BYTES} are read"
            )
        return payload

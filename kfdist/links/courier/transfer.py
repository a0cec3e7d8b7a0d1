"""One attempt at one job: its payload to an owner, the result back, and what each way of failing means."""

import asyncio
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Any

import grpc
import grpc.aio

from kfdist.links.link import LinkCounters
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2
from kfdist.rpc.chunking import Assembler, PayloadError, PayloadTooLarge, split
from kfdist.rpc.status import code_of, details_of

MAX_RESULT_BYTES = 1 << 33
"""Largest result taken; the inverse of the largest layer that fits into a GPU is far smaller."""

_SLACK_SECONDS = 600.0
"""What a call may take beyond its inversion: the owner's queue and both transfers. Owners that are dead, stopped or cut
off are noticed long before, by keepalive and by the list of live owners; this only bounds what nobody foresaw."""


class Reason(StrEnum):
    """Why a job goes out again."""

    OWNER_LOST = "owner_lost"
    DEADLINE = "deadline"
    CRASH = "crash"
    CORRUPT = "corrupt"
    REFUSED = "refused"
    FINGERPRINT = "fingerprint"
    STALE_EPOCH = "stale_epoch"
    TOO_LARGE = "too_large"


class AttemptFailed(Exception):
    """An attempt that gave no result.

    Attributes:
        reason: Why.
        owner_at_fault: Whether other jobs had better leave the owner alone for a while, too.
    """

    def __init__(self, reason: Reason, message: str, *, owner_at_fault: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.owner_at_fault = owner_at_fault


async def attempt(
    stub: Any,
    header: inversion_pb2.InvertHeader,
    payload: memoryview,
    count: Callable[[LinkCounters], None],
    metadata: tuple[tuple[str, str], ...] = (),
) -> tuple[inversion_pb2.InvertResultHeader, bytearray]:
    """Has one owner do one job, and returns its answer, verified.

    Args:
        stub: The owner's InversionServiceStub.
        header: The job.
        payload: Its input.
        count: Called with the payload bytes of each message.
        metadata: Of the call.

    Raises:
        AttemptFailed: No verified result came of it.
    """
    seconds = header.deadline_milliseconds / 1000 + _SLACK_SECONDS
    call = stub.Invert(_messages(header, payload, count), timeout=seconds, metadata=metadata)
    try:
        return await _collect(call, count)
    except (PayloadError, PayloadTooLarge) as error:
        raise AttemptFailed(Reason.CORRUPT, str(error)) from error
    except grpc.aio.AioRpcError as error:
        raise _failure(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # gRPC raises this, too, when the channel under the call is closed: the owner has left the directory.
        raise AttemptFailed(Reason.OWNER_LOST, "the owner is no longer listed") from None
    finally:
        call.cancel()


async def _messages(
    header: inversion_pb2.InvertHeader, payload: memoryview, count: Callable[[LinkCounters], None]
) -> AsyncIterator[inversion_pb2.InvertRequest]:
    yield inversion_pb2.InvertRequest(header=header)
    for chunk in split(payload):
        yield inversion_pb2.InvertRequest(chunk=chunk)
        count(LinkCounters(bytes_sent=len(chunk)))


async def _collect(
    call: Any, count: Callable[[LinkCounters], None]
) -> tuple[inversion_pb2.InvertResultHeader, bytearray]:
    assembler: Assembler | None = None
    header = inversion_pb2.InvertResultHeader()
    async for response in call:
        match response.WhichOneof("part"):
            case "header" if assembler is None:
                header = response.header
                assembler = Assembler(header.payload_bytes, header.digest, limit_bytes=MAX_RESULT_BYTES)
            case "chunk" if assembler is not None:
                assembler.add(response.chunk)
                count(LinkCounters(bytes_received=len(response.chunk)))
            case part:
                raise PayloadError(f"an owner answered with {part or 'nothing'} out of order")
    if assembler is None:
        raise PayloadError("an owner answered with nothing")
    return header, assembler.finish()


_MEANING: dict[grpc.StatusCode, tuple[Reason, bool]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (Reason.DEADLINE, False),
    grpc.StatusCode.INTERNAL: (Reason.CRASH, False),
    grpc.StatusCode.INVALID_ARGUMENT: (Reason.REFUSED, False),
    grpc.StatusCode.FAILED_PRECONDITION: (Reason.FINGERPRINT, False),
    grpc.StatusCode.ABORTED: (Reason.STALE_EPOCH, False),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Reason.TOO_LARGE, False),
}


def _failure(error: grpc.aio.AioRpcError) -> AttemptFailed:
    code = code_of(error)
    reason, owner_at_fault = _MEANING.get(code, (Reason.OWNER_LOST, True))
    return AttemptFailed(reason, f"{code.name}: {details_of(error)}", owner_at_fault=owner_at_fault)

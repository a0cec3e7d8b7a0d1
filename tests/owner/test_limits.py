"""What an owner is sent costs it memory only as far as it arrives, and time only as long as it arrives in earnest."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kfdist.owner.inversion_service import MAX_OUTLINE_BYTES, ServiceLimits
from kfdist.rpc._generated.kfdist.v1.inversion_pb2 import InvertHeader, InvertRequest
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import InversionServiceStub
from kfdist.rpc.channels import open_aio_channel
from kfdist.rpc.chunking import digest_of, split
from kfdist.system.credentials import Role
from kfdist.types import CHUNK_BYTES
from tests.support.owners import start_echo

PAGE = 4096
Requests = AsyncIterator[InvertRequest]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def header(size: int, digest: str, group: str = "group") -> InvertRequest:
    return InvertRequest(
        header=InvertHeader(
            run="r", epoch=1, group=group, digest=digest, payload_bytes=size, deadline_milliseconds=1000
        )
    )


async def refusal(stub: InversionServiceStub, call: Callable[[], Requests]) -> str:
    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Invert(call(), timeout=20):
                pass
        if caught.value.code() is not grpc.StatusCode.INTERNAL:  # gRPC's own, where a write is under way at the end
            break
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


def refused(limits: ServiceLimits, *calls: Callable[[], Requests]) -> list[str]:
    """Makes calls at a time, to an owner that must refuse all of them, and returns the messages."""

    async def told() -> list[str]:
        server, servicer, address = await start_echo(None, limits)
        try:
            async with open_aio_channel(address, server=Role.OWNER) as channel:
                stub = InversionServiceStub(channel)
                messages = await asyncio.gather(*(refusal(stub, call) for call in calls))
            assert servicer.completed == 0 and servicer.queue_depth == 0
            return messages
        finally:
            await server.stop(None)

    return asyncio.run(told())


def test_promised_payloads_that_never_come_take_no_memory():
    before, peak = resident_bytes(), 0

    async def promise(index: int) -> Requests:
        nonlocal peak
        yield header(4 << 30, "0" * 64, f"group{index}")
        yield InvertRequest(chunk=bytes(CHUNK_BYTES))
        await asyncio.sleep(0.5)
        peak = max(peak, resident_bytes())
        await asyncio.sleep(20)

    limits = ServiceLimits(buffered_bytes=1 << 40, idle_seconds=1.0)
    messages = refused(limits, *(partial(promise, index) for index in range(20)))  # 80 GiB
    assert all("nothing was sent for 1 s" in message for message in messages)
    assert 0 < peak < before + (200 << 20)


def test_a_payload_that_trickles_is_refused():
    async def trickle() -> Requests:
        yield header(1000, "0" * 64)
        while True:
            await asyncio.sleep(0.05)
            yield InvertRequest(chunk=b"x")

    (message,) = refused(ServiceLimits(idle_seconds=0.3, slowest_bytes_per_second=5000), trickle)
    assert "of the payload were missing after 0.8 s; it must arrive at 5000 bytes a second at least" in message


@pytest.mark.parametrize("claimed", [MAX_OUTLINE_BYTES + 1, 1 << 62])
def test_a_header_of_a_hundred_thousand_blocks_is_not_read(claimed: int):
    data = claimed.to_bytes(8, "little") + b"[" * (1 << 20)

    async def whole() -> Requests:
        yield header(len(data), digest_of(data))
        for chunk in split(data):
            yield InvertRequest(chunk=chunk)

    (message,) = refused(ServiceLimits(), whole)
    assert f"no kfdist job: its header has {claimed} bytes; at most {MAX_OUTLINE_BYTES} are read" in message

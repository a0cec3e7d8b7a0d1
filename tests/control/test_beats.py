"""The heartbeat stream against a real gRPC server, and the words of kfdist.types as messages and back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from kfdist.rpc import beats
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, membership_pb2_grpc
from kfdist.rpc.beats import BeatStream
from kfdist.rpc.channels import open_aio_channel
from kfdist.system.credentials import Role
from kfdist.types import Desired, GroupSpec, MetricSample, RunSettings

WORKER = membership_pb2.WorkerBeat(run="r", epoch=1, worker_rank=0, step=7, phase="running")

Answer = Callable[[int, Any], Awaitable[membership_pb2.HeartbeatResponse | None]]
"""What the server does with the beat of a number: answers, ends the stream (None), or aborts through the context."""


class Scripted(membership_pb2_grpc.MembershipServiceServicer):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.heard: list[membership_pb2.HeartbeatRequest] = []
        self.ended = asyncio.Event()

    async def Heartbeat(self, request_iterator: Any, context: Any) -> AsyncIterator[membership_pb2.HeartbeatResponse]:
        try:
            async for request in request_iterator:
                self.heard.append(request)
                response = await self.answer(len(self.heard), context)
                if response is None:
                    return
                yield response
        finally:
            self.ended.set()


async def revision(number: int, context: Any) -> membership_pb2.HeartbeatResponse:
    return membership_pb2.HeartbeatResponse(assignment_revision=number)


def converse(answer: Answer, talk: Callable[[BeatStream, Scripted], Awaitable[None]]) -> Scripted:
    """Serves, opens a stream, lets `talk` use it, and returns the server with all that it heard."""

    async def run() -> Scripted:
        server = grpc.aio.server()
        servicer = Scripted(answer)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with open_aio_channel(f"127.0.0.1:{port}", server=Role.CONTROLLER) as channel:
                await talk(BeatStream(membership_pb2_grpc.MembershipServiceStub(channel)), servicer)
        finally:
            await server.stop(None)
        return servicer

    return asyncio.run(run())


def test_every_beat_is_sent_with_its_samples_and_has_its_own_answer() -> None:
    async def talk(stream: BeatStream, server: Scripted) -> None:
        samples = [MetricSample(name="kfdist_loss", value=0.5, labels={"b": "2", "a": "1"})]
        assert (await stream.beat(WORKER, samples)).assignment_revision == 1
        assert (await stream.beat(membership_pb2.OwnerBeat(owner_id="owner-0"), [])).assignment_revision == 2

    first, second = converse(revision, talk).heard
    assert first.worker == WORKER and first.WhichOneof("member") == "worker"
    assert [(each.name, each.value, dict(each.labels)) for each in first.samples] == [
        ("kfdist_loss", 0.5, {"a": "1", "b": "2"})
    ]
    assert (second.WhichOneof("member"), second.owner.owner_id, len(second.samples)) == ("owner", "owner-0", 0)


@pytest.mark.parametrize(
    ("code", "details"),
    [(grpc.StatusCode.ABORTED, "start 1 is over"), (grpc.StatusCode.OK, "the controller ended the stream")],
)
def test_a_stream_that_the_controller_ends_says_so_at_this_beat_and_at_each_later_one(
    code: grpc.StatusCode, details: str
) -> None:
    async def answer(number: int, context: Any) -> membership_pb2.HeartbeatResponse | None:
        if number == 1:
            return await revision(number, context)
        return None if code is grpc.StatusCode.OK else await context.abort(code, details)

    async def talk(stream: BeatStream, server: Scripted) -> None:
        await stream.beat(WORKER, [])
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.beat(WORKER, [])
            assert (caught.value.code(), caught.value.details()) == (code, details)

    assert len(converse(answer, talk).heard) == 2


def test_a_controller_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "_ANSWER_SECONDS", 0.3)

    async def answer(number: int, context: Any) -> membership_pb2.HeartbeatResponse:
        await asyncio.sleep(60)
        raise AssertionError("the client waited")

    async def talk(stream: BeatStream, server: Scripted) -> None:
        with pytest.raises(TimeoutError):
            await stream.beat(WORKER, [])

    assert len(converse(answer, talk).heard) == 1


def test_closing_ends_the_stream_at_the_controller() -> None:
    async def talk(stream: BeatStream, server: Scripted) -> None:
        await stream.beat(WORKER, [])
        assert not server.ended.is_set()
        stream.close()
        await asyncio.wait_for(server.ended.wait(), 10)

    converse(revision, talk)


def test_settings_travel_whole() -> None:
    settings = RunSettings(revision=4, desired=Desired.PAUSED, checkpoint_serial=2, changes={"damping": 0.25})
    assert beats.settings_of(beats.settings_message(settings)) == settings


def test_a_wish_of_a_later_version_counts_as_running() -> None:
    assert beats.settings_of(membership_pb2.RunSettings(desired="hover")).desired is Desired.RUNNING


def test_groups_travel_without_their_bytes() -> None:
    groups = (
        GroupSpec(name="fc", cost=2.5, position=3, bytes=400),
        GroupSpec(name="head", cost=1, position=4, bytes=8),
    )
    travelled = beats.groups_of(beats.group_messages(groups))
    assert [(each.name, each.cost, each.position, each.bytes) for each in travelled] == [
        ("fc", 2.5, 3, 0),
        ("head", 1.0, 4, 0),
    ]


def test_samples_travel_with_their_labels_in_order() -> None:
    sample = MetricSample(name="kfdist_inversion_residual", value=0.5, labels={"factor": "A", "block": "fc"})
    (travelled,) = beats.samples_of(beats.sample_messages([sample]))
    assert travelled == sample
    assert list(travelled.labels) == ["block", "factor"]

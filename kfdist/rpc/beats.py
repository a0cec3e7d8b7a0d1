"""The heartbeat stream to the controller, as ranks' couriers and owners hold it: a beat out, an answer back."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc

from kfdist.rpc._generated.kfdist.v1 import membership_pb2
from kfdist.rpc._generated.kfdist.v1.membership_pb2_grpc import MembershipServiceStub
from kfdist.types import MetricSample

BEAT_SECONDS = 1.0
"""How often members beat."""

_ANSWER_SECONDS = 10.0


class StreamEnded(Exception):
    """The controller ended the stream; a new one begins with a registration.

    Attributes:
        code: The status it ended with.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class BeatStream:
    """One stream of heartbeats."""

    def __init__(self, stub: MembershipServiceStub) -> None:
        """Opens the stream."""
        self._stream: Any = stub.Heartbeat()

    async def beat(
        self, member: membership_pb2.WorkerBeat | membership_pb2.OwnerBeat, samples: Sequence[MetricSample]
    ) -> membership_pb2.HeartbeatResponse:
        """Sends one beat and returns its answer.

        Args:
            member: Who beats, and where it stands.
            samples: What it has measured since the last beat.

        Raises:
            StreamEnded: The controller ended the stream.
            TimeoutError: It doesn't answer.
            grpc.aio.AioRpcError: The call failed.
        """
        request = membership_pb2.HeartbeatRequest(
            worker=member if isinstance(member, membership_pb2.WorkerBeat) else None,
            owner=member if isinstance(member, membership_pb2.OwnerBeat) else None,
            samples=[
                membership_pb2.Sample(name=sample.name, labels=dict(sample.labels), value=sample.value)
                for sample in samples
            ],
        )
        async with asyncio.timeout(_ANSWER_SECONDS):
            try:
                await self._stream.write(request)
                response = await self._stream.read()
            except asyncio.InvalidStateError:  # how gRPC says that the stream had ended before
                response = None
            if isinstance(response, membership_pb2.HeartbeatResponse):
                return response
            raise StreamEnded(await self._stream.code(), await self._stream.details())

    def close(self) -> None:
        """Ends the stream."""
        self._stream.cancel()

"""Keeps an owner known to the controller: registration and heartbeats, resumed after every fault."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

import grpc.aio

from kfdist.errors import EnvironmentFault
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2
from kfdist.rpc._generated.kfdist.v1.membership_pb2_grpc import MembershipServiceStub
from kfdist.rpc.beats import BEAT_SECONDS, BeatStream
from kfdist.rpc.channels import CALL_SECONDS, open_aio_channel
from kfdist.rpc.status import refusal_of
from kfdist.system.credentials import Credentials, Role
from kfdist.types import MetricSample

_LOG = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5


class Membership:
    """Keeps one owner known to the controller.

    Attributes:
        registered: Whether the controller has ever taken the registration.
        refusal: Why a controller that is there doesn't take it; empty if it does, or nobody is there.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        request: membership_pb2.RegisterOwnerRequest,
        *,
        measure: Callable[[], Sequence[MetricSample]],
        learn_peers: Callable[[Iterable[inversion_pb2.Owner]], None],
    ) -> None:
        """Begins without a connection.

        Args:
            address: Where the controller listens.
            credentials: What to show it; None for one that demands nothing.
            request: The registration.
            measure: Returns the samples for the next beat.
            learn_peers: Called with the live owners.
        """
        self.registered = False
        self.refusal = ""
        self._address = address
        self._credentials = credentials
        self._request = request
        self._measure = measure
        self._learn_peers = learn_peers

    async def run(self) -> None:
        """Registers and beats for ever; retries while the controller is away or restarting."""
        while True:
            answered = False
            try:
                async with open_aio_channel(self._address, self._credentials, server=Role.CONTROLLER) as channel:
                    stub = MembershipServiceStub(channel)
                    response = await stub.RegisterOwner(self._request, timeout=CALL_SECONDS)
                    self.registered, self.refusal, answered = True, "", True
                    self._learn_peers(response.owners)
                    await self._beat(stub)
            except EnvironmentFault as fault:
                self._tell(str(fault))  # of the files of the credentials
            except grpc.aio.AioRpcError as error:
                # It is away, or was restarted and doesn't know this owner: both begin with a registration. Or it wants
                # another certificate, or can't write to its disk.
                server, credentials = Role.CONTROLLER, self._credentials
                self._tell(await refusal_of(error, self._address, credentials, server=server, answered=answered))
            except TimeoutError:
                pass
            await asyncio.sleep(_PAUSE_SECONDS)

    def _tell(self, refusal: str) -> None:
        if refusal and refusal != self.refusal:
            _LOG.warning("%s isn't registered: %s", self._request.owner.owner_id, refusal)
        self.refusal = refusal

    async def _beat(self, stub: MembershipServiceStub) -> None:
        """Beats until the stream ends or the controller falls silent."""
        stream = BeatStream(stub)
        owner = self._request.owner
        standing = membership_pb2.OwnerBeat(owner_id=owner.owner_id, address=owner.address)
        try:
            while True:
                response = await stream.beat(standing, self._measure())
                self._learn_peers(response.owners)
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            stream.close()

"""Channels to kfdist's servers: limits, keepalive, and which calls gRPC may repeat by itself.

A call is repeated only on UNAVAILABLE, and only if doing it twice has the same effect as once: reads, registrations
(the newest wins), and mutations, which carry a request id that the controller answers once. `Invert` is never repeated:
gRPC would have to keep the payload for it, and the courier re-submits it, to another owner if need be.
"""

import json
from typing import Any

import grpc
import grpc.aio

from kfdist.rpc.authentication import channel_credentials
from kfdist.system.credentials import Credentials, Role
from kfdist.types import CHUNK_BYTES

MAX_MESSAGE_BYTES = 4 * CHUNK_BYTES
"""Largest message that either side accepts: a chunk, a thousand groups or a batch of samples, but never a tensor."""

CALL_SECONDS = 10.0
"""Deadline of a unary call whose caller has no better one."""

KEEPALIVE_SECONDS = 5
"""How long a connection is quiet before it is tried. Without that, a stream over a cut cable would hang for ever."""

KEEPALIVE_TIMEOUT_SECONDS = 5
"""How long the other side may leave it, or anything sent, without an answer: then calls end, and go elsewhere."""

_CONTROL = ("kfdist.v1.RunService", "kfdist.v1.MembershipService")
_REPEATABLE_OF_OTHERS = (("kfdist.v1.InversionService", "ListPeers"), ("grpc.health.v1.Health", "Check"))
_NEVER_REPEATED = (("kfdist.v1.MembershipService", "Heartbeat"), ("kfdist.v1.RunService", "Watch"))
"""Streams, which callers begin anew from where they were. Under a server that is killed again and again, gRPC repeating
them itself (1.85.1) left about one watch in hundreds without an answer, an error or the end of its deadline."""

_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.05s",
    "maxBackoff": "2s",
    "backoffMultiplier": 4,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

Options = list[tuple[str, Any]]


def service_config() -> str:
    """Returns the service config that channels carry, as JSON (https://grpc.io/docs/guides/service-config/).

    The entry that names a method wins over the one that names only its service.
    """
    repeated = [{"service": service} for service in _CONTROL]
    repeated += [{"service": service, "method": method} for service, method in _REPEATABLE_OF_OTHERS]
    once = [{"service": service, "method": method} for service, method in _NEVER_REPEATED]
    return json.dumps({"methodConfig": [{"name": repeated, "retryPolicy": _RETRY}, {"name": once}]})


def message_limits() -> Options:
    """Returns the options that limit messages, for channels and servers alike."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def channel_options() -> Options:
    """Returns the options of every channel between kfdist's processes."""
    return [
        *message_limits(),
        ("grpc.service_config", service_config()),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_http_proxy", 0),  # an http_proxy from the environment isn't meant for kfdist's own servers
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.http2.max_pings_without_data", 0),  # a quiet stream may be pinged for as long as it lives
        # A restarted server is found again within a second or two.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Channels to one address don't share a connection, nor its backoff and flow control.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def open_channel(
    address: str, credentials: Credentials | None = None, *, server: Role = Role.CONTROLLER
) -> grpc.Channel:
    """Opens a channel for synchronous calls; connects at the first one.

    Args:
        address: Where the server listens, "host:port".
        credentials: What this process shows; None for a server that demands nothing.
        server: What the server must be, by its certificate.

    Raises:
        EnvironmentFault: A file of the credentials is missing or unusable.
    """
    if credentials is None:
        return grpc.insecure_channel(address, options=channel_options())
    return grpc.secure_channel(address, channel_credentials(credentials), [*channel_options(), _must_be(server)])


def open_aio_channel(address: str, credentials: Credentials | None = None, *, server: Role) -> grpc.aio.Channel:
    """Opens a channel for asyncio; connects at the first call. As `open_channel`."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=channel_options())
    return grpc.aio.secure_channel(address, channel_credentials(credentials), [*channel_options(), _must_be(server)])


def _must_be(server: Role) -> tuple[str, str]:
    """Returns the option by which a certificate is asked for its role: it can't name an address nobody knew then."""
    return "grpc.ssl_target_name_override", server.host_name

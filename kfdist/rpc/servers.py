"""Servers of gRPC: their options, and binding them to an address or saying why that fails."""

import resource

import grpc.aio

from kfdist.errors import ConfigError
from kfdist.rpc.authentication import TokenInterceptor, server_credentials
from kfdist.rpc.certificate_faults import check_credentials
from kfdist.rpc.channels import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, Options, message_limits
from kfdist.system.addresses import UNPROTECTED, check_bindable, is_loopback, join_address, split_address, unbindable
from kfdist.system.credentials import Credentials

MAX_STREAMS_PER_CONNECTION = 1024

MAX_CALLS = 4096
"""Concurrent calls of a server: of the controller's, each rank and each owner holds one, of an owner's, each rank two.
Further ones are refused with RESOURCE_EXHAUSTED."""

MAX_CONNECTIONS = 8192
"""Connections of a server, those in their handshake included, or as many as the process may have files beside
`_OTHER_FILES`; further ones are closed at once."""

_OTHER_FILES = 256
"""Files that a server's process needs beside its connections: without any, it could neither write nor be asked."""

HANDSHAKE_SECONDS = 10
"""How long a peer may take to show its certificate."""


def server_options() -> Options:
    """Returns the options of every kfdist server."""
    return [
        *message_limits(),
        # By default a second server binds the same port without an error and gets half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", _room_for_connections()),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # Clients ping every KEEPALIVE_SECONDS; by default the server would treat that as abuse and drop them.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _room_for_connections() -> int:
    """Returns how many connections a server may have, and lets the process have files for them, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    if 0 <= soft < wanted:  # negative: without a limit
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft < 0 else min(MAX_CONNECTIONS, max(soft - _OTHER_FILES, soft // 2))


def make_server(credentials: Credentials | None) -> grpc.aio.Server:
    """Makes a server for asyncio that isn't bound yet.

    Args:
        credentials: Whose token callers must carry; None for none.

    Raises:
        EnvironmentFault: There is no token.
    """
    interceptors = [] if credentials is None else [TokenInterceptor(credentials)]
    return grpc.aio.server(interceptors=interceptors, options=server_options(), maximum_concurrent_rpcs=MAX_CALLS)


def check_protected(address: str, credentials: Credentials | None, *, path: str) -> tuple[str, int]:
    """Splits an address that only this machine can reach, or that is protected.

    Args:
        address: "host:port".
        credentials: What protects it; None for nothing.
        path: The configuration field it comes from, for the error.

    Raises:
        ConfigError: It isn't "host:port", or other machines could reach it without TLS and a token.
    """
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address: {error}", path=path) from None
    if credentials is None and not is_loopback(host):
        raise ConfigError(f"is {address!r}; {UNPROTECTED}", path=path)
    return host, port


def bind(
    server: grpc.aio.Server, address: str, credentials: Credentials | None = None, *, path: str = "control.address"
) -> str:
    """Binds a server to an address and returns the address with the real port.

    Args:
        server: The server, not yet started.
        address: "host:port"; port 0 takes any free one. On loopback unless there are credentials.
        credentials: Its certificate; None for none, and then it demands none.
        path: The configuration field to change if the address can't be had; empty if no field sets it.

    Raises:
        ConfigError: The address is malformed, or not on loopback and not protected.
        EnvironmentFault: The address is in use, or this machine doesn't have it; or the certificate can't be used.
    """
    host, port = check_protected(address, credentials, path=path)
    if credentials is not None:
        check_credentials(credentials)
    check_bindable(host, port, path=path)  # first, since gRPC itself would write to standard error
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, server_credentials(credentials))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise unbindable(host, port, path=path)
    return join_address(host, bound)

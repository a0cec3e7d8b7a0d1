"""Options of gRPC servers, and binding them to an address or saying why that fails."""

from typing import Protocol

from kfdist.errors import ConfigError
from kfdist.rpc.channels import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, Options, message_limits
from kfdist.system.addresses import check_bindable, is_loopback, join_address, split_address, unbindable

MAX_STREAMS_PER_CONNECTION = 1024


class Bindable(Protocol):
    """A gRPC server, synchronous or of asyncio."""

    def add_insecure_port(self, address: str) -> int:
        """Binds the server to an address and returns the port."""
        ...


def server_options() -> Options:
    """Returns the options of every kfdist server."""
    return [
        *message_limits(),
        # By default a second server binds the same port without an error and gets half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # Clients ping every KEEPALIVE_SECONDS; by default the server would treat that as abuse and drop them.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def check_loopback(address: str, *, path: str) -> tuple[str, int]:
    """Splits an address that only this machine can reach.

    Args:
        address: "host:port".
        path: The configuration field it comes from, for the error.

    Raises:
        ConfigError: It isn't "host:port", or other machines could reach it.
    """
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address: {error}", path=path) from None
    if not is_loopback(host):
        raise ConfigError(
            f"{address!r} can be reached from other machines, which needs TLS and a token; kfdist has neither yet, so "
            "only loopback (127.0.0.1, ::1, localhost) is allowed; from elsewhere, forward the port over SSH",
            path=path,
        )
    return host, port


def bind(server: Bindable, address: str, *, path: str = "control.address") -> str:
    """Binds a server to a loopback address and returns the address with the real port.

    Args:
        server: The server, not yet started.
        address: "host:port"; port 0 takes any free one.
        path: The configuration field to change if the address can't be had; empty if no field sets it.

    Raises:
        ConfigError: The address is malformed or not on loopback.
        EnvironmentFault: The address is in use, or this machine doesn't have it.
    """
    host, port = check_loopback(address, path=path)
    check_bindable(host, port, path=path)  # first, since gRPC itself would write to standard error
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise unbindable(host, port, path=path)
    return join_address(host, bound)

"""Addresses of servers as users write them, host:port, and whether this machine can bind them."""

import errno
import fcntl
import ipaddress
import socket
import struct
from typing import Any

from kfdist.errors import ConfigError, EnvironmentFault

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>

_LONGEST_LABEL = 63
"""Of a host's name; where one is longer, or empty, Python's resolver fails in its own words."""

UNPROTECTED = (
    "other machines can reach it, which needs TLS and a token: make them with `kfdist certs init DIR` and set "
    "security.certificates (KFDIST_SECURITY__CERTIFICATES), or stay on loopback (127.0.0.1, ::1, localhost) and "
    "forward the port over SSH"
)
"""Why an address is refused that isn't on loopback, and what to do."""


def split_address(address: str) -> tuple[str, int]:
    """Splits `host:port`; an IPv6 host stands in brackets.

    Raises:
        ValueError: It isn't of that form, the host can't be a name, or the port isn't in 0..65535.
    """
    host, separator, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 host goes in brackets, such as [::1]:7070")
    if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("write host:port with a port from 0 to 65535, such as 127.0.0.1:7070 (port 0: any free one)")
    if ":" not in host and not all(0 < len(label) <= _LONGEST_LABEL for label in host.removesuffix(".").split(".")):
        raise ValueError(f"a host's name has 1 to {_LONGEST_LABEL} characters between dots")
    return host, int(port)


def server_address(address: str, *, field: str) -> tuple[str, int]:
    """Splits the address of a server that is to be reached.

    Args:
        address: As given.
        field: Where, for the error.

    Raises:
        ConfigError: It isn't `host:port`, or its port is 0, by which a server lets the system choose one.
    """
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address: {error}", path=field) from None
    if port == 0:
        raise ConfigError(
            f"{address!r} has port 0, by which a server takes any free one; give the address that it printed at its "
            "start",
            path=field,
        )
    return host, port


def join_address(host: str, port: int) -> str:
    """Returns "host:port", an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def metrics_url(address: str) -> str:
    """Returns the URL of /metrics: HTTP where only this machine reaches it, else HTTPS."""
    host, _ = split_address(address)
    return f"{'http' if is_loopback(host) else 'https'}://{address}/metrics"


def is_loopback(host: str) -> bool:
    """Tells whether a host name or address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Returns the family of a host's sockets, IPv4's where it has such an address, and what they bind or connect to.

    Raises:
        OSError: It has no address.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address


def check_bindable(host: str, port: int, *, path: str) -> None:
    """Checks that a server could bind an address just now; port 0, any free one, always can.

    Args:
        host: Name or address of an interface of this machine.
        port: The port.
        path: The configuration field to change when the address can't be had; empty if no field sets it.

    Raises:
        EnvironmentFault: It is in use, or this machine doesn't have it.
    """
    if _obstacle(host, port):
        raise unbindable(host, port, path=path)


def unbindable(host: str, port: int, *, path: str) -> EnvironmentFault:
    """Returns the fault that says why an address could not be bound, and what to do; arguments as `check_bindable`."""
    reason = _obstacle(host, port) or "could not be bound; try again"
    advice = f", or choose another {path}, such as {join_address(host, 0)} (any free port)" if path else ""
    return EnvironmentFault(f"{join_address(host, port)} {reason}{advice}")


def _obstacle(host: str, port: int) -> str:
    """Returns why an address can't be bound just now, or an empty string."""
    try:
        family, address = socket_address(host, port)
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past don't count
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is in use by another process; end that one"
        return f"can't be bound ({error.strerror}); use one that this machine has"
    return ""


def interface_of(address: str) -> str:
    """Returns the name of the interface that has an IPv4 address, such as "eth0"; empty if none has it."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return ""


def address_towards(host: str, port: int) -> str:
    """Returns which of this machine's addresses it would be seen with by another; nothing is sent.

    Raises:
        OSError: There is no route.
    """
    family, address = socket_address(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]

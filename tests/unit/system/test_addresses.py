"""Addresses: host:port."""

import socket

import pytest

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.addresses import (
    address_towards,
    check_bindable,
    interface_of,
    is_loopback,
    join_address,
    server_address,
    split_address,
)


@pytest.mark.parametrize("address", ["127.0.0.1:7070", "[::1]:1", "some.host:65535"])
def test_splitting_and_joining(address: str):
    assert join_address(*split_address(address)) == address
    assert server_address(address, field="--address") == split_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":7070",
        "::1:7070",
        "host:65536",
        "host:-1",
        "host:٣",
        "a..b:70",
        f"{'x' * 64}.org:70",
    ],
)
def test_what_is_no_address(address: str):
    with pytest.raises(ConfigError, match="is no address") as caught:
        server_address(address, field="control.address")
    assert caught.value.path == "control.address" and repr(address) in str(caught.value)


def test_only_a_server_has_port_0():
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="--address: '127.0.0.1:0' has port 0"):
        server_address("127.0.0.1:0", field="--address")


def test_loopback():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""


def test_the_address_towards_this_machine_is_on_loopback():
    assert address_towards("127.0.0.1", 9) == "127.0.0.1"


def test_a_name_that_has_no_ipv4_address_is_bound_by_its_other_one(monkeypatch: pytest.MonkeyPatch):
    known = socket.getaddrinfo

    def resolve(host: str, *rest: object, **named: object) -> object:
        return known("::1" if host == "six.example" else host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"six.example:{port} is in use by another process"):
            check_bindable("six.example", port, path="control.address")
    check_bindable("six.example", port, path="control.address")
    assert address_towards("six.example", 9) == "::1"

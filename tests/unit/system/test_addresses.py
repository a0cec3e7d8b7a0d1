"""Addresses: host:port."""

import pytest

from kfdist.errors import ConfigError
from kfdist.system.addresses import (
    address_towards,
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


@pytest.mark.parametrize("address", ["", "host", "host:", ":7070", "::1:7070", "host:65536", "host:-1", "host:٣"])
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

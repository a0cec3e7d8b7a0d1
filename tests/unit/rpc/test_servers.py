"""Where servers listen without credentials, whoever makes them; and how many connections they have room for."""

import resource
import socket
import threading
import urllib.request
from pathlib import Path
from unittest import mock

import pytest

from kfdist.control import metrics_server
from kfdist.control.exporter import Exporter
from kfdist.control.metrics_server import MetricsServer
from kfdist.errors import ConfigError
from kfdist.rpc import servers
from kfdist.system.addresses import split_address
from kfdist.system.credentials import Credentials, Role
from tests.support.waits import eventually


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "localhost.example:0"])
def test_without_credentials_nothing_listens_where_others_reach_it(address: str):
    server = mock.Mock()
    with pytest.raises(ConfigError, match="control.address: .*needs TLS and a token"):
        servers.bind(server, address, None)
    assert server.mock_calls == []
    with pytest.raises(ConfigError, match="control.metrics_address: .*needs TLS and a token"):
        MetricsServer(Exporter(), address)


@pytest.mark.parametrize(
    ("limits", "room", "raised"),
    [
        ((1024, 4096), 4096 - 256, (4096, 4096)),
        ((1024, -1), 8192, (8192 + 256, -1)),
        ((256, 256), 128, None),
        ((1 << 20, 1 << 20), 8192, None),
        ((-1, -1), 8192, None),
    ],
)
def test_connections_leave_files_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], room: int, raised: tuple[int, int] | None
):
    was = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: was.append(new))
    assert dict(servers.server_options())["grpc.max_allowed_incoming_connections"] == room
    assert [new for new in was if new != limits] == ([] if raised is None else [raised])


@pytest.mark.parametrize("lacking", ["Thread-", "Timer"])
def test_metrics_are_served_again_once_there_are_threads_again(monkeypatch: pytest.MonkeyPatch, lacking: str):
    monkeypatch.setattr(metrics_server, "MAX_REQUESTS", 1)
    server, start = MetricsServer(Exporter(), "127.0.0.1:0"), threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if type(thread).__name__ == lacking or (lacking == "Thread-" and "process_request" in thread.name):
            raise RuntimeError("can't start new thread")
        start(thread)

    def get() -> int:
        try:
            with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=30) as answer:
                return answer.status
        except OSError:  # the connection was closed
            return 0

    try:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", scarce)
            assert get() == 0
        eventually(get, lambda status: status == 200)  # the slot is free just after the connection has ended
    finally:
        server.close()


def test_metrics_are_served_at_a_name_that_has_no_ipv4_address(monkeypatch: pytest.MonkeyPatch, certificates: Path):
    known = socket.getaddrinfo

    def resolve(host: str, *rest: object, **named: object) -> object:
        return known("::1" if host == "six.example" else host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server = MetricsServer(Exporter(), "six.example:0", Credentials.at(Role.CONTROLLER, str(certificates), None))
    try:
        host, port = split_address(server.address)
        assert host == "six.example"
        socket.create_connection(("::1", port), timeout=30).close()
    finally:
        server.close()

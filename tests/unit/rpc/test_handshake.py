"""What a bare handshake tells of servers that gRPC would only call unavailable."""

import datetime
import shutil
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kfdist.rpc import handshake
from kfdist.rpc.certificates import Authority
from kfdist.rpc.handshake import explain
from kfdist.system.credentials import Credentials, Role


@contextmanager
def server(*answers: Callable[[socket.socket], object]) -> Iterator[str]:
    """Runs a server that gives each connection its answer, one after another; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in answers:
                with suppress(OSError):
                    connection, _ = listening.accept()
                    with connection:
                        answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)


@pytest.fixture
def ours(certificates: Path) -> Credentials:
    return Credentials(role=Role.CLIENT, certificates=str(certificates), token_file=str(certificates / "token"))


def secured(directory: Path) -> Callable[[socket.socket], object]:
    """Answers over TLS with the controller's certificate of a directory."""
    credentials = Credentials.at(Role.CONTROLLER, str(directory), None)
    assert credentials is not None
    context = credentials.tls(ssl.PROTOCOL_TLS_SERVER)

    def answer(connection: socket.socket) -> None:
        with suppress(ssl.SSLError), context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.send(b"settings")

    return answer


def test_a_server_that_trusts_us_and_one_that_is_not_there(certificates: Path, ours: Credentials):
    with server(secured(certificates)) as address:
        assert explain(address, ours, server=Role.CONTROLLER) == ""
    assert explain(address, ours, server=Role.CONTROLLER) == ""


def test_a_server_whose_certificate_has_expired(certificates: Path, ours: Credentials, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "old")
    pem = Authority.read(directory).issue(Role.CONTROLLER, valid=datetime.timedelta(seconds=-1))
    (directory / "controller.pem").write_bytes(pem)
    with server(secured(directory)) as address:
        told = explain(address, ours, server=Role.CONTROLLER)
    assert told.startswith(f"the certificate of the controller at {address} has expired; `kfdist certs renew`")


def test_a_silent_server_is_waited_for_in_vain_but_not_for_long(ours: Credentials):
    ended = threading.Event()
    with server(lambda connection: ended.wait(10)) as address:
        assert explain(address, ours, server=Role.CONTROLLER, seconds=0.2) == ""
        ended.set()


def test_a_server_that_cuts_the_connection_after_our_certificate(certificates: Path, ours: Credentials):
    controllers = Credentials.at(Role.CONTROLLER, str(certificates), None)
    assert controllers is not None
    context = controllers.tls(ssl.PROTOCOL_TLS_SERVER)

    def cut(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no goodbye

    with server(cut) as address:
        assert f"refuses the certificate {certificates}/client.pem" in explain(address, ours, server=Role.CONTROLLER)


def test_a_certificate_for_no_server_is_of_another_role(certificates: Path, ours: Credentials, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    shutil.copy(directory / "client.pem", directory / "controller.pem")
    with server(secured(directory)) as address:
        assert "isn't for controller.kfdist, but for another role" in explain(address, ours, server=Role.CONTROLLER)


def closed(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1 << 16)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("answer", [closed, reset])
def test_a_server_that_has_no_room_is_not_said_to_be_without_tls(ours: Credentials, answer, monkeypatch):
    monkeypatch.setattr(handshake, "_AGAIN_SECONDS", 0.0)
    with server(answer, answer) as address:
        told = explain(address, ours, server=Role.CONTROLLER)
    assert told.startswith(f"what listens at {address} closes connections at once: it has as many as it takes")


def test_a_server_that_closes_once_as_while_it_is_restarted_is_asked_again(
    certificates: Path, ours: Credentials, monkeypatch
):
    monkeypatch.setattr(handshake, "_AGAIN_SECONDS", 0.0)
    with server(closed, secured(certificates)) as address:
        assert explain(address, ours, server=Role.CONTROLLER) == ""


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\x06\4\0\0\0\0\0\0\5\0\0\x40\0"])
def test_a_server_without_tls(ours: Credentials, answer: bytes):
    with server(lambda connection: connection.sendall(answer)) as address:
        assert "doesn't speak TLS" in explain(address, ours, server=Role.CONTROLLER)
    with server(lambda connection: connection.sendall(answer)) as address:
        assert explain(address, None, server=Role.CONTROLLER) == ""

"""Statuses become the error that says who has to act, and back; calls end in time."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kfdist.control.client import ControlClient
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.rpc._generated.kfdist.v1.inversion_pb2 import InvertRequest
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import InversionServiceStub
from kfdist.rpc.channels import open_channel
from kfdist.rpc.chunking import PayloadError, PayloadTooLarge
from kfdist.rpc.status import MAX_DETAILS_BYTES, Refusal, status_of
from tests.support.controller import Member


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refusal(grpc.StatusCode.ABORTED, "old"), grpc.StatusCode.ABORTED),
        (PayloadError("bad"), grpc.StatusCode.INVALID_ARGUMENT),
        (PayloadTooLarge("big"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ConfigError("wrong", path="a.b"), grpc.StatusCode.INVALID_ARGUMENT),
        (EnvironmentFault("disk full"), grpc.StatusCode.INTERNAL),
        (KeyError("oops"), grpc.StatusCode.INTERNAL),
    ],
)
def test_what_servers_raise(error, code):
    assert status_of(error)[0] is code
    assert str(error) in status_of(error)[1]


def test_long_messages_are_cut_to_what_trailers_take():
    message = status_of(ConfigError("ä" * 5000))[1]
    assert len(message.encode()) <= MAX_DETAILS_BYTES
    assert message.endswith("ä...")


def test_a_fault_of_our_own_is_logged_and_answered(controller, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nobody")

    monkeypatch.setattr("kfdist.control.exporter.Exporter.samples", broken)
    with controller.client() as client, pytest.raises(EnvironmentFault, match="INTERNAL.*ZeroDivisionError: by nobody"):
        client.create("r")
        client.samples("r")
    assert "ZeroDivisionError" in caplog.text


def test_nobody_at_the_address():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused, and taken by nobody else
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with ControlClient(address, timeout_seconds=5) as client:
            with pytest.raises(EnvironmentFault) as caught:
                client.runs()
    assert f"no controller answers at {address}" in str(caught.value)
    assert "kfdist serve" in str(caught.value)
    assert "--controller" in str(caught.value)


def test_a_stopped_controller_costs_its_deadline_only():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts in the kernel and never answers
        began = time.monotonic()
        with ControlClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.5) as client:
            with pytest.raises(EnvironmentFault, match="didn't answer in time"):
                client.get("r")
        assert time.monotonic() - began < 5


def test_something_else_at_the_address(controller):
    with ControlClient(controller.controller.metrics_address, timeout_seconds=5) as client:
        with pytest.raises(EnvironmentFault):
            client.runs()


def test_proxies_of_the_environment_are_not_asked(controller, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    with controller.client() as client:
        assert client.runs() == []


class Refuser(grpc.GenericRpcHandler):
    """Answers every call with UNAVAILABLE, and remembers them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    def service(self, handler_call_details):
        def refuse(requests, context):
            self.seen.append((handler_call_details.method.rpartition("/")[2], next(requests)))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


def test_grpc_repeats_what_may_be_repeated_and_nothing_else():
    refuser = Refuser()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[refuser])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with ControlClient(address) as client, Member(address) as member:
            for call in (lambda: client.get("r"), lambda: client.checkpoint("r"), lambda: member.beat_owner("x")):
                with pytest.raises((EnvironmentFault, grpc.RpcError)):
                    call()
        with open_channel(address) as channel, pytest.raises(grpc.RpcError):
            list(InversionServiceStub(channel).Invert(iter([InvertRequest(chunk=b"x")]), timeout=10))
    finally:
        server.stop(None)
    methods = [method for method, _ in refuser.seen]
    assert methods == ["Get"] * 4 + ["Checkpoint"] * 4 + ["Heartbeat", "Invert"]
    assert len({request for method, request in refuser.seen if method == "Checkpoint"}) == 1, "one request id"

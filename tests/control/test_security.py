"""A controller that others can reach: who may talk to it, and what the others are told."""

import asyncio
import datetime
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kfdist.control.client import ControlClient
from kfdist.errors import EnvironmentFault
from kfdist.owner.membership import Membership
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, run_pb2, run_pb2_grpc
from kfdist.rpc.authentication import channel_credentials, user_metadata
from kfdist.rpc.certificates import Authority, make_certificates, renew_certificates
from kfdist.rpc.channels import open_channel
from kfdist.rpc.handshake import explain
from kfdist.system.addresses import split_address
from kfdist.system.credentials import Credentials, Role
from tests.support.controller import ControllerThread, Member, scrape_secured, values
from tests.support.secrets import secrets_of


@pytest.fixture(scope="module")
def directory(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The controller's own copy of the certificates."""
    return shutil.copytree(certificates, tmp_path_factory.mktemp("controller") / "certificates")


@pytest.fixture(scope="module")
def secured(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerThread]:
    """A controller on all interfaces."""
    state = tmp_path_factory.mktemp("state") / "control.sqlite"
    with ControllerThread(
        state,
        address="0.0.0.0:0",
        metrics_address="0.0.0.0:0",
        credentials=Credentials.at(Role.CONTROLLER, str(directory), None),
    ) as running:
        yield running


@pytest.fixture
def address(secured: ControllerThread) -> str:
    return f"127.0.0.1:{split_address(secured.address)[1]}"


@pytest.fixture
def ours(certificates: Path) -> Credentials:
    credentials = Credentials.at(Role.CLIENT, str(certificates), None)
    assert credentials is not None
    return credentials


def with_certificate(credentials: Credentials, folder: Path, authority: Authority, *, days: int = 1) -> Credentials:
    """Returns credentials with another client certificate."""
    directory = shutil.copytree(credentials.certificates, folder / "certificates")
    pem = authority.issue(Role.CLIENT, valid=datetime.timedelta(days=days))
    (directory / Role.CLIENT.file_name).write_bytes(pem)
    return replace(credentials, certificates=str(directory))


def refusal(address: str, credentials: Credentials | None) -> str:
    with ControlClient(address, credentials, timeout_seconds=5) as client, pytest.raises(EnvironmentFault) as caught:
        client.runs()
    told = str(caught.value)
    if credentials is not None:
        assert not any(secret.decode() in told for secret in secrets_of(Path(credentials.certificates)))
    return told


def test_who_has_a_certificate_and_the_token_is_served(address: str, ours: Credentials):
    with ControlClient(address, ours) as client:
        client.create("served")
        assert [run.name for run in client.runs()] == ["served"]


def test_the_log_says_by_whose_certificate_somebody_asked(address: str, ours: Credentials):
    with ControlClient(address, ours) as client:
        client.create("asked")
        client.checkpoint("asked")
        (text,) = [event.text for event in client.events("asked") if event.kind == "checkpoint_requested"]
    assert f"by {user_metadata()[0][1]} (certificate of a client) (revision" in text


def test_without_tls(address: str):
    assert refusal(address, None) == (
        f"the controller at {address} takes nothing without TLS and a token: name the directory with its certificates "
        "in security.certificates (KFDIST_SECURITY__CERTIFICATES)"
    )


def test_an_expired_certificate(address: str, ours: Credentials, tmp_path: Path):
    expired = with_certificate(ours, tmp_path, Authority.read(Path(ours.certificates)), days=-1)
    assert f"{tmp_path}/certificates/client.pem expired on " in refusal(address, expired)


def test_a_foreign_certificate(address: str, ours: Credentials, tmp_path: Path):
    foreign = Authority.new()
    theirs = with_certificate(ours, tmp_path, foreign)
    assert "client.pem isn't signed by " in refusal(address, theirs)
    make_certificates(tmp_path / "others")
    others = Credentials.at(Role.CLIENT, str(tmp_path / "others"), None)
    assert f"the certificate of the controller at {address} is of another authority" in refusal(address, others)
    # As one who trusts the server, but not the other way round.
    (tmp_path / "foreign").mkdir()
    foreign.write(tmp_path / "foreign")
    both = [Path(each, "ca.pem").read_bytes() for each in (tmp_path / "foreign", ours.certificates)]
    (Path(theirs.certificates) / "ca.pem").write_bytes(b"".join(both))
    assert "it trusts another authority; give both sides" in refusal(address, theirs)


def test_a_server_of_another_role_is_not_believed(address: str, ours: Credentials):
    assert "isn't for owner.kfdist, but for another role" in explain(address, ours, server=Role.OWNER)
    with open_channel(address, ours, server=Role.OWNER) as channel, pytest.raises(grpc.RpcError):
        run_pb2_grpc.RunServiceStub(channel).List(run_pb2.ListRequest(), timeout=5)


@pytest.mark.parametrize("method", ["List", "Watch"])
def test_a_wrong_token_learns_nothing(address: str, ours: Credentials, tmp_path: Path, method: str):
    token = tmp_path / "token"
    token.write_text("x" * 43)
    wrong = replace(ours, token_file=str(token))
    assert f"the controller at {address} refuses the token" in refusal(address, wrong)
    with open_channel(address, wrong) as channel, pytest.raises(grpc.RpcError) as caught:
        stub = run_pb2_grpc.RunServiceStub(channel)
        answer = getattr(stub, method)(run_pb2.WatchRequest() if method == "Watch" else run_pb2.ListRequest())
        list(answer)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "the call carries no token, or another one than this server's"


def test_a_certificate_alone_is_not_enough(address: str, ours: Credentials):
    identity = ours.identity()
    tls = grpc.ssl_channel_credentials(identity.authority, identity.own, identity.own)
    name = [("grpc.ssl_target_name_override", Role.CONTROLLER.host_name)]
    with grpc.secure_channel(address, tls, name) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
    assert isinstance(caught.value, grpc.Call) and caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_controller_without_tls(controller: ControllerThread, ours: Credentials):
    assert "doesn't speak TLS: it was started without security.certificates" in refusal(controller.address, ours)
    assert explain(controller.address, None, server=Role.CONTROLLER) == ""


def test_missing_files_are_found_before_a_call(address: str, ours: Credentials, tmp_path: Path):
    with pytest.raises(EnvironmentFault, match=rf"nothing/client.pem on node {os.uname().nodename} can't be read"):
        channel_credentials(replace(ours, certificates=str(tmp_path / "nothing")))
    assert "client.pem on node" in explain(address, replace(ours, certificates="/nothing"), server=Role.CONTROLLER)


def test_a_controller_with_an_expired_certificate_does_not_start(certificates: Path, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "certificates")
    pem = Authority.read(directory).issue(Role.CONTROLLER, valid=datetime.timedelta(days=-1))
    (directory / Role.CONTROLLER.file_name).write_bytes(pem)
    with pytest.raises(EnvironmentFault, match=r"controller\.pem expired on "):
        ControllerThread(
            tmp_path / "new" / "c.sqlite", credentials=Credentials.at(Role.CONTROLLER, str(directory), None)
        )
    assert not (tmp_path / "new").exists()


def test_renewed_certificates_and_tokens_count_without_a_restart(
    secured: ControllerThread, address: str, directory: Path, ours: Credentials, tmp_path: Path
):
    kept = {name: (directory / name).read_bytes() for name in ("ca.pem", "controller.pem", "token")}
    make_certificates(tmp_path / "new")
    new = replace(ours, certificates=str(tmp_path / "new"), token_file=str(tmp_path / "new" / "token"))
    try:
        for name in kept:
            (directory / name).write_bytes((tmp_path / "new" / name).read_bytes())
        with ControlClient(address, new) as client:
            client.runs()
        scrape_secured(secured.controller.metrics_address, new)
        assert "another authority" in refusal(address, ours)
        (directory / "controller.pem").write_text("torn")  # keeps the one it has
        with ControlClient(address, new) as client:
            client.runs()
    finally:
        for name, content in kept.items():
            (directory / name).write_bytes(content)
    with ControlClient(address, ours) as client:
        client.runs()


def test_the_controller_tells_when_its_certificates_expire(secured: ControllerThread, directory, ours: Credentials):
    def told() -> dict[str, float]:
        found = values(scrape_secured(secured.controller.metrics_address, ours))
        name = "kfdist_certificate_expiry_timestamp_seconds"
        return {file: found[f'{name}{{file="{file}",process="controller"}}'] for file in names}

    names = ("controller.pem", "ca.pem")
    days = {file: (expiry - time.time()) / 86400 for file, expiry in told().items()}
    assert days["controller.pem"] == pytest.approx(365, abs=1) and days["ca.pem"] == pytest.approx(3650, abs=1)
    renew_certificates(directory, days=20)
    assert (told()["controller.pem"] - time.time()) / 86400 == pytest.approx(20, abs=1)


def test_metrics_elsewhere_than_on_loopback_are_for_those_with_a_certificate(
    secured: ControllerThread, ours: Credentials
):
    assert "kfdist_build_info" in scrape_secured(secured.controller.metrics_address, ours)
    port = split_address(secured.controller.metrics_address)[1]
    curious = ssl.create_default_context(cafile=str(ours.identity_files[1]))
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(f"https://localhost:{port}/metrics", context=curious, timeout=5).read()
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5).read()


def test_an_owner_says_why_it_is_not_registered(address: str, ours: Credentials, tmp_path: Path, caplog):
    token = tmp_path / "token"
    token.write_text("y" * 30)
    owner = inversion_pb2.Owner(owner_id="owner-1", address="127.0.0.1:1", fingerprint="cpu")
    request = membership_pb2.RegisterOwnerRequest(owner=owner, pid=1)

    async def refusals() -> list[str]:
        told = []
        for credentials in (replace(ours, token_file=str(token)), None, replace(ours, certificates="/nothing")):
            membership = Membership(address, credentials, request, measure=list, learn_peers=lambda owners: None)
            task = asyncio.create_task(membership.run())
            async with asyncio.timeout(10):
                while not membership.refusal:
                    await asyncio.sleep(0.02)
            task.cancel()
            told.append(membership.refusal)
        return told

    wrong_token, no_tls, no_files = asyncio.run(refusals())
    assert "refuses the token" in wrong_token
    assert "takes nothing without TLS and a token" in no_tls
    assert "/nothing/client.pem on node" in no_files
    assert "owner-1 isn't registered: " in caplog.text


def test_silent_connections_end_and_keep_nobody_else_out(
    certificates: Path, tmp_path: Path, ours: Credentials, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kfdist.rpc.servers.HANDSHAKE_SECONDS", 1)
    monkeypatch.setattr("kfdist.control.metrics_server.SECONDS", 1.0)
    monkeypatch.setattr("kfdist.control.metrics_server.MAX_REQUESTS", 4)
    own = Credentials.at(Role.CONTROLLER, str(certificates), None)
    with (
        ControllerThread(tmp_path / "c.sqlite", metrics_address="0.0.0.0:0", credentials=own) as running,
        ExitStack() as open_sockets,
    ):
        metrics = f"127.0.0.1:{split_address(running.controller.metrics_address)[1]}"
        silent = [
            open_sockets.enter_context(socket.create_connection(split_address(address), timeout=10))
            for address, count in ((running.address, 40), (metrics, 4))
            for _ in range(count)
        ]
        with ControlClient(running.address, ours) as client:
            client.runs()
        with pytest.raises(OSError):  # no room for a fifth
            scrape_secured(metrics, ours)
        assert [connection.recv(1) for connection in silent] == [b""] * len(silent)
        assert "kfdist_build_info" in scrape_secured(metrics, ours)


def test_who_sends_a_header_for_ever_is_cut_off_and_nothing_is_printed(
    certificates: Path,
    tmp_path: Path,
    ours: Credentials,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("kfdist.control.metrics_server.LONGEST_SECONDS", 0.5)
    own = Credentials.at(Role.CONTROLLER, str(certificates), None)
    with ControllerThread(tmp_path / "c.sqlite", metrics_address="0.0.0.0:0", credentials=own) as running:
        port = split_address(running.controller.metrics_address)[1]
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            ours.tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain, server_hostname="controller.kfdist") as slow,
            pytest.raises(OSError),
        ):
            slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Long: ")
            for _ in range(200):
                slow.sendall(b"x")
                time.sleep(0.05)
        assert "kfdist_build_info" in scrape_secured(running.controller.metrics_address, ours)
    assert "Traceback" not in capfd.readouterr().err


def test_a_heartbeat_stream_that_falls_silent_is_ended(
    client: ControlClient, member: Member, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kfdist.control.membership_service.SILENT_SECONDS", 0.2)
    client.create("r")
    member.register_worker("r")
    member.beat_worker("r")
    with pytest.raises(grpc.RpcError) as caught:
        next(member._answers)
    assert isinstance(caught.value, grpc.Call) and caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.details() == "no beat came for 0.2 s; register and beat again"
    member.hang_up()
    member.beat_worker("r")

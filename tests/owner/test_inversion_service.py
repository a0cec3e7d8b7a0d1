"""InversionService over real gRPC with a real inversion process: every promise and every refusal of inversion.proto."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import pytest

from kfdist.errors import EnvironmentFault
from kfdist.owner.inversion_service import ServiceLimits
from kfdist.owner.owner import Owner, OwnerOptions
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import InversionServiceStub
from kfdist.rpc.channels import open_channel
from kfdist.rpc.chunking import digest_of, split
from kfdist.system.addresses import split_address
from kfdist.types import CHUNK_BYTES
from tests.support.faults import EACH, Faults
from tests.support.faulty import child
from tests.support.jobs import payload, result_of
from tests.support.waits import eventually

ROOT = Path(__file__).parents[2]
LIMITS = ServiceLimits(payload_bytes=8 << 20, buffered_bytes=3 << 20, kept_bytes=2 << 20, idle_seconds=1.0)
VERSIONS = iter(range(1_000_000))
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("owner")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Owner]:
    made = Owner(OwnerOptions(owner_id="owner-7", directory=str(folder), child_module=child.__name__, limits=LIMITS))
    eventually(lambda: made.status()["fingerprint"], bool, seconds=60)
    yield made
    made.close()


@pytest.fixture
def owner(running: Owner, faults: Faults) -> Iterator[Owner]:
    del faults  # cleared after each test
    yield running
    eventually(lambda: running.status()["queue_depth"], lambda depth: depth == 0, seconds=60)


@pytest.fixture
def stub(owner: Owner) -> Iterator[InversionServiceStub]:
    with open_channel(owner.address) as channel:
        yield InversionServiceStub(channel)


def header(data: bytes, **changed: object) -> inversion_pb2.InvertRequest:
    fields = {
        "run": "service",
        "epoch": 1,
        "group": "group",
        "version": next(VERSIONS),
        "digest": digest_of(data),
        "payload_bytes": len(data),
        "deadline_milliseconds": 60_000,
        **changed,
    }
    return inversion_pb2.InvertRequest(header=inversion_pb2.InvertHeader(**fields))


def chunks(data: bytes) -> list[inversion_pb2.InvertRequest]:
    return [inversion_pb2.InvertRequest(chunk=chunk) for chunk in split(data)]


def call(stub, requests: Iterable[inversion_pb2.InvertRequest]) -> tuple[inversion_pb2.InvertResultHeader, bytes]:
    first, *rest = list(stub.Invert(iter(requests), timeout=60))
    assert all(0 < len(response.chunk) <= CHUNK_BYTES for response in rest)
    return first.header, b"".join(response.chunk for response in rest)


def refusal(stub, requests: Iterable[inversion_pb2.InvertRequest]) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, requests)
    return caught.value.code(), caught.value.details()


def test_a_job_and_its_result(stub):
    data = payload(300, blocks=4, seed=1)
    assert len(data) > CHUNK_BYTES
    answer, result = call(stub, [header(data), *chunks(data)])
    assert result == result_of(data)
    assert (answer.payload_bytes, answer.digest) == (len(result), digest_of(result))
    assert answer.owner_id == "owner-7"
    assert 0 < answer.seconds < 60


def test_duplicates_join_the_running_call(stub, owner, faults):
    before = owner.status()["completed"]
    faults.at(inversion=EACH).delay(0.5)
    data = payload(20, seed=2)
    first = header(data)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(call(stub, [first, *chunks(data)])[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 1)
    # Once the first is running, a header is enough to join it.
    results.append(call(stub, [first])[1])
    for thread in threads:
        thread.join()
    assert results == [result_of(data)] * 5
    assert owner.status()["completed"] == before + 1


def test_a_kept_result_is_given_again_until_others_take_its_place(stub, owner):
    data = payload(200, seed=3)
    first = header(data)
    call(stub, [first, *chunks(data)])
    before = owner.status()["completed"]
    assert call(stub, [first])[1] == result_of(data)
    assert owner.status()["completed"] == before
    other = payload(400, seed=3)
    assert 4 * len(result_of(other)) > LIMITS.kept_bytes
    for _ in range(4):
        call(stub, [header(other), *chunks(other)])
    code, message = refusal(stub, [first])
    assert (code, "bytes short" in message) == (Code.INVALID_ARGUMENT, True)


def test_a_job_whose_caller_has_gone_before_its_turn_is_dropped(stub, owner, faults):
    faults.at(inversion=EACH).delay(1.0)
    before = owner.status()["completed"]
    data = payload(20, seed=4)
    running = stub.Invert(iter([header(data), *chunks(data)]), timeout=60)
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 1)
    waiting = stub.Invert(iter([header(data), *chunks(data)]), timeout=60)
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 2)
    waiting.cancel()
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 1)
    assert len(list(running)) == 2
    assert owner.status()["completed"] == before + 1


def test_more_than_there_is_room_for_waits_its_turn(stub, owner, faults):
    faults.at(inversion=EACH).delay(0.3)
    data = payload(560, seed=5)
    assert 2 * len(data) < LIMITS.buffered_bytes < 3 * len(data)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(call(stub, [header(data), *chunks(data)])[1])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    depths = []
    while any(thread.is_alive() for thread in threads):
        depths.append(owner.status()["queue_depth"])
    assert results == [result_of(data)] * 4
    assert max(depths) == 2


def test_a_run_that_sends_many_jobs_does_not_hold_up_another(stub, owner, faults):
    faults.at(inversion=EACH).delay(0.3)
    data = payload(20, seed=7)
    child_pid = owner.status()["child_pid"]
    os.kill(child_pid, signal.SIGSTOP)
    finished: list[str] = []

    def send(run: str) -> threading.Thread:
        def wait() -> None:
            call(stub, [header(data, run=run), *chunks(data)])
            finished.append(run)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    threads = [send("many") for _ in range(7)]
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 7)
    threads += [send("few")]
    eventually(lambda: owner.status()["queue_depth"], lambda depth: depth == 8)
    os.kill(child_pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    # Behind the one that was being inverted when it came, and perhaps the next one; not behind all.
    assert finished.index("few") <= 4


def test_an_older_start_of_a_run_is_refused_from_the_first_newer_call_on(stub):
    data = payload(16)
    call(stub, [header(data, run="fenced", epoch=1), *chunks(data)])
    call(stub, [header(data, run="fenced", epoch=2), *chunks(data)])
    code, message = refusal(stub, [header(data, run="fenced", epoch=1), *chunks(data)])
    assert code is Code.ABORTED
    assert "epoch 1, owner-7 has seen 2" in message
    call(stub, [header(data, run="another", epoch=1), *chunks(data)])


def test_an_epoch_that_no_start_can_have_come_to_is_refused_and_locks_nobody_out(stub):
    data = payload(16)
    code, message = refusal(stub, [header(data, run="ahead", epoch=2**62), *chunks(data)])
    assert code is Code.INVALID_ARGUMENT
    assert f"epoch: {2**62} is not allowed; must be a number of at least 0 and at most " in message
    call(stub, [header(data, run="ahead", epoch=1), *chunks(data)])


def test_a_payload_over_the_limit_is_refused_by_its_header(stub):
    sent = []

    def requests() -> Iterator[inversion_pb2.InvertRequest]:
        yield header(b"", payload_bytes=1 << 50, digest="0" * 64)
        sent.append("more")
        yield from ()

    code, message = refusal(stub, requests())
    assert code is Code.RESOURCE_EXHAUSTED
    assert f"at most {LIMITS.payload_bytes} are taken" in message


def test_an_owner_of_another_fingerprint_refuses(stub, owner):
    data = payload(16)
    fingerprint = owner.status()["fingerprint"]
    call(stub, [header(data, fingerprint=fingerprint), *chunks(data)])
    code, message = refusal(stub, [header(data, fingerprint="cuda"), *chunks(data)])
    assert code is Code.FAILED_PRECONDITION
    assert "'cuda'" in message and fingerprint in message


def test_a_deadline(stub, owner, faults):
    faults.at(inversion=EACH).delay(60)
    data = payload(16)
    code, message = refusal(stub, [header(data, deadline_milliseconds=300), *chunks(data)])
    assert code is Code.DEADLINE_EXCEEDED
    assert "owner-7: the inversion took longer than its deadline of 0.3 s" in message


def test_a_crash(stub, owner, faults):
    faults.at(inversion=EACH).kill()
    data = payload(16)
    code, message = refusal(stub, [header(data), *chunks(data)])
    assert code is Code.INTERNAL
    assert "killed by SIGKILL" in message


def test_bytes_that_are_no_job(stub):
    data = b"no job at all"
    code, message = refusal(stub, [header(data), *chunks(data)])
    assert code is Code.INVALID_ARGUMENT
    assert "no kfdist job" in message


DATA = payload(16, seed=6)
MALFORMED = {
    "nothing": ([], "first message is empty"),
    "a chunk first": (chunks(DATA), "first message is chunk"),
    "an empty message first": ([inversion_pb2.InvertRequest()], "first message is empty"),
    "a second header": ([header(DATA), header(DATA)], "a message after the first is header"),
    "an empty chunk": ([header(DATA), inversion_pb2.InvertRequest(chunk=b"")], "a chunk has 0 bytes"),
    "bytes missing": ([header(DATA), *chunks(DATA[:-1])], "1 bytes short"),
    "bytes too many": ([header(DATA), *chunks(DATA + b"x")], "longer than"),
    "another digest": ([header(DATA, digest="0" * 64), *chunks(DATA)], "its header says 000"),
    "no digest": ([header(DATA, digest="")], "must be a SHA-256"),
    "no payload": ([header(DATA, payload_bytes=0)], "never empty"),
    "a negative size": ([header(DATA, payload_bytes=-5)], "payload_bytes: -5 is not allowed"),
    "no group": ([header(DATA, group="")], "group: 0 is not allowed"),
    "a long run name": (
        [header(DATA, run="r" * 2000)],
        "run: 2000 is not allowed; must be a number of at least 1 and at most 1024 (how many characters it has)",
    ),
    "a negative version": ([header(DATA, version=-1)], "version: -1"),
    "no deadline": ([header(DATA, deadline_milliseconds=0)], "deadline_milliseconds: 0"),
    "an endless deadline": ([header(DATA, deadline_milliseconds=1 << 60)], "of at least 1 and at most 86400000"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_streams_are_refused_with_a_message(stub, kind):
    requests, expected = MALFORMED[kind]
    code, message = refusal(stub, requests)
    assert code is Code.INVALID_ARGUMENT
    assert expected in message


def test_a_sender_that_falls_silent_is_refused(stub, owner):
    hold = threading.Event()

    def requests() -> Iterator[inversion_pb2.InvertRequest]:
        yield header(DATA)
        hold.wait(30)

    code, message = refusal(stub, requests())
    hold.set()
    assert code is Code.INVALID_ARGUMENT
    assert "nothing was sent for 1 s" in message


def test_peers_are_what_it_was_told(stub, owner):
    assert [peer.owner_id for peer in stub.ListPeers(inversion_pb2.ListPeersRequest()).owners] == ["owner-7"]
    owner.introduce([{"owner_id": name, "address": "127.0.0.1:1", "fingerprint": "f"} for name in ("a", "b")])
    owner.introduce([{"owner_id": "b", "address": "127.0.0.1:2", "fingerprint": "f"}], ["a"])
    # What others told it stays: its pool knows nothing of another pool's owners.
    peers = stub.ListPeers(inversion_pb2.ListPeersRequest()).owners
    assert [(peer.owner_id, peer.address) for peer in peers] == [("owner-7", owner.address), ("b", "127.0.0.1:2")]


def test_the_same_port_again_where_it_is_free_and_another_where_not(folder, owner):
    options = OwnerOptions(owner_id="owner-8", directory=str(folder))
    first = Owner(options)
    second = Owner(options)
    assert second.address != first.address
    second.close()
    first.close()
    third = Owner(options)
    assert third.address == second.address
    assert (first.starts, second.starts, third.starts) == (1, 2, 3)
    third.close()
    third.close()


def test_owners_keep_to_the_ports_they_are_given():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            EnvironmentFault, match=rf"owner_ports = \[{port}, {port}\] can be had: .*:{port} is in use"
        ):
            Owner(OwnerOptions(owner_id="owner-9", ports=(port, port)))
        other = Owner(OwnerOptions(owner_id="owner-9", ports=(port, min(port + 50, 65535))))
        assert port < split_address(other.address)[1] <= port + 50
        other.close()


def test_an_owner_needs_neither_ray_nor_the_pool():
    script = """
import sys
sys.modules["ray"] = None  # an import of it fails
from kfdist.owner.owner import OwnerOptions, Owner
server = Owner(OwnerOptions(owner_id="alone"))
print(server.address, server.status(60)["child_pid"], flush=True)
sys.stdin.read()
server.close()
print(*(name for name in sys.modules if name.startswith(("ray.", "kfdist.pool", "torch"))))
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with owner:
        assert owner.stdin is not None and owner.stdout is not None
        address, child = owner.stdout.readline().split()
        data = payload(48, seed=5)
        with open_channel(address) as channel:
            stub = InversionServiceStub(channel)
            requests = [header(data), *chunks(data)]
            _, result = eventually(lambda: answer_of(stub, requests), bool, seconds=60)
        assert result == result_of(data)
        assert "_raylet" not in Path(f"/proc/{child}/maps").read_text()
        owner.stdin.close()
        assert owner.stdout.read().split() == []
    assert owner.returncode == 0


def answer_of(stub, requests) -> tuple[inversion_pb2.InvertResultHeader, bytes] | None:
    """Returns the answer to a call, None while the owner's inversion process is starting."""
    try:
        return call(stub, requests)
    except grpc.RpcError as error:
        assert error.code() is Code.UNAVAILABLE, error
        return None

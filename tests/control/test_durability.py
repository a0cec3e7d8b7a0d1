"""What a controller acknowledged survives its being killed; two controllers can't share a port or a file."""

import json
import os
import signal
import sqlite3
import threading
import time
import uuid

import grpc
import pytest

from kfdist.control.client import ControlClient
from kfdist.control.control_records import RunState
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.rpc._generated.kfdist.v1 import run_pb2
from tests.support.controller import CALL_SECONDS, ControllerProcess, ControllerThread, Member
from tests.support.waits import eventually

CLIENTS = 4


class Hammer(threading.Thread):
    """Asks for checkpoints, one after another, until the controller dies under it."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.acknowledged: dict[str, bytes] = {}
        self.pending = ""
        self._address = address

    def run(self) -> None:
        with Member(self._address) as member:
            while True:
                self.pending = uuid.uuid4().hex
                try:
                    response = ask(member, self.pending)
                except grpc.RpcError:
                    return
                self.acknowledged[self.pending] = response


def ask(member: Member, request_id: str) -> bytes:
    # Without gRPC's own retries: the test repeats what was lost itself.
    request = run_pb2.CheckpointRequest(request_id=request_id, name="r")
    return member.runs.Checkpoint(request, timeout=5).SerializeToString()


def test_nothing_acknowledged_is_lost_when_the_controller_is_killed(tmp_path):
    acknowledged: dict[str, bytes] = {}
    for _ in range(2):
        with ControllerProcess(tmp_path) as process:
            address = process.wait_ready()
            with ControlClient(address) as client:
                if not acknowledged:
                    client.create("r")
            hammers = [Hammer(address) for _ in range(CLIENTS)]
            for hammer in hammers:
                hammer.start()
            eventually(lambda hammers=hammers: sum(len(h.acknowledged) for h in hammers), lambda count: count > 30)
            process.kill()
            for hammer in hammers:
                hammer.join(30)
        for hammer in hammers:
            acknowledged |= hammer.acknowledged
        pending = [hammer.pending for hammer in hammers]
        with ControllerThread(tmp_path / "control.sqlite") as controller, Member(controller.address) as member:
            # Those whose answers were lost are repeated: whether they had been applied or not, now they are, once.
            acknowledged |= {request_id: ask(member, request_id) for request_id in pending}
            assert [ask(member, request_id) for request_id in acknowledged] == list(acknowledged.values())
            member.register_worker("r")
            assert member.beat_worker("r").settings.checkpoint_serial == len(acknowledged)
            with controller.client() as client:
                texts = [e.text.split(" asked")[0] for e in client.events("r") if e.kind == "checkpoint_requested"]
                assert texts == [f"checkpoint {n + 1}" for n in range(len(acknowledged))]
                head = client.get("r").revision
                kept = client.watch("r", from_revision=max(head - 50, 1))
                assert [next(kept).revision for _ in range(min(50, head - 1))] == list(
                    range(max(head - 50, 1) + 1, head + 1)
                )


def test_an_acknowledged_end_of_a_run_survives(tmp_path):
    with ControllerProcess(tmp_path) as process:
        with Member(process.wait_ready()) as member:
            member.register_owner("owner-0", port=4711)
            member.register_worker("r", epoch=7)
            member.beat_worker("r", epoch=7, step=120, phase="finished")
            process.kill()
    with ControllerThread(tmp_path / "control.sqlite") as controller, controller.client() as client:
        run = client.get("r")
        assert (run.state, run.step, run.epoch) == (RunState.FINISHED, 120, 7)
        assert [owner.name for owner in client.owners("r")] == ["owner-0"]


def test_a_second_controller_on_the_same_port_is_refused(tmp_path, controller):
    with pytest.raises(EnvironmentFault) as caught:
        ControllerThread(tmp_path / "other" / "c.sqlite", address=controller.address)
    assert f"{controller.address} is in use by another process" in str(caught.value)
    assert "another control.address, such as 127.0.0.1:0" in str(caught.value)
    assert not (tmp_path / "other").exists(), "nothing half-made is left"
    with pytest.raises(EnvironmentFault, match="another control.metrics_address, such as 127.0.0.1:0"):
        ControllerThread(tmp_path / "other" / "c.sqlite", metrics_address=controller.controller.metrics_address)
    assert not (tmp_path / "other").exists()


def test_grpc_itself_refuses_a_port_in_use(tmp_path, controller, monkeypatch):
    # Between our own look and gRPC's binding somebody may have come; without so_reuseport=0 both would serve.
    monkeypatch.setattr("kfdist.system.addresses._obstacle", lambda host, port: "")
    with pytest.raises(EnvironmentFault, match=f"{controller.address} could not be bound"):
        ControllerThread(tmp_path / "c.sqlite", address=controller.address)


def test_a_second_controller_on_the_same_file_is_refused(tmp_path, controller):
    with pytest.raises(EnvironmentFault, match=rf"another controller \(process {os.getpid()}\) has the file .*--state"):
        ControllerThread(tmp_path / "control.sqlite")
    with controller.client() as client:
        client.create("r")  # the first one serves on


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "example.org:80", "127.0.0.1", "127.0.0.1:99999"])
def test_without_credentials_only_loopback_is_bound(tmp_path, address):
    for which in ("address", "metrics_address"):
        with pytest.raises(ConfigError) as caught:
            ControllerThread(tmp_path / "new" / "c.sqlite", **{which: address})
        assert caught.value.path == f"control.{which}"
    assert not (tmp_path / "new").exists()


def test_ipv6_loopback_serves(tmp_path):
    with (
        ControllerThread(tmp_path / "c.sqlite", address="[::1]:0", metrics_address="[::1]:0") as controller,
        controller.client() as client,
    ):
        assert controller.address.startswith("[::1]:")
        client.create("r")
        assert 'kfdist_run_epoch{run="r"} 0.0' in controller.scrape()


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a database " * 100)
    with pytest.raises(EnvironmentFault, match=r"garbage can't be used.*not a database.*--state"):
        ControllerThread(garbage)
    assert garbage.read_bytes() == b"not a database " * 100
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE diary (entry TEXT)")
    connection.close()
    with pytest.raises(EnvironmentFault, match="no file of kfdist's controller"):
        ControllerThread(foreign)


@pytest.mark.parametrize("version", [1, 9])
def test_a_file_of_another_format_is_refused_with_what_to_do(tmp_path, version):
    other = tmp_path / "other"
    with ControllerThread(other):
        pass
    with sqlite3.connect(other) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(EnvironmentFault, match=f"has format {version}, and .* format 2: move it away, or .*--state"):
        ControllerThread(other)


def test_a_damaged_record_is_refused_by_its_field(tmp_path):
    with ControllerThread(tmp_path / "c") as controller, controller.client() as client:
        client.create("r")
    with sqlite3.connect(tmp_path / "c") as connection:
        connection.execute("UPDATE runs SET record = json_set(record, '$.step', 'many')")
    connection.close()
    with pytest.raises(EnvironmentFault, match=r"c can't be used: .* step .*many.*--state"):
        ControllerThread(tmp_path / "c")


def test_sqlite3_reads_the_records_while_the_controller_runs(tmp_path, controller, client, member):
    client.create("r", total_steps=9)
    client.create("second")
    member.register_worker("r")
    client.pause("r")
    client.update_settings("r", damping=0.1)
    with sqlite3.connect(f"file:{tmp_path / 'control.sqlite'}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT name, record ->> 'total_steps', record ->> '$.settings.desired', "
            "record ->> '$.settings.changes.damping' FROM runs ORDER BY rowid"
        ).fetchall()
    connection.close()
    assert rows == [("r", 9, "paused", 0.1), ("second", 0, "running", None)]


def test_a_file_that_cannot_be_written_refuses_and_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("kfdist.control.store.BUSY_SECONDS", 0.05)
    with ControllerThread(tmp_path / "c.sqlite") as controller, controller.client() as client:
        client.create("r")
        before = client.get("r")
        # Another process holds the file for writing; SQLite reports a full disk in the same way.
        blocker = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(EnvironmentFault, match="database is locked; nothing was changed"):
            client.pause("r")
        assert client.get("r") == before
        blocker.execute("ROLLBACK")
        blocker.close()
        assert client.pause("r").revision == before.revision + 1


def test_a_run_that_cannot_be_made_known_leaves_the_leases_running(tmp_path, monkeypatch):
    monkeypatch.setattr("kfdist.control.ledger.MAX_RUNS", 1)
    with (
        ControllerThread(tmp_path / "c.sqlite", lease_seconds=0.5) as controller,
        controller.client() as client,
        Member(controller.address) as member,
    ):
        member.register_worker("r")
        member.beat_worker("r")
        with pytest.raises(EnvironmentFault, match="there are 1 runs; start a controller with another file"):
            client.create("second")
        eventually(lambda: client.get("r").state, lambda state: state is RunState.LOST)


def test_an_owner_that_cannot_be_recorded_leaves_the_leases_running(tmp_path, monkeypatch):
    monkeypatch.setattr("kfdist.control.store.BUSY_SECONDS", 0.05)
    with (
        ControllerThread(tmp_path / "c.sqlite", lease_seconds=0.5) as controller,
        controller.client() as client,
        Member(controller.address) as member,
    ):
        member.register_worker("r")
        blocker = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(grpc.RpcError, match="nothing was changed"):
            member.register_owner("o")
        blocker.execute("ROLLBACK")
        blocker.close()
        member.beat_worker("r")  # so that its lease ends after the owner's
        eventually(lambda: client.get("r").state, lambda state: state is RunState.LOST)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_ends_in_order_when_told(tmp_path, number):
    with ControllerProcess(tmp_path) as process:
        address = process.wait_ready()
        with Member(address) as member, ControlClient(address) as client:
            member.register_worker("r")
            member.beat_worker("r")
            watch = client.watch("r")
            next(watch)
            began = time.monotonic()
            process.process.send_signal(number)
            output = process.output()
            assert time.monotonic() - began < 5
            assert process.process.returncode == 0
            assert "Traceback" not in output
            with pytest.raises(grpc.RpcError):
                member.beat_worker("r")
    assert not list(tmp_path.glob("*-wal")), "the file was closed in order"


def test_the_ready_file_says_where_it_serves(tmp_path):
    with ControllerProcess(tmp_path, arguments=("--json",)) as process:
        process.wait_ready()
        assert process.process.stdout is not None
        said = json.loads(process.process.stdout.readline())
        assert process.ready == {key: said[key] for key in ("address", "metrics_address")}
        assert said["state"] == str(process.state)
        with Member(process.ready["address"]) as member:
            assert member.runs.List(run_pb2.ListRequest(), timeout=CALL_SECONDS).runs == []


def test_a_port_in_use_ends_the_command_with_1_and_one_line(tmp_path, controller):
    with ControllerProcess(tmp_path, address=controller.address) as process:
        output = process.output()
        assert process.process.returncode == 1
        assert output.startswith(f"kfdist: {controller.address} is in use")
        assert output.count("\n") == 1
        assert not process.ready_file.exists()

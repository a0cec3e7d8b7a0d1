"""Watching a run: every change once, in order, also after a pause of the reader or of the controller."""

import threading
import time
from typing import Any

import grpc
import pytest

from kfdist.control.client import ControlClient
from kfdist.control.store import Batch, Store
from kfdist.errors import ConfigError
from kfdist.rpc._generated.kfdist.v1 import run_pb2, run_pb2_grpc
from kfdist.rpc.channels import channel_options
from tests.support.controller import ControllerThread, address_of_its_own
from tests.support.waits import eventually


def take(stream, count: int) -> list:
    return [next(stream) for _ in range(count)]


def test_the_present_first_then_every_change(client):
    client.create("r")
    client.pause("r")
    watch = client.watch("r")
    assert next(watch).revision == 2
    made = [client.resume("r"), client.checkpoint("r"), client.update_settings("r", damping=0.5)]
    assert take(watch, 3) == made


def test_a_watch_goes_on_from_any_revision_without_gap_or_repetition(client):
    made = [client.create("r")] + [client.checkpoint("r") for _ in range(20)]
    for seen in (1, 7, 20):
        assert take(client.watch("r", from_revision=seen), 21 - seen) == made[seen:]


def test_history_and_present_meet_without_gap_or_repetition(client):
    # Readers begin while changes are being made, so each finds some in the file and some in its queue.
    client.create("r")
    ended = threading.Event()

    def change() -> None:
        for _ in range(150):
            client.checkpoint("r")
        ended.set()

    threading.Thread(target=change).start()
    while not ended.is_set():
        revisions = [run.revision for run in take(client.watch("r", from_revision=1), 40)]
        assert revisions == list(range(2, 42))


def test_a_change_that_is_both_in_the_file_and_in_the_queue_comes_once(client, monkeypatch):
    client.create("r")
    client.checkpoint("r")
    commit, begun = Store.commit, threading.Event()

    def late(store: Store, batch: Batch) -> None:
        begun.set()
        time.sleep(0.4)  # meanwhile a watch begins; it reads the file after this commit, and is told of it, too
        commit(store, batch)

    monkeypatch.setattr(Store, "commit", late)
    changing = threading.Thread(target=lambda: client.checkpoint("r"))
    changing.start()
    assert begun.wait(10)
    watch = client.watch("r", from_revision=1)
    assert [run.revision for run in take(watch, 2)] == [2, 3]
    changing.join()
    client.checkpoint("r")
    assert next(watch).revision == 4


def test_a_revision_of_the_future_is_refused(client):
    client.create("r")
    with pytest.raises(ConfigError, match="from_revision is 5; run 'r' is at 1"):
        next(client.watch("r", from_revision=5))
    with pytest.raises(ConfigError, match="from_revision: -1 is not allowed; must be a whole number of at least 0"):
        next(client.watch("r", from_revision=-1))


def test_a_revision_too_old_is_refused_with_what_to_do(client, monkeypatch):
    monkeypatch.setattr("kfdist.control.store.KEPT_CHANGES", 5)
    client.create("r")
    for _ in range(11):
        client.checkpoint("r")
    with pytest.raises(ConfigError, match="changes up to 7 are no longer kept.*get the run"):
        next(client.watch("r", from_revision=6))
    assert [run.revision for run in take(client.watch("r", from_revision=7), 5)] == [8, 9, 10, 11, 12]


def test_a_slow_reader_loses_its_watch_and_can_go_on(tmp_path):
    # A small window, so that the controller notices the reader before gRPC has swallowed the whole test.
    narrow = [*channel_options(), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
    with (
        ControllerThread(tmp_path / "c.sqlite", queued_changes=8) as controller,
        controller.client() as client,
        grpc.insecure_channel(controller.address, options=narrow) as channel,
    ):
        client.create("r", directory="d" * 4000)
        stub: Any = run_pb2_grpc.RunServiceStub(channel)
        stream = stub.Watch(run_pb2.WatchRequest(name="r"), timeout=30)
        assert next(stream).run.revision == 1
        for _ in range(100):
            client.checkpoint("r")
        seen = [1]
        with pytest.raises(grpc.RpcError) as caught:
            for response in stream:
                seen.append(response.run.revision)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than 8 changes were unread" in caught.value.details()
        assert seen == list(range(1, len(seen) + 1)), "what did arrive is whole"
        rest = take(client.watch("r", from_revision=seen[-1]), 101 - seen[-1])
        assert [run.revision for run in rest] == list(range(seen[-1] + 1, 102))


def test_too_many_watches_of_one_run_are_refused(client, member, monkeypatch):
    monkeypatch.setattr("kfdist.control.watchers.MAX_WATCHERS", 2)
    client.create("r")
    streams = [member.runs.Watch(run_pb2.WatchRequest(name="r"), timeout=30) for _ in range(2)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        next(member.runs.Watch(run_pb2.WatchRequest(name="r"), timeout=30))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    streams[0].cancel()

    def try_again() -> bool:
        try:
            return next(member.runs.Watch(run_pb2.WatchRequest(name="r"), timeout=30)).run.revision == 1
        except grpc.RpcError:
            return False

    assert eventually(try_again, bool)


def test_the_step_of_a_run_is_watched_too(client, member):
    client.create("r")
    member.register_worker("r")
    watch = client.watch("r")
    member.beat_worker("r", step=1)
    member.beat_worker("r", step=42)
    views = [next(watch)]
    while views[-1].step != 42:
        views.append(next(watch))
    revisions = [view.revision for view in views]
    assert revisions == list(range(revisions[0], revisions[0] + len(views)))


def test_a_watch_outlives_the_controller(tmp_path):
    state = tmp_path / "c.sqlite"
    first = ControllerThread(state)
    client = first.client()
    client.create("r")
    seen: list[int] = []

    def read() -> None:
        for run in client.watch("r"):
            seen.append(run.revision)
            if run.revision == 6:
                return

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(2):
        client.checkpoint("r")
    eventually(lambda: len(seen), lambda count: count == 3)
    first.close()
    time.sleep(0.2)
    with ControllerThread(state, address=first.address) as second, second.client() as other:
        for _ in range(3):
            other.checkpoint("r")
        reader.join(20)
    client.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_controller_that_is_back_is_heard_of_while_the_run_stays_as_it_is(tmp_path):
    state, address = tmp_path / "c.sqlite", address_of_its_own()
    told: list[float] = []
    with ControllerThread(state, address=address) as first, first.client() as client:
        revision = client.create("r").revision
    client = ControlClient(address)
    watch = client.watch("r", from_revision=revision, on_away=told.append)
    reader = threading.Thread(target=next, args=(watch,), daemon=True)
    reader.start()
    eventually(lambda: told[-1:], bool)
    with ControllerThread(state, address=address) as second, second.client() as other:
        eventually(lambda: told[-1], lambda seconds: seconds == 0.0)
        other.checkpoint("r")
        reader.join(20)
    client.close()
    assert not reader.is_alive()


def test_a_deadline_of_one_call_does_not_end_the_watch(client, monkeypatch):
    monkeypatch.setattr("kfdist.control.client.WATCH_SECONDS", 0.3)
    client.create("r")
    watch = client.watch("r")
    next(watch)
    changing = threading.Timer(0.8, lambda: client.checkpoint("r"))
    changing.start()
    assert next(watch).revision == 2
    changing.join()

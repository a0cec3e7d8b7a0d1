"""RunService over a real server: every call, its refusals, and requests that are repeated."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kfdist.control.control_records import RunState
from kfdist.control.store import Batch, Store
from kfdist.errors import ConfigError
from kfdist.rpc._generated.kfdist.v1 import run_pb2
from kfdist.rpc.authentication import user_metadata
from tests.support.controller import CALL_SECONDS


def status(caught) -> tuple[grpc.StatusCode, str]:
    return caught.value.code(), caught.value.details()


def test_create_get_list(client):
    made = client.create("digits", directory="/runs/digits", total_steps=120, config="[run]\nname = 'digits'\n")
    assert (made.state, made.revision, made.total_steps, made.directory) == (
        RunState.CREATED,
        1,
        120,
        "/runs/digits",
    )
    client.create("other")
    assert client.get("digits") == made
    assert [run.name for run in client.runs()] == ["other", "digits"]
    assert [event.kind for event in client.events("digits")] == ["created"]


def test_wishes_move_settings_and_events(client, member):
    client.create("r")
    settings = [member.register_worker("r").settings]
    client.pause("r")
    client.update_settings("r", damping=0.25)
    client.checkpoint("r")
    settings.append(member.beat_worker("r").settings)
    assert (settings[1].desired, settings[1].damping, settings[1].checkpoint_serial) == ("paused", 0.25, 1)
    assert settings[1].revision == settings[0].revision + 3
    client.resume("r")
    client.checkpoint("r")
    settings.append(member.beat_worker("r").settings)
    assert (settings[2].desired, settings[2].checkpoint_serial) == ("running", 2)
    assert client.stop("r").state is RunState.STOPPING
    assert member.beat_worker("r").settings.desired == "stopped"
    kinds = [event.kind for event in client.events("r")]
    assert kinds == [
        "created",
        "started",
        "worker_registered",
        "pause_requested",
        "settings_changed",
        "checkpoint_requested",
        "running",
        "resume_requested",
        "checkpoint_requested",
        "stop_requested",
    ]


def test_asking_twice_changes_nothing_more(client):
    client.create("r")
    first = client.pause("r")
    assert client.pause("r") == first
    assert client.stop("r") == client.stop("r")


def test_a_stop_cannot_be_taken_back_and_an_ended_run_not_steered(client, member):
    client.create("r")
    member.register_worker("r")
    client.stop("r")
    with pytest.raises(ConfigError, match="is to stop, which can't be taken back"):
        client.resume("r")
    member.beat_worker("r", step=7, phase="stopped")
    assert client.get("r").state is RunState.STOPPED
    for steer in (client.pause, client.resume, client.checkpoint):
        with pytest.raises(ConfigError, match=r"has ended \(stopped\) at step 7"):
            steer("r")
    assert client.stop("r").state is RunState.STOPPED  # stopping what has stopped is no error


def test_unknown_runs_are_named_with_a_suggestion(client):
    client.create("digits")
    with pytest.raises(ConfigError, match="no run 'digist' here; did you mean 'digits'"):
        client.get("digist")
    with pytest.raises(ConfigError, match="no run 'zzz' here; there are 1 runs"):
        client.pause("zzz")
    with pytest.raises(ConfigError, match="no run 'zzz'"):
        list(client.events("zzz"))
    with pytest.raises(ConfigError, match="no run 'zzz'"):
        next(client.watch("zzz"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, ["name: '' is not", "letters, digits"]),
        ({"name": "../up"}, ["name: '../up'"]),
        ({"name": "a" * 64}, ["name: 'aaa", "1 to 63"]),
        ({"name": ".hidden"}, ["'.hidden'"]),
        ({"name": "a/b"}, ["'a/b'"]),
        ({"name": "a\n"}, ["name: 'a"]),
        ({"name": "ok", "total_steps": -1}, ["total_steps: -1", "at least 0"]),
        ({"name": "ok", "directory": "x" * 5000}, ["directory: 'xxx", "5000 characters", "4096"]),
        ({"name": "ok", "directory": "x\x1b[2J"}, ["directory", "printable"]),
        ({"name": "ok", "config": "x" * (1 << 20) + "x"}, ["config", str(1 << 20)]),
        ({"name": "ok", "request_id": ""}, ["request_id", "random UUID"]),
        ({"name": "ok", "request_id": "i" * 129}, ["request_id: 'iii", "129 characters", "128"]),
    ],
)
def test_bad_runs_are_refused_with_the_value_and_the_rule(member, client, fields, words):
    request = run_pb2.CreateRequest(**{"request_id": "id", **fields})
    with pytest.raises(grpc.RpcError) as caught:
        member.runs.Create(request, timeout=CALL_SECONDS)
    code, message = status(caught)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert all(word in message for word in words)
    assert client.runs() == []


def test_an_oversized_message_is_refused_by_its_size(member):
    request = run_pb2.CreateRequest(request_id="id", name="r", config="x" * (5 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        member.runs.Create(request, timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_repeated_request_is_answered_as_the_first_was(member, client):
    request = run_pb2.CreateRequest(request_id="one", name="r", total_steps=5)
    first = member.runs.Create(request, timeout=CALL_SECONDS)
    checkpoint = run_pb2.CheckpointRequest(request_id="two", name="r")
    asked = member.runs.Checkpoint(checkpoint, timeout=CALL_SECONDS)
    client.pause("r")
    assert member.runs.Create(request, timeout=CALL_SECONDS) == first
    assert member.runs.Checkpoint(checkpoint, timeout=CALL_SECONDS) == asked
    member.register_worker("r")
    assert member.beat_worker("r").settings.checkpoint_serial == 1
    assert [event.kind for event in client.events("r")].count("checkpoint_requested") == 1


def test_a_request_id_is_for_one_request(member, client):
    client.create("r")
    member.runs.Pause(run_pb2.PauseRequest(request_id="one", name="r"), timeout=CALL_SECONDS)
    for call, request in (
        (member.runs.Resume, run_pb2.ResumeRequest(request_id="one", name="r")),
        (member.runs.Stop, run_pb2.StopRequest(request_id="one", name="r")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=CALL_SECONDS)
        assert status(caught)[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert "'one' was used for another request" in status(caught)[1]
    assert client.get("r").state is RunState.CREATED


def test_a_refused_request_may_be_repeated_when_it_has_become_right(member, client):
    stop = run_pb2.PauseRequest(request_id="early", name="r")
    with pytest.raises(grpc.RpcError) as caught:
        member.runs.Pause(stop, timeout=CALL_SECONDS)
    assert status(caught)[0] is grpc.StatusCode.NOT_FOUND
    client.create("r")
    assert member.runs.Pause(stop, timeout=CALL_SECONDS).run.revision == 2


def test_concurrent_mutations_each_get_a_revision_of_their_own(client):
    client.create("r")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: client.checkpoint("r"), range(40)))
    assert sorted(run.revision for run in runs) == list(range(2, 42))


def test_a_caller_that_goes_away_leaves_nothing_half_done(client, member, monkeypatch):
    client.create("r")
    slow_down(monkeypatch, seconds=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        member.runs.Pause(run_pb2.PauseRequest(request_id="one", name="r"), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.checkpoint("r").revision == 3
    assert member.register_worker("r").settings.desired == "paused"


def slow_down(monkeypatch, *, seconds: float) -> None:
    """Makes every commit take this long."""
    commit = Store.commit

    def late(store: Store, batch: Batch) -> None:
        time.sleep(seconds)
        commit(store, batch)

    monkeypatch.setattr(Store, "commit", late)


def test_create_prepares_a_known_run_for_its_next_start(client, member):
    client.create("r", total_steps=10)
    member.register_worker("r", epoch=3)
    client.update_settings("r", damping=0.5)
    member.beat_worker("r", epoch=3, step=4, phase="stopped")
    again = client.create("r", total_steps=20)
    assert (again.state, again.epoch, again.total_steps) == (RunState.CREATED, 3, 20)
    settings = member.register_worker("r", epoch=4).settings
    assert (settings.desired, settings.damping, settings.checkpoint_serial) == ("running", 0.0, 0)


def test_events_come_in_pages_and_the_client_asks_for_all(client, member, monkeypatch):
    monkeypatch.setattr("kfdist.control.run_service.EVENTS_PER_CALL", 10)
    client.create("r")
    for _ in range(24):
        client.checkpoint("r")
    page = member.runs.ListEvents(run_pb2.ListEventsRequest(name="r"), timeout=CALL_SECONDS).events
    assert len(page) == 10
    events = list(client.events("r"))
    assert [event.text for event in events[1:]] == [
        f"checkpoint {n} asked for at step 0 by {user_metadata()[0][1]} (revision {n})" for n in range(1, 25)
    ]
    assert [event.event_id for event in events] == sorted({event.event_id for event in events})
    assert list(client.events("r", after=events[-2].event_id)) == events[-1:]

"""Who inverts what, and when, as users want it: drained owners, fresh inverses, groups dealt by measured seconds."""

import json

import grpc
import pytest
import typer
from typer.testing import CliRunner

from kfdist.cli import work_commands
from kfdist.errors import ConfigError
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, run_pb2
from kfdist.types import InForce, Obeyed
from tests.support.controller import CALL_SECONDS, ControllerThread, Member

GROUPS = tuple(
    membership_pb2.GroupSpec(name=name, cost=cost, position=position)
    for position, (name, cost) in enumerate({"conv1": 4.0, "conv2": 3.0, "fc1": 2.0, "head": 1.0}.items())
)


@pytest.fixture
def trains(client, member):
    """A run of four groups with two owners, all of which stay alive while a test lasts."""
    client.create("r")
    for owner in ("owner-0", "owner-1"):
        member.register_owner(owner)
    member.register_worker("r", groups=GROUPS)
    member.beat_worker("r", step=7)
    return client


long_lease = pytest.mark.parametrize("controller", [60.0], indirect=True, ids=["long-lease"])


def owners_of(member) -> dict[str, str]:
    return dict(member.assignment("r").owner_by_group)


def kinds(client) -> list[str]:
    return [event.kind for event in client.events("r")]


def texts(client, kind: str) -> list[str]:
    return [event.text for event in client.events("r") if event.kind == kind]


@long_lease
def test_a_drained_owner_is_alive_but_has_no_groups_until_it_is_undrained(trains, member) -> None:
    assert set(owners_of(member).values()) == {"owner-0", "owner-1"}
    revision = member.assignment("r").revision
    trains.drain("owner-1")
    assert set(owners_of(member).values()) == {"owner-0"}
    assert member.assignment("r").revision == revision + 1
    told = {owner.owner_id: owner.draining for owner in member.beat_worker("r").owners}
    assert told == {"owner-0": False, "owner-1": True}
    assert trains.get("r").live_owners == 2
    member.register_owner("owner-1", restarts=1)  # what restarts it knows nothing of the draining
    assert set(owners_of(member).values()) == {"owner-0"}
    assert texts(trains, "owner_drained")[0].startswith("owner owner-1 gets no new jobs, asked for at step 7 by ")
    trains.undrain("owner-1")
    assert set(owners_of(member).values()) == {"owner-0", "owner-1"}
    assert kinds(trains)[-1] == "owner_undrained"


@long_lease
def test_draining_is_refused_where_nobody_would_take_jobs(trains, member) -> None:
    trains.drain("owner-0")
    with pytest.raises(ConfigError, match="owner 'owner-1' is the only one that takes jobs; start another one"):
        trains.drain("owner-1")
    trains.drain("owner-0")  # twice changes nothing more
    assert kinds(trains).count("owner_drained") == 1
    with pytest.raises(ConfigError, match="no owner 'owner-7'; those that are alive: owner-0, owner-1"):
        trains.drain("owner-7")


def test_repeated_requests_have_no_second_effect_also_after_a_restart(tmp_path) -> None:
    drain = membership_pb2.DrainOwnerRequest(request_id="a", owner_id="owner-1")
    refresh, replan = run_pb2.RefreshRequest(request_id="b", name="r"), run_pb2.ReplanRequest(request_id="c", name="r")

    def ask(member: Member) -> list[bytes]:
        calls = ((member.stub.DrainOwner, drain), (member.runs.Refresh, refresh), (member.runs.Replan, replan))
        return [call(request, timeout=CALL_SECONDS).SerializeToString() for call, request in calls]

    with ControllerThread(tmp_path / "c", lease_seconds=60) as controller, Member(controller.address) as member:
        for owner in ("owner-0", "owner-1"):
            member.register_owner(owner)
        member.register_worker("r", groups=GROUPS)
        member.beat_worker("r", inversion_seconds={"conv1": 1.0})
        first = ask(member)
        member.stub.UndrainOwner(
            membership_pb2.UndrainOwnerRequest(request_id="d", owner_id="owner-1"), timeout=CALL_SECONDS
        )
    with ControllerThread(tmp_path / "c", lease_seconds=60) as controller, Member(controller.address) as member:
        assert ask(member) == first
        assert member.beat_worker("r").settings.refresh_serial == 1
        assert not any(owner.draining for owner in member.beat_worker("r").owners)
        with controller.client() as client:
            found = kinds(client)
            assert [found.count(kind) for kind in ("owner_drained", "refresh_requested", "replanned")] == [1, 1, 1]
        with pytest.raises(grpc.RpcError) as caught:
            member.stub.DrainOwner(
                membership_pb2.DrainOwnerRequest(request_id="a", owner_id="owner-0"), timeout=CALL_SECONDS
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@long_lease
def test_a_refresh_names_groups_by_globs_and_the_log_its_step(trains, member) -> None:
    revision = trains.refresh("r", ["conv*", "head"]).settings_revision
    settings = member.beat_worker("r").settings
    assert (settings.refresh_serial, list(settings.refresh)) == (1, ["conv1", "conv2", "head"])
    member.beat_worker("r", step=9, in_force=InForce(obeyed=(Obeyed(revision=revision, step=9),)))
    what = "refresh of conv1, conv2, head, inverted at the next step"
    assert texts(trains, "settings_obeyed") == [f"revision {revision} ({what}), agreed on by all ranks at step 9"]
    trains.refresh("r")
    settings = member.beat_worker("r").settings
    assert (settings.refresh_serial, list(settings.refresh)) == (2, [])
    with pytest.raises(ConfigError, match="groups: 'conf1' matches no group of the run; did you mean 'conv1'"):
        trains.refresh("r", ["conf1"])
    member.register_worker("r", epoch=2, groups=GROUPS)  # of which the last start's ranks haven't heard
    told = InForce(obeyed=(Obeyed(revision=revision + 1, step=10),))
    assert member.beat_worker("r", epoch=2, step=10, in_force=told).settings.refresh_serial == 2
    member.register_worker("r", epoch=3, groups=GROUPS)  # its ranks have no old request to obey
    assert member.beat_worker("r", epoch=3, step=11).settings.refresh_serial == 0
    assert texts(trains, "refresh_lost") == []


@long_lease
def test_a_refresh_that_a_crash_undid_is_asked_of_the_resumed_ranks(trains, member) -> None:
    revision = trains.refresh("r", ["head"]).settings_revision
    member.beat_worker("r", step=9, in_force=InForce(obeyed=(Obeyed(revision=revision, step=9),)))
    assert trains.get("r").obeyed_revision == revision
    member.register_worker("r", epoch=2, groups=GROUPS)
    settings = member.beat_worker("r", epoch=2, step=5).settings
    assert (settings.refresh_serial, list(settings.refresh)) == (1, ["head"])
    (text,) = texts(trains, "refresh_lost")
    assert text.startswith("the refresh agreed on at step 9 was lost with the ranks: start 2 goes on from step 5")
    shown = trains.get("r")
    assert shown.settings_revision == settings.revision > shown.obeyed_revision == revision


@long_lease
def test_groups_are_dealt_anew_by_measured_seconds_and_stay_so(trains, member) -> None:
    with pytest.raises(ConfigError, match="has been measured"):
        trains.replan("r")
    assert owners_of(member) == {"conv1": "owner-0", "conv2": "owner-1", "fc1": "owner-0", "head": "owner-1"}
    seconds = {"conv1": 1.0, "conv2": 1.0, "head": 9.0}  # fc1 counts by its cost: 11 s / 8 * 2
    member.beat_worker("r", step=9, inversion_seconds=seconds)
    trains.replan("r")
    dealt = owners_of(member)
    assert dealt == {"head": "owner-0", "fc1": "owner-1", "conv1": "owner-1", "conv2": "owner-1"}
    (text,) = texts(trains, "replanned")
    assert text.startswith("groups dealt anew from 3 measured inversions: 3 of 4 moved; the busiest owner has 9 s")
    assert ", before 10 s; asked for at step 9 by " in text
    member.register_worker("r", groups=GROUPS)  # a courier that comes back brings the estimated costs again
    assert owners_of(member) == dealt
    member.register_owner("owner-2")
    assert len([group for group, owner in owners_of(member).items() if owner == owners_of(member)["head"]]) == 1


@long_lease
def test_the_commands(trains, member, controller) -> None:
    app = typer.Typer()
    work_commands.register(app)

    def kfdist(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env={"KFDIST_CONTROL_ADDRESS": controller.address})
        assert result.exit_code == 0, result.output
        return result.output

    assert kfdist("drain", "owner-0") == ("owner-0 gets no new jobs; kfdist undrain owner-0 lets it have them again\n")
    assert json.loads(kfdist("undrain", "owner-0", "--json")) == {"owner": "owner-0", "state": "undrained"}
    assert kfdist("refresh", "r", "conv1", "head").startswith("r: running at step 7")
    assert list(member.beat_worker("r", inversion_seconds={"head": 1.0}).settings.refresh) == ["conv1", "head"]
    assert json.loads(kfdist("replan", "r", "--json"))["name"] == "r"
    assert "its blocks are dealt anew: `kfdist events r` says how many moved" in kfdist("replan", "r")
    assert kinds(trains)[-5:] == ["owner_drained", "owner_undrained", "refresh_requested", "replanned", "replanned"]

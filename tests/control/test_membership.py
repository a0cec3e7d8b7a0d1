"""MembershipService over a real server: fencing, leases, the run's state, and who inverts what."""

import asyncio
import math
import time

import grpc
import pytest

from kfdist.control.control_records import RunState
from kfdist.policies.assignment import assign
from kfdist.rpc._generated.kfdist.v1 import membership_pb2
from kfdist.types import GroupSpec
from tests.support.controller import ControllerThread, Member, sample, values
from tests.support.waits import eventually

GROUPS = [("conv1", 1e6), ("conv2", 8e6), ("fc1", 5e9), ("fc2", 3e5), ("fc3", 2e5)]


def wire_groups() -> list[membership_pb2.GroupSpec]:
    return [
        membership_pb2.GroupSpec(name=name, cost=cost, position=position)
        for position, (name, cost) in enumerate(GROUPS)
    ]


def expected(owners: list[str], policy: str = "round_robin") -> dict[str, str]:
    specs = [GroupSpec(name=name, cost=cost, position=i, bytes=0) for i, (name, cost) in enumerate(GROUPS)]
    return assign(specs, owners, policy)


def code(caught) -> grpc.StatusCode:
    return caught.value.code()


class TestFencing:
    def test_an_older_start_is_refused_everywhere(self, client, member, controller):
        member.register_worker("r", epoch=1)
        member.beat_worker("r", epoch=1, step=5)
        with Member(controller.address) as newer:
            newer.register_worker("r", epoch=2)
            newer.beat_worker("r", epoch=2, step=1)
            with pytest.raises(grpc.RpcError) as caught:
                member.beat_worker("r", epoch=1, step=6, samples=(sample("kfdist_loss", 666),))
            assert code(caught) is grpc.StatusCode.ABORTED
            assert "start 1 of run 'r' is over: 2 is the newest" in caught.value.details()
            with pytest.raises(grpc.RpcError) as caught:
                member.register_worker("r", epoch=1)
            assert code(caught) is grpc.StatusCode.ABORTED
        assert "666" not in controller.scrape()
        run = client.get("r")
        assert (run.epoch, run.state, run.step) == (2, RunState.RUNNING, 1)

    def test_a_start_that_nobody_registered_has_to_register(self, member):
        with pytest.raises(grpc.RpcError) as caught:
            member.beat_worker("r")
        assert code(caught) is grpc.StatusCode.NOT_FOUND
        member.register_worker("r", epoch=1, world_size=2)
        for epoch, rank in ((2, 0), (1, 2), (1, -1)):
            with pytest.raises(grpc.RpcError) as caught:
                member.beat_worker("r", rank=rank, epoch=epoch)
            assert code(caught) is grpc.StatusCode.FAILED_PRECONDITION
            assert "isn't registered" in caught.value.details()

    def test_ranks_of_one_start_agree_on_their_number(self, member):
        member.register_worker("r", rank=0, world_size=2)
        with pytest.raises(grpc.RpcError) as caught:
            member.register_worker("r", rank=1, world_size=4)
        assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT
        assert "world_size is 4; start 1 of run 'r' has 2" in caught.value.details()

    @pytest.mark.parametrize("controller", [60.0], indirect=True)
    def test_two_runs_of_one_name_are_told_apart_by_their_processes(self, client, member):
        member.register_worker("r", pid=1)
        member.beat_worker("r", step=5)
        with pytest.raises(grpc.RpcError) as caught:
            member.register_worker("r", pid=2)
        assert code(caught) is grpc.StatusCode.ABORTED
        assert "rank 0 of run 'r', start 1, is process 1 already" in caught.value.details()
        assert "give one of them another name" in caught.value.details()
        member.register_worker("r", pid=1)  # its courier was respawned
        member.register_worker("r", epoch=2, pid=2)  # it was started again
        assert client.get("r").epoch == 2

    @pytest.mark.parametrize("controller", [60.0], indirect=True)
    def test_containers_whose_processes_have_one_id_are_told_apart_by_their_words(self, client, member):
        member.register_worker("r", pid=7, process="a")
        member.register_worker("r", pid=7, process="a")  # its courier was respawned
        with pytest.raises(grpc.RpcError) as caught:
            member.register_worker("r", pid=7, process="b")
        assert code(caught) is grpc.StatusCode.ABORTED
        assert "is process 7 already: another run has this name" in caught.value.details()
        member.beat_worker("r", phase="finished")
        member.register_worker("r", pid=7, process="b")
        assert client.get("r").state is RunState.CREATED

    def test_a_number_that_no_start_can_have_come_to_is_refused_and_locks_nobody_out(self, client, member):
        now = time.time_ns() // 10**6
        client.create("counted", directory="/runs/counted")
        for run, newest, allowed, too_many in (
            ("new", 0, now, 2**63 - 1),
            ("of the clock", now - 9, now, now + 10**9),
            ("counted", 5, 10_005, now),
        ):
            name = run.replace(" ", "-")
            if newest:
                member.register_worker(name, epoch=newest)
            with pytest.raises(grpc.RpcError) as caught:
                member.register_worker(name, epoch=too_many)
            assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT
            assert f"epoch is {too_many}; the newest start of run {name!r} is {newest}" in caught.value.details()
            member.register_worker(name, epoch=allowed)
            assert client.get(name).epoch == allowed

    @pytest.mark.parametrize("controller", [60.0], indirect=True)
    def test_a_run_whose_starts_are_counted_anew_begins_again_once_it_has_ended(self, client, member):
        """As one whose directory was removed, under the controller of before."""
        for rank in range(2):
            member.register_worker("r", rank=rank, world_size=2, pid=1 + rank)
        member.beat_worker("r", phase="finished", step=10)  # rank 1 was killed, and is taken for alive
        for rank in range(2):
            member.register_worker("r", rank=rank, world_size=2, pid=3 + rank)
        assert client.get("r").state is RunState.CREATED
        member.beat_worker("r", step=1)
        assert (client.get("r").state, client.get("r").step) == (RunState.RUNNING, 1)
        assert [event.kind for event in client.events("r")].count("started") == 2

    def test_starts_of_one_number_are_counted_together(self, member, controller):
        for word, steps in (("a", 5), ("b", 7), ("b", 8)):
            member.register_worker("r", process=word)
            member.beat_worker("r", samples=(sample("kfdist_steps_total", steps),))
            member.register_worker("r", process=word)  # its courier was respawned
            member.beat_worker("r", phase="finished", samples=(sample("kfdist_steps_total", steps + 1),))
        assert values(controller.scrape())['kfdist_steps_total{run="r"}'] == 6 + 9

    def test_a_message_from_nobody_is_refused(self, member):
        with pytest.raises(grpc.RpcError) as caught:
            member.send(membership_pb2.HeartbeatRequest())
        assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT


class TestStates:
    @pytest.mark.parametrize(
        ("phase", "state"),
        [
            ("running", RunState.RUNNING),
            ("waiting", RunState.RUNNING),
            ("paused", RunState.PAUSED),
            ("finished", RunState.FINISHED),
            ("stopped", RunState.STOPPED),
            ("failed", RunState.FAILED),
        ],
    )
    def test_the_word_of_rank_zero_moves_the_run(self, client, member, phase, state):
        member.register_worker("r", rank=0, world_size=2)
        member.beat_worker("r", rank=1, phase="failed", step=9)
        assert client.get("r").state is RunState.CREATED
        member.beat_worker("r", rank=0, phase=phase, step=3)
        assert (client.get("r").state, client.get("r").step) == (state, 3)

    def test_a_start_that_ended_stays_ended_until_the_next(self, client, member):
        member.register_worker("r", epoch=1)
        member.beat_worker("r", phase="finished", step=10)
        member.register_worker("r", epoch=1)  # its courier was respawned
        member.beat_worker("r", phase="running", step=9)
        assert (client.get("r").state, client.get("r").step) == (RunState.FINISHED, 10)
        member.register_worker("r", epoch=2)
        assert client.get("r").state is RunState.CREATED
        member.beat_worker("r", epoch=2, step=1)
        assert client.get("r").state is RunState.RUNNING

    def test_wishes_outlast_a_crash_but_not_an_end(self, client, member):
        member.register_worker("r", epoch=1)
        member.beat_worker("r")
        client.pause("r")
        client.update_settings("r", damping=0.125)
        crashed = member.register_worker("r", epoch=2).settings
        assert (crashed.desired, crashed.damping) == ("paused", 0.125)
        client.stop("r")
        member.beat_worker("r", epoch=2, phase="stopped")
        ended = member.register_worker("r", epoch=3).settings
        assert (ended.desired, ended.damping) == ("running", 0.0)

    def test_a_stop_before_the_first_rank_reaches_it(self, client, member):
        client.create("r")
        client.stop("r")
        assert member.register_worker("r").settings.desired == "stopped"
        member.beat_worker("r")
        assert client.get("r").state is RunState.STOPPING
        member.beat_worker("r", phase="stopped")
        assert client.get("r").state is RunState.STOPPED

    def test_a_stop_that_no_rank_ever_hears_ends_the_run(self, client):
        client.create("r")
        client.stop("r")
        eventually(lambda: client.get("r").state, lambda state: state is RunState.STOPPED)
        assert list(client.events("r"))[-1].text.startswith("stopped before it began")

    @pytest.mark.parametrize(("step", "phase"), [(-1, "running"), (0, "training"), (0, "")])
    def test_nonsense_is_refused(self, client, member, step, phase):
        member.register_worker("r")
        with pytest.raises(grpc.RpcError) as caught:
            member.beat_worker("r", step=step, phase=phase)
        assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT
        assert client.get("r").state is RunState.CREATED


class TestLeases:
    def test_a_silent_run_is_lost_and_comes_back(self, client, member):
        member.register_worker("r")
        member.beat_worker("r", step=5)
        assert client.get("r").state is RunState.RUNNING
        lost = eventually(lambda: client.get("r"), lambda run: run.state is RunState.LOST)
        assert (lost.live_workers, lost.step) == (0, 5)
        member.beat_worker("r", step=6)
        assert client.get("r").state is RunState.RUNNING
        kinds = [event.kind for event in client.events("r")]
        assert kinds[-3:] == ["running", "lost", "returned"]

    def test_a_run_whose_ranks_beat_is_not_lost(self, client, member, controller):
        member.register_worker("r", rank=0, world_size=2)
        member.register_worker("r", rank=1, world_size=2)
        eventually(lambda: client.get("r").live_workers, lambda live: live == 2)
        for step in range(12):  # three leases long; rank 1 is silent
            member.beat_worker("r", step=step)
            assert client.get("r").state is not RunState.LOST
            controller.call(_sleep(0.15))
        assert client.get("r").live_workers == 1

    def test_a_stop_asked_of_a_lost_run_is_obeyed_when_it_returns(self, client, member):
        member.register_worker("r")
        member.beat_worker("r")
        eventually(lambda: client.get("r").state, lambda state: state is RunState.LOST)
        assert client.stop("r").state is RunState.LOST
        assert member.beat_worker("r").settings.desired == "stopped"
        assert client.get("r").state is RunState.STOPPING

    def test_an_ended_run_is_not_lost(self, client, member, controller):
        member.register_worker("r")
        member.beat_worker("r", phase="finished")
        controller.call(_sleep(1.0))
        assert (client.get("r").state, client.get("r").live_workers) == (RunState.FINISHED, 0)

    def test_a_controller_that_slept_does_not_blame_the_members(self, client, member, controller):
        # As after SIGSTOP and SIGCONT: its loop stands still for two leases while beats wait in the socket.
        member.register_worker("r")
        member.beat_worker("r")
        controller.call(_stand_still(1.2))
        member.beat_worker("r", step=1)
        controller.call(_sleep(0.2))
        member.beat_worker("r", step=2)
        assert "lost" not in [event.kind for event in client.events("r")]


class TestAssignment:
    def test_groups_are_dealt_anew_when_owners_come_and_go(self, client, member, controller):
        member.register_worker("r", groups=wire_groups())
        assert dict(member.assignment("r").owner_by_group) == {}
        assert member.register_owner("owner-0") == ["owner-0"]
        assert dict(member.assignment("r").owner_by_group) == expected(["owner-0"])
        assert member.register_owner("owner-1", port=2) == ["owner-0", "owner-1"]
        both = member.assignment("r")
        assert dict(both.owner_by_group) == expected(["owner-0", "owner-1"])
        assert [(owner.owner_id, owner.address) for owner in both.owners] == [
            ("owner-0", "127.0.0.1:1"),
            ("owner-1", "127.0.0.1:2"),
        ]
        with Member(controller.address) as owner:
            alone = eventually(
                lambda: (owner.beat_owner("owner-1"), member.assignment("r"))[1], lambda seen: len(seen.owners) == 1
            )
            assert dict(alone.owner_by_group) == expected(["owner-1"])
            assert alone.revision > both.revision
            owner.beat_owner("owner-0")  # it had only been stopped
            back = member.assignment("r")
            assert dict(back.owner_by_group) == expected(["owner-0", "owner-1"])
            assert back.revision == alone.revision + 1
        kinds = [event.kind for event in client.events("r")]
        assert kinds.count("owner_joined") == 3
        assert kinds.count("owner_lost") == 1

    def test_beats_carry_owners_and_the_revision(self, member):
        member.register_owner("owner-0")
        member.register_worker("r", groups=wire_groups(), assignment="lpt")
        answer = member.beat_worker("r")
        assert [owner.owner_id for owner in answer.owners] == ["owner-0"]
        assert answer.assignment_revision == member.assignment("r").revision == 1
        member.register_owner("owner-1")
        assert member.beat_worker("r").assignment_revision == 2
        assert dict(member.assignment("r").owner_by_group) == expected(["owner-0", "owner-1"], "lpt")

    def test_a_restarted_owner_is_found_at_its_new_address(self, client, member):
        member.register_worker("r", groups=wire_groups())
        member.register_owner("owner-0", port=1000, pid=1)
        member.register_owner("owner-0", port=2000, pid=2, restarts=1)
        assert [owner.address for owner in member.assignment("r").owners] == ["127.0.0.1:2000"]
        assert list(client.events("r"))[-1].text == "owner owner-0 at 127.0.0.1:2000, restarted 1 times"

    def test_whose_name_another_process_took_has_to_register_again(self, member, controller):
        member.register_owner("owner-0", port=1000)
        with Member(controller.address) as stale:
            stale.register_owner("owner-0", port=2000)  # its node was cut off, and taken for dead
            with pytest.raises(grpc.RpcError) as caught:
                member.beat_owner("owner-0", address="127.0.0.1:1000")
        assert code(caught) is grpc.StatusCode.NOT_FOUND
        assert "'owner-0' isn't registered at 127.0.0.1:1000; register it first" in caught.value.details()
        member.register_owner("owner-0", port=1000)
        answer = member.beat_owner("owner-0", address="127.0.0.1:1000")
        assert [owner.address for owner in answer.owners] == ["127.0.0.1:1000"]

    def test_an_unknown_owner_has_to_register(self, member):
        with pytest.raises(grpc.RpcError) as caught:
            member.beat_owner("nobody")
        assert code(caught) is grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            (
                {"assignment": "robin"},
                ["assignment: 'robin'", "'round_robin', 'model_order', 'lpt'; did you mean 'round_robin'?"],
            ),
            ({"groups": [membership_pb2.GroupSpec(name="a")] * 2}, ["groups: 'a'", "different from all others"]),
            ({"groups": [membership_pb2.GroupSpec(name="")]}, ["groups: ''"]),
            ({"groups": [membership_pb2.GroupSpec(name="a", cost=math.nan)]}, ["groups[a].cost: nan"]),
            ({"groups": [membership_pb2.GroupSpec(name="a", position=-1)]}, ["position: -1"]),
            ({"rank": 2, "world_size": 2}, ["worker_rank: 2", "at least 0 and at most 1"]),
            ({"world_size": 0}, ["world_size: 0"]),
            ({"epoch": -1}, ["epoch: -1"]),
        ],
    )
    def test_bad_registrations(self, client, member, fields, words):
        with pytest.raises(grpc.RpcError) as caught:
            member.register_worker("r", **fields)
        assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT
        assert all(word in caught.value.details() for word in words)
        assert client.runs() == []

    @pytest.mark.parametrize(("owner_id", "port"), [("", 1), ("a b", 1), ("owner-0", 0), ("owner-0", 65536)])
    def test_bad_owners(self, member, owner_id, port):
        with pytest.raises(grpc.RpcError) as caught:
            member.register_owner(owner_id, port=port)
        assert code(caught) is grpc.StatusCode.INVALID_ARGUMENT

    def test_too_many_groups_are_refused(self, member):
        groups = [membership_pb2.GroupSpec(name=str(i)) for i in range(20_001)]
        with pytest.raises(grpc.RpcError) as caught:
            member.register_worker("r", groups=groups)
        assert "groups: 20001" in caught.value.details()


class TestRestart:
    def test_members_are_found_again_without_registering(self, tmp_path):
        state = tmp_path / "c.sqlite"
        with ControllerThread(state) as first, Member(first.address) as member:
            member.register_owner("owner-0")
            member.register_worker("r", epoch=4, world_size=2, groups=wire_groups())
            member.beat_worker("r", epoch=4, step=17)
            before = member.assignment("r")
            with first.client() as client:
                seen = eventually(lambda: client.get("r"), lambda run: run.live_workers == 1 and run.step == 17)
        with ControllerThread(state) as second, Member(second.address) as member, second.client() as client:
            assert member.assignment("r") == before
            assert client.get("r") == seen
            assert (seen.state, seen.live_owners) == (RunState.RUNNING, 1)
            answer = member.beat_worker("r", epoch=4, step=18)
            assert answer.assignment_revision == before.revision
            member.beat_owner("owner-0")
            with pytest.raises(grpc.RpcError) as caught:
                member.register_worker("r", epoch=3)
            assert code(caught) is grpc.StatusCode.ABORTED

    def test_who_does_not_come_back_within_a_lease_is_gone(self, tmp_path):
        state = tmp_path / "c.sqlite"
        with ControllerThread(state) as first, Member(first.address) as member:
            member.register_owner("owner-0")
            member.register_worker("r", groups=wire_groups())
            member.beat_worker("r")
        with ControllerThread(state, lease_seconds=0.5) as second, second.client() as client:
            assert [owner.name for owner in client.owners("r")] == ["owner-0"]
            eventually(lambda: client.get("r").state, lambda seen: seen is RunState.LOST)
            eventually(lambda: client.owners("r"), lambda owners: owners == [])
        with ControllerThread(state) as third, third.client() as client:
            assert client.owners("r") == []
            assert client.get("r").state is RunState.LOST


def test_gauges_of_rank_zero_are_shown_with_the_run(client, member):
    member.register_worker("r", world_size=2)
    member.beat_worker(
        "r",
        step=3,
        samples=(
            sample("kfdist_loss", 0.5),
            sample("kfdist_staleness_steps", 12, block="a"),
            sample("kfdist_staleness_steps", 30, block="b"),
        ),
    )
    run = eventually(lambda: client.get("r"), lambda run: bool(run.gauges))
    assert run.gauges == {"kfdist_loss": 0.5, "kfdist_staleness_steps": 30}


async def _sleep(seconds: float) -> None:

    await asyncio.sleep(seconds)


async def _stand_still(seconds: float) -> None:

    time.sleep(seconds)

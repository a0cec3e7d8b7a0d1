"""Runs over real borders: ranks on hosts that share no directory, controller and owners on two more, a desk on another.

Cables are cut and mended meanwhile, for longer than in `test_borders.py`.
"""

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.far_service import Service, far_service, oldest, told
from tests.support.launches import summary_of
from tests.support.waits import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RUN = """
[run]
steps = 1000000
log_period = 5
[data]
batch_size = 16
[model]
settings = { channels = 8, hidden = 32 }
[checkpoint]
period = 0
"""

FIXED_LAG = ("preconditioner.adoption=fixed-lag", "preconditioner.lag=5", "run.steps=400")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Service]:
    with far_service(tmp_path_factory.mktemp("apart"), certificates, RUN, spread=False) as started:
        yield started


@pytest.fixture(scope="module")
def calm(service: Service) -> dict[str, Any]:
    """Returns the summary of a fixed-lag run that nothing disturbed."""
    with service.torchrun("calm", *FIXED_LAG) as (first, second):
        first.expect(0)
        second.expect(0)
    return summary_of(service.folder / "a" / "calm")


def assert_equal_on_all_ranks(summary: Mapping[str, Any]) -> None:
    assert len(summary["parameter_sha256"]) == 2 and len(set(summary["parameter_sha256"])) == 1


def assert_ended_alike(summary: Mapping[str, Any], calm: Mapping[str, Any]) -> None:
    assert_equal_on_all_ranks(calm)
    assert summary["status"] == "finished"
    assert summary["parameter_sha256"] == calm["parameter_sha256"]
    assert summary["metrics"]["test_loss"] == calm["metrics"]["test_loss"]


def test_a_run_on_two_hosts_outlives_a_cut_cable_and_leaves_a_whole_copy_on_each(service: Service):
    directory = service.folder / "a" / "apart"
    with service.torchrun("apart") as (first, second):
        first.wait_until("a result of the owners for every block", lambda: oldest(directory) > 0)
        with service.owners_apart():
            cut_at = told(directory)["step"]
            first.wait_until("steps without owners", lambda: told(directory)["step"] > cut_at + 200)
            assert oldest(directory) < cut_at + 100  # by then the cable was cut, whatever the file of steps said
            mended = told(directory)["step"]
        first.wait_until("only inverses of steps after the cut", lambda: oldest(directory) > mended)
        shown = service.ask("status", "apart")
        assert (shown["state"], shown["live_workers"]) == ("running", 2)
        service.ask("stop", "apart")
        first.expect(0)  # with 75, torchrun would start the ranks again
        second.expect(0)
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped"
    assert_equal_on_all_ranks(stopped)
    assert service.checkpoints("a", "apart") == [stopped["steps"]]
    assert service.files("a", "apart") == service.files("b", "apart")


def test_a_run_resumes_where_its_first_rank_has_nothing(service: Service):
    with service.torchrun("moved", "run.steps=60") as (first, second):
        first.expect(0)
        second.expect(0)
    stopped = summary_of(service.folder / "a" / "moved")
    assert (stopped["status"], stopped["steps"]) == ("finished", 60)
    # By hand, on other hosts: rank 0 on one that is new, with an empty disk.
    steps = stopped["steps"] + 100
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": service.hosts["c"].address, "MASTER_PORT": "29502"}
    arguments = ("worker", str(service.config), "--set", "run.name=moved", "--set", "run.dir=moved")
    arguments += ("--set", f"run.steps={steps}")
    with (
        service.command("c", *arguments, environment={**meeting, "RANK": "0"}) as first,
        service.command("b", *arguments, environment={**meeting, "RANK": "1"}) as second,
    ):
        assert f"resumed at step {stopped['steps']} on 2 ranks" in first.expect(0)
        second.expect(0)
    shown = service.ask("status", "moved")
    assert (shown["state"], shown["step"], shown["epoch"]) == ("finished", steps, 2)
    finished = summary_of(service.folder / "c" / "moved")
    assert_equal_on_all_ranks(finished)
    assert finished["rank_modules_clean"] is True


def test_fixed_lag_waits_for_owners_behind_a_cut_cable_obeys_and_ends_as_if_it_had_not_been(
    service: Service, calm: dict[str, Any]
):
    directory = service.folder / "a" / "cut"
    with service.torchrun("cut", *FIXED_LAG) as (first, second):
        first.wait_until("a tenth of its steps", lambda: told(directory)["step"] >= 40)
        with service.owners_apart():
            time.sleep(3)
            stuck = told(directory)["step"]
            time.sleep(3)
            assert told(directory)["step"] == stuck < 400
        first.wait_until("steps after the cut", lambda: told(directory)["step"] > stuck + 20)
        with service.owners_apart():
            time.sleep(20)  # longer than it takes to find a connection dead
            assert service.ask("status", "cut")["state"] == "running"
            service.ask("stop", "cut")
            assert "the run was asked to stop while it waited" in first.expect(0)
            second.expect(0)
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped" and stuck + 20 < stopped["steps"] < 400
    with service.torchrun("cut", *FIXED_LAG) as (first, second):
        assert f"resumed at step {stopped['steps']} on 2 ranks" in first.expect(0)
        second.expect(0)
    assert_ended_alike(summary_of(directory), calm)


def test_delay_and_loss_slow_a_run_down_and_change_nothing_of_fixed_lag(service: Service, calm: dict[str, Any]):
    hosts, directory = service.hosts, service.folder / "a" / "lossy"
    with (
        hosts["head"].slow(seconds=0.03, loss=0.02),
        hosts["control"].slow(seconds=0.03, loss=0.02),
    ):
        with service.torchrun("lossy") as (first, second):
            first.wait_until("a result of the owners for every block", lambda: oldest(directory) > 0)
            before = told(directory)["step"]
            first.wait_until("inverses of later steps", lambda: oldest(directory) > before)
            shown = service.ask("status", "lossy")
            assert (shown["state"], shown["live_workers"], shown["live_owners"]) == ("running", 2, 2)
            service.ask("stop", "lossy")
            first.expect(0)
            second.expect(0)
        with service.torchrun("far", *FIXED_LAG) as (first, second):
            first.expect(0)
            second.expect(0)
    assert_equal_on_all_ranks(summary_of(directory))
    assert_ended_alike(summary_of(service.folder / "a" / "far"), calm)


def test_a_run_goes_on_without_its_controller_and_obeys_once_that_is_back(service: Service):
    directory = service.folder / "a" / "alone"
    with service.torchrun("alone") as (first, second):
        first.wait_until("a result of the owners for every block", lambda: oldest(directory) > 0)
        with service.hosts["control"].cut():
            time.sleep(20)  # longer than it takes to find a connection dead, and than a lease
            before = told(directory)["step"]
            first.wait_until("inverses of steps without a controller", lambda: oldest(directory) > before)
        eventually(
            lambda: service.ask("status", "alone"),
            lambda seen: (seen["state"], seen["live_workers"], seen["live_owners"]) == ("running", 2, 2),
            seconds=60,
        )
        kinds = [event["kind"] for event in service.ask("events", "alone")["events"]]
        assert {"lost", "returned"} <= set(kinds)
        service.ask("stop", "alone")
        first.expect(0)
        second.expect(0)
    assert summary_of(directory)["status"] == "stopped"


def test_torchrun_starts_a_killed_rank_again_from_the_newest_checkpoint(service: Service):
    directory = service.folder / "a" / "elastic"
    with service.torchrun("elastic", "run.steps=600", "checkpoint.period=100") as (first, second):
        first.wait_until("two checkpoints", lambda: len(service.checkpoints("a", "elastic")) >= 2)
        killed_at = told(directory)["step"]
        os.kill(second.wait_for_member("kfdist worker").pid, signal.SIGKILL)
        second.expect(0)
        said = first.expect(0)
    resumed = int(re.findall(r"resumed at step (\d+) on 2 ranks", said)[0])
    assert resumed % 100 == 0 and 200 <= resumed <= killed_at + 100
    summary = summary_of(directory)
    assert (summary["status"], summary["start"], summary["steps"]) == ("finished", 2, 600)
    assert_equal_on_all_ranks(summary)
    assert service.files("a", "elastic") == service.files("b", "elastic")

"""Runs over real borders: ranks on hosts that share no directory, controller and owners on two more, a desk on another.

Cables are cut and mended meanwhile.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, run
from tests.support.controller import eventually
from tests.support.hosts import Host, made_hosts
from tests.support.launches import checkpoints_of, summary_of
from tests.support.training import events

pytestmark = pytest.mark.timeout(300)

RUN = """
[run]
steps = 1000000
log_period = 5
[data]
batch_size = 16
[model]
settings = { channels = 8, hidden = 32 }
[cluster]
owners = 1
owner_address = "node"
[checkpoint]
period = 0
"""


FIXED_LAG = ("preconditioner.adoption=fixed-lag", "preconditioner.lag=5", "run.steps=400")


@dataclass(frozen=True)
class Service:
    """A controller and owners on hosts of their own.

    Attributes:
        hosts: All hosts: `a`, `b` and `c` for ranks, `control`, `owners`, and `desk`, from where somebody looks.
        config: The configuration of the runs that they serve, the same on all hosts.
        folder: Where each host has its working directory, and there the runs' directories.
        environment: Of commands without a configuration.
    """

    hosts: Mapping[str, Host]
    config: Path
    folder: Path
    environment: Mapping[str, str]

    def command(self, host: str, *arguments: str, **options: Any) -> Command:
        directory = self.folder / host
        directory.mkdir(exist_ok=True)
        return Command(*arguments, host=self.hosts[host].prefix, directory=directory, **options)

    @contextmanager
    def torchrun(self, name: str, *overrides: str) -> Iterator[tuple[Command, Command]]:
        """Starts one rank of a run on each of the hosts `a` and `b`; it is started again once if it dies."""
        arguments = (
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--max-restarts",
            "1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "apart",
        )
        arguments += ("--rdzv-endpoint", f"{self.hosts['a'].address}:29501", "-m", "kfdist", "worker", str(self.config))
        for override in (f"run.name={name}", f"run.dir={name}", *overrides):
            arguments += ("--set", override)
        with (
            self.command("a", *arguments, module="torch.distributed.run") as first,
            self.command("b", *arguments, module="torch.distributed.run") as second,
        ):
            yield first, second

    def ask(self, verb: str, name: str) -> dict[str, Any]:
        """Gives a command about a run, from another host still."""
        arguments = (verb, name, "--address", f"{self.hosts['control'].address}:7070", "--json")
        return json.loads(run(*arguments, environment=self.environment, host=self.hosts["desk"].prefix))

    def files(self, host: str, name: str) -> dict[str, bytes]:
        """Returns the files of a run's checkpoints that a host has."""
        checkpoints = self.folder / host / name / "checkpoints"
        return {str(path.relative_to(checkpoints)): path.read_bytes() for path in checkpoints.glob("*/*")}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("apart")
    with made_hosts("a", "b", "c", "control", "owners", "desk") as hosts:
        address = hosts["control"].address
        config = folder / "run.toml"
        config.write_text(
            f'{RUN}[control]\naddress = "{address}:7070"\nmetrics_address = "{address}:9464"\n'
            f'[security]\ncertificates = "{certificates}"\n'
        )
        us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
        service = Service(hosts=hosts, config=config, folder=folder, environment=us)
        ready, owners_ready = folder / "ready.json", folder / "owners-ready.json"
        with service.command("control", "serve", str(config), "--ready-file", str(ready)) as controller:
            controller.wait_for_file(ready)
            with service.command("owners", "pool", str(config), "--ready-file", str(owners_ready)) as pool:
                pool.wait_for_file(owners_ready)
                yield service


@pytest.fixture(scope="module")
def calm(service: Service) -> dict[str, Any]:
    """Returns the summary of a fixed-lag run that nothing disturbed."""
    with service.torchrun("calm", *FIXED_LAG) as (first, second):
        first.expect(0)
        second.expect(0)
    return summary_of(service.folder / "a" / "calm")


def told(directory: Path) -> dict[str, Any]:
    """Returns what a run last told of its steps."""
    lines = events(directory, "step") if (directory / "metrics.jsonl").exists() else []
    return lines[-1] if lines else {"step": 0, "staleness": {"max": 0}}


def oldest(directory: Path) -> int:
    """Returns of which step the oldest statistics are that an inverse in use was made of."""
    last = told(directory)
    return last["step"] - last["staleness"]["max"]


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
        with service.hosts["owners"].cut():
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
    assert checkpoints_of(directory) == [stopped["steps"]]
    assert service.files("a", "apart") == service.files("b", "apart")


@pytest.mark.slow
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


@pytest.mark.slow
def test_fixed_lag_waits_for_owners_behind_a_cut_cable_obeys_and_ends_as_if_it_had_not_been(
    service: Service, calm: dict[str, Any]
):
    directory, owners = service.folder / "a" / "cut", service.hosts["owners"]
    with service.torchrun("cut", *FIXED_LAG) as (first, second):
        first.wait_until("a tenth of its steps", lambda: told(directory)["step"] >= 40)
        with owners.cut():
            time.sleep(3)
            stuck = told(directory)["step"]
            time.sleep(3)
            assert told(directory)["step"] == stuck < 400
        first.wait_until("steps after the cut", lambda: told(directory)["step"] > stuck + 20)
        with owners.cut():
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


@pytest.mark.slow
def test_delay_and_loss_slow_a_run_down_and_change_nothing_of_fixed_lag(service: Service, calm: dict[str, Any]):
    hosts, directory = service.hosts, service.folder / "a" / "lossy"
    with (
        hosts["owners"].slow(seconds=0.03, loss=0.02),
        hosts["control"].slow(seconds=0.03, loss=0.02),
    ):
        with service.torchrun("lossy") as (first, second):
            first.wait_until("a result of the owners for every block", lambda: oldest(directory) > 0)
            before = told(directory)["step"]
            first.wait_until("inverses of later steps", lambda: oldest(directory) > before)
            shown = service.ask("status", "lossy")
            assert (shown["state"], shown["live_workers"], shown["live_owners"]) == ("running", 2, 1)
            service.ask("stop", "lossy")
            first.expect(0)
            second.expect(0)
        with service.torchrun("far", *FIXED_LAG) as (first, second):
            first.expect(0)
            second.expect(0)
    assert_equal_on_all_ranks(summary_of(directory))
    assert_ended_alike(summary_of(service.folder / "a" / "far"), calm)


@pytest.mark.slow
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
            lambda seen: (seen["state"], seen["live_workers"], seen["live_owners"]) == ("running", 2, 1),
            seconds=60,
        )
        kinds = [event["kind"] for event in service.ask("events", "alone")["events"]]
        assert {"lost", "returned"} <= set(kinds)
        service.ask("stop", "alone")
        first.expect(0)
        second.expect(0)
    assert summary_of(directory)["status"] == "stopped"


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again_from_the_newest_checkpoint(service: Service):
    directory = service.folder / "a" / "elastic"
    with service.torchrun("elastic", "run.steps=600", "checkpoint.period=100") as (first, second):
        first.wait_until("two checkpoints", lambda: len(checkpoints_of(directory)) >= 2)
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

"""A run over real borders: ranks on two hosts that share no directory, controller and owners on a third, a look from a
fourth."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, run
from tests.support.hosts import Host, made_hosts
from tests.support.launches import checkpoints_of, summary_of
from tests.support.training import events

pytestmark = pytest.mark.timeout(300)

RUN = """
[run]
name = "apart"
dir = "run"
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


@dataclass(frozen=True)
class Service:
    """A controller and owners on a host of their own.

    Attributes:
        hosts: All hosts: `a` and `b` for ranks, `service`, and `desk`, from where somebody looks.
        config: The configuration of the run that they serve, the same on all hosts.
        folder: Where each host has its working directory, and there the run's directory.
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
    def torchrun(self, *overrides: str) -> Iterator[tuple[Command, Command]]:
        """Starts one rank on each of the hosts `a` and `b`."""
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
        arguments += overrides
        with (
            self.command("a", *arguments, module="torch.distributed.run") as first,
            self.command("b", *arguments, module="torch.distributed.run") as second,
        ):
            yield first, second

    def ask(self, verb: str) -> dict[str, Any]:
        """Gives a command about the run, from another host still."""
        arguments = (verb, "apart", "--address", f"{self.hosts['service'].address}:7070", "--json")
        return json.loads(run(*arguments, environment=self.environment, host=self.hosts["desk"].prefix))

    def files(self, host: str) -> dict[str, bytes]:
        """Returns the files of the checkpoints that a host has."""
        checkpoints = self.folder / host / "run" / "checkpoints"
        return {str(path.relative_to(checkpoints)): path.read_bytes() for path in checkpoints.glob("*/*")}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("apart")
    with made_hosts("a", "b", "c", "service", "desk") as hosts:
        address = hosts["service"].address
        config = folder / "run.toml"
        config.write_text(
            f'{RUN}[control]\naddress = "{address}:7070"\nmetrics_address = "{address}:9464"\n'
            f'[security]\ncertificates = "{certificates}"\n'
        )
        us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
        service = Service(hosts=hosts, config=config, folder=folder, environment=us)
        ready, owners_ready = folder / "ready.json", folder / "owners-ready.json"
        with service.command("service", "serve", str(config), "--ready-file", str(ready)) as controller:
            controller.wait_for_file(ready)
            with service.command("service", "pool", str(config), "--ready-file", str(owners_ready)) as pool:
                pool.wait_for_file(owners_ready)
                yield service


def staleness(directory: Path) -> int:
    """Returns the largest staleness of a block when it was last told."""
    told = events(directory, "step") if (directory / "metrics.jsonl").exists() else []
    return told[-1]["staleness"]["max"] if told else 0


def test_a_run_on_two_hosts_outlives_a_cut_cable_and_resumes_where_its_first_rank_has_nothing(service: Service):
    directory = service.folder / "a" / "run"
    owners = service.hosts["service"]
    with service.torchrun() as (first, second):
        first.wait_until("a result of the owners", lambda: 0 < staleness(directory) < 80)
        owners.cut()
        first.wait_until("rising staleness", lambda: staleness(directory) > 200)
        owners.heal()
        first.wait_until("falling staleness", lambda: staleness(directory) < 80)
        shown = service.ask("status")
        assert (shown["state"], shown["live_workers"], shown["live_owners"]) == ("running", 2, 1)
        service.ask("stop")
        first.expect(0)  # with 75, torchrun would start the ranks again
        second.expect(0)
    stopped = summary_of(directory)
    assert (stopped["status"], stopped["world_size"]) == ("stopped", 2)
    assert len(set(stopped["parameter_sha256"])) == 1
    assert checkpoints_of(directory) == [stopped["steps"]] and service.files("a") == service.files("b")

    # By hand, on other hosts: rank 0 on one that is new, with an empty disk.
    steps = stopped["steps"] + 100
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": service.hosts["c"].address, "MASTER_PORT": "29502"}
    arguments = ("worker", str(service.config), "--set", f"run.steps={steps}")
    with (
        service.command("c", *arguments, environment={**meeting, "RANK": "0"}) as first,
        service.command("b", *arguments, environment={**meeting, "RANK": "1"}) as second,
    ):
        assert f"resumed at step {stopped['steps']} on 2 ranks" in first.expect(0)
        second.expect(0)
    shown = service.ask("status")
    assert (shown["state"], shown["step"], shown["epoch"]) == ("finished", steps, 2)
    finished = summary_of(service.folder / "c" / "run")
    assert len(set(finished["parameter_sha256"])) == 1 and finished["rank_modules_clean"] is True

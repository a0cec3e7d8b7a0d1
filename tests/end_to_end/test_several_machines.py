"""A run over real borders: ranks under torchrun on two hosts, controller and owners on a third, seen from a fourth."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import Command, run
from tests.support.hosts import Host, made_hosts
from tests.support.launches import summary_of

pytestmark = pytest.mark.timeout(300)

RUN = """
[run]
name = "apart"
dir = "run"
steps = 1000000
log_period = 5
[model]
settings = { channels = 8, hidden = 32 }
[cluster]
owners = 1
owner_address = "node"
"""


@dataclass(frozen=True)
class Service:
    """A controller and owners on a host of their own.

    Attributes:
        hosts: All hosts: `a` and `b` for ranks, `service`, and `desk`, from where somebody looks.
        config: The configuration of the run that they serve, for all hosts.
        directory: Where each host has a directory of its name.
        environment: Of commands without a configuration.
    """

    hosts: Mapping[str, Host]
    config: Path
    directory: Path
    environment: Mapping[str, str]

    def command(self, host: str, *arguments: str, **options: str) -> Command:
        directory = self.directory / host
        directory.mkdir(exist_ok=True)
        return Command(*arguments, host=self.hosts[host].prefix, directory=directory, **options)

    def torchrun(self, host: str, *arguments: str) -> Command:
        rendezvous = f"{self.hosts['a'].address}:29501"
        return self.command(
            host,
            *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "apart"),
            *("--rdzv-endpoint", rendezvous, "-m", "kfdist", "worker", str(self.config), *arguments),
            module="torch.distributed.run",
        )

    def status(self) -> dict[str, object]:
        """Asks the controller from another host still."""
        arguments = ("status", "apart", "--address", f"{self.hosts['service'].address}:7070", "--json")
        return json.loads(run(*arguments, environment=self.environment, host=self.hosts["desk"].prefix))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("apart")
    with made_hosts("a", "b", "service", "desk") as hosts:
        address = hosts["service"].address
        config = directory / "run.toml"
        config.write_text(
            f'{RUN}[control]\naddress = "{address}:7070"\nmetrics_address = "{address}:9464"\n'
            f'[security]\ncertificates = "{certificates}"\n'
        )
        us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
        service = Service(hosts=hosts, config=config, directory=directory, environment=us)
        ready, owners_ready = directory / "ready.json", directory / "owners-ready.json"
        with service.command("service", "serve", str(config), "--ready-file", str(ready)) as controller:
            controller.wait_for_file(ready)
            with service.command("service", "pool", str(config), "--ready-file", str(owners_ready)) as pool:
                pool.wait_for_file(owners_ready)
                yield service


def test_ranks_on_two_hosts_train_with_owners_on_a_third(service: Service):
    directory = service.directory / "shared"
    arguments = ("--set", f"run.dir={directory}", "--set", "run.steps=60")
    with service.torchrun("a", *arguments) as first, service.torchrun("b", *arguments) as second:
        first.expect(0)
        second.expect(0)
    shown = service.status()
    assert (shown["state"], shown["step"]) == ("finished", 60)
    summary = summary_of(directory)
    assert summary["world_size"] == 2 and len(set(summary["parameter_sha256"])) == 1
    assert summary["inversions"]["completed"] > 0 and summary["rank_modules_clean"] is True

"""`kfdist submit` to a Ray cluster of two hosts, from a third: TLS between all, ranks on both."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.commands import Command, run
from tests.support.hosts import Host, made_hosts
from tests.support.launches import SMALL, checkpoints_of, summary_of
from tests.support.ray_heads import ENVIRONMENT
from tests.support.ray_nodes import ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 400.0


@pytest.fixture
def hosts() -> Iterator[Mapping[str, Host]]:
    with made_hosts("head", "node", "desk") as made:
        yield made


def test_ranks_on_two_hosts_train_together_and_obey_a_third(
    hosts: Mapping[str, Host], certificates: Path, tmp_path: Path, monkeypatch
):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
    directory, desk = tmp_path / "wide", hosts["desk"].prefix
    # Four CPUs on two hosts: three ranks and an owner fill both.
    given = ("--workers", "3", "--owners", "1", "--set", "run.name=wide", "--set", f"run.dir={directory}", *SMALL)
    given += ("--set", "run.steps=1000000", "--set", "run.log_period=20")
    with ray_nodes(hosts, head_has=("--include-dashboard", "true", "--dashboard-host", "0.0.0.0")):
        submission = ("submit", "--ray", f"http://{hosts['head'].address}:8265", "--follow", *given)
        with Command(*submission, environment=us, host=desk) as command:
            address = command.wait_for_line("controller on ", PATIENCE).partition("controller on ")[2].partition(",")[0]
            assert address.startswith(f"{hosts['head'].address}:")
            command.wait_for_line("training on 3 ranks (cpu)", PATIENCE)
            command.wait_for_line("/1000000", PATIENCE)
            shown = json.loads(run("status", "wide", "--address", address, "--json", environment=us, host=desk))
            assert (shown["live_workers"], shown["live_owners"]) == (3, 1)
            run("stop", "wide", "--wait", "--address", address, environment=us, host=desk)
            command.expect(0, PATIENCE)
    summary = summary_of(directory)
    assert summary["status"] == "stopped" and summary["steps"] == checkpoints_of(directory)[-1]
    assert len(set(summary["parameter_sha256"])) == 1

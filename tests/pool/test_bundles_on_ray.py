"""Owners where a real Ray's nodes have what `cluster.bundle` asks for, and nowhere else."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kfdist.system.addresses import split_address
from tests.support.commands import Command
from tests.support.hosts import Host, made_hosts
from tests.support.ray_nodes import NO_TOKEN, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def hosts() -> Iterator[Mapping[str, Host]]:
    with made_hosts("head", "node") as made:
        yield made


def test_owners_go_where_resources_and_labels_are(hosts: Mapping[str, Host], certificates: Path, tmp_path: Path):
    head, node = hosts["head"], hosts["node"]
    config = tmp_path / "run.toml"
    config.write_text(
        f'[run]\nname = "bundles"\ndir = "{tmp_path / "run"}"\nsteps = 10\n'
        f'[control]\naddress = "{head.address}:7070"\nmetrics_address = "{head.address}:9464"\n'
        f'[security]\ncertificates = "{certificates}"\n'
        '[cluster]\nowner_address = "node"\n[cluster.bundle]\ncpus = 0.5\n'
    )
    ready, owners_ready = tmp_path / "ready.json", tmp_path / "owners.json"
    pooling = ("pool", str(config), "--ray", f"{head.address}:6379", "--json")

    def pool(*settings: str) -> Command:
        given = [word for setting in settings for word in ("--set", f"cluster.bundle.{setting}")]
        return Command(*pooling, *given, "--ready-file", str(owners_ready), host=head.prefix, environment=NO_TOKEN)

    with (
        ray_nodes(
            hosts,
            head_has=["--labels", "zone=x", "--resources", '{"inverter": 1}'],
            node_has=["--labels", "zone=y", "--resources", '{"inverter": 2}'],
        ),
        Command("serve", str(config), "--ready-file", str(ready), host=head.prefix) as control,
    ):
        control.wait_for_file(ready)
        with pool("resources.inverter=1.5") as refused:
            text = refused.expect(1)
            assert "can't be placed: each needs CPU 0.5, inverter 1.5; there is room for 1: " in text
            assert f"{node.address} has CPU 2, inverter 2" in text
            assert "Traceback" not in text
        with pool("resources.inverter=1", 'labels.zone="!x"') as placed:
            placed.wait_for_file(owners_ready)
            owners = json.loads(placed.wait_for_line("owners"))["owners"]
            assert [split_address(owner["address"])[0] for owner in owners] == [node.address] * 2
            with pool("resources.inverter=1") as late:
                assert "which Ray's 2 nodes have, but others use it" in late.expect(1)

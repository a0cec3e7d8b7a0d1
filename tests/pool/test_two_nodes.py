"""Owners over a Ray cluster of two hosts: one on each, at its node's address; placed anew when a node dies."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kfdist.system.addresses import split_address
from tests.support.commands import Command, run
from tests.support.controller import eventually
from tests.support.hosts import Host, made_hosts
from tests.support.launches import SMALL
from tests.support.ray_nodes import NO_TOKEN, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def hosts() -> Iterator[Mapping[str, Host]]:
    with made_hosts("head", "node", "ranks") as made:
        yield made


def end(host: Host) -> None:
    """Ends everything on a host at once, as a power cut would."""
    for pid in subprocess.check_output(["ip", "netns", "pids", host.namespace], text=True).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_owners_are_spread_serve_all_and_move_when_their_node_dies(
    hosts: Mapping[str, Host], certificates: Path, tmp_path: Path
):
    head, node, ranks = (hosts[name] for name in ("head", "node", "ranks"))
    us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
    controller = f"{head.address}:7070"
    config = tmp_path / "run.toml"
    config.write_text(
        f'[run]\nname = "spread"\ndir = "{tmp_path / "run"}"\nsteps = 1000000\nlog_period = 100\n'
        f'[control]\naddress = "{controller}"\nmetrics_address = "{head.address}:9464"\n'
        f'[cluster]\nowner_address = "node"\n[security]\ncertificates = "{certificates}"\n'
    )

    def status() -> dict[str, object]:
        return json.loads(run("status", "spread", "--address", controller, "--json", environment=us, host=ranks.prefix))

    ready, owners_ready = tmp_path / "ready.json", tmp_path / "owners.json"
    pooling = ("pool", str(config), "--ray", f"{head.address}:6379", "--ready-file", str(owners_ready), "--json")
    with (
        ray_nodes(hosts),
        Command("serve", str(config), "--ready-file", str(ready), host=head.prefix) as control,
        Command(*pooling, host=head.prefix, environment=NO_TOKEN) as pool,
    ):
        control.wait_for_file(ready)
        pool.wait_for_file(owners_ready)
        owners = json.loads(pool.wait_for_line("owners"))["owners"]
        assert {split_address(owner["address"])[0] for owner in owners} == {head.address, node.address}
        with Command("worker", str(config), *SMALL, host=ranks.prefix, directory=tmp_path) as worker:
            worker.wait_for_line("/1000000")
            assert status()["live_owners"] == 2
            end(node)
            eventually(status, lambda seen: seen["live_owners"] == 1, seconds=60)
            before = int(str(status()["step"]))
            # Ray notices a dead node after half a minute, and has room for a second owner on the other one.
            pool.wait_for_line(f"is back at {head.address}:")
            seen = eventually(status, lambda seen: seen["live_owners"] == 2, seconds=60)
            assert int(str(seen["step"])) > before
            worker.signal(signal.SIGTERM)
            worker.expect(75)

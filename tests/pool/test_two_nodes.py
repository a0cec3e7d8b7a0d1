"""Owners over a Ray cluster of two hosts: one on each, at its node's address; placed anew when a node dies."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kfdist.system.addresses import split_address
from tests.support.commands import Command, run
from tests.support.hosts import Host, made_hosts
from tests.support.launches import SMALL
from tests.support.ray_nodes import NO_TOKEN, ray_nodes
from tests.support.waits import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def hosts() -> Iterator[Mapping[str, Host]]:
    with made_hosts("head", "node", "ranks") as made:
        yield made


@contextlib.contextmanager
def ended(host: Host) -> Iterator[None]:
    """Ends everything on a host at once, as a power cut would."""
    for process in host.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    yield


@pytest.mark.parametrize("lose", [ended, Host.cut])
def test_owners_are_spread_serve_all_and_move_when_their_node_is_lost(
    hosts: Mapping[str, Host], certificates: Path, tmp_path: Path, lose: Callable[[Host], AbstractContextManager[None]]
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

    def addresses() -> list[str]:
        """Returns where the controller has each owner, as it tells everybody."""
        told = run("events", "spread", "--address", controller, "--json", environment=us, host=ranks.prefix)
        joined = [event["text"].split() for event in json.loads(told)["events"] if event["kind"] == "owner_joined"]
        return sorted(split_address(at.rstrip(","))[0] for at in {words[1]: words[3] for words in joined}.values())

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
            with lose(node):
                eventually(status, lambda seen: seen["live_owners"] == 1, seconds=60)
                before = int(str(status()["step"]))
                # Ray notices a lost node after half a minute, and has room for a second owner on the other one.
                pool.wait_for_line(f"is back at {head.address}:")
                seen = eventually(status, lambda seen: seen["live_owners"] == 2, seconds=60)
                assert int(str(seen["step"])) > before
            # One that comes back isn't wanted any more: its Ray ends, and whoever was told of its owner is told anew.
            eventually(node.processes, lambda left: not left, seconds=90)
            eventually(addresses, lambda seen: seen == [head.address] * 2, seconds=60)
            worker.signal(signal.SIGTERM)
            worker.expect(75)

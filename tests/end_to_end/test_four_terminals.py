"""The same run by hand: controller, owners, ranks under torchrun, and a look at it, as the README shows it.

With TLS and a token, on addresses that other machines could reach; and nothing secret stands where it could be read.
"""

import json
import signal
from pathlib import Path

import pytest

from kfdist.system.credentials import Credentials, Role
from tests.support.commands import Command, process_table, run
from tests.support.controller import scrape_secured
from tests.support.secrets import secrets_found

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_run_by_hand_in_four_terminals(tmp_path: Path, certificates: Path):
    config = tmp_path / "it.toml"
    config.write_text(
        f'[run]\nname = "by-hand"\ndir = "{tmp_path / "run"}"\nsteps = 200\n'
        '[control]\naddress = "0.0.0.0:0"\nmetrics_address = "0.0.0.0:0"\n'
        f'[cluster]\nowner_address = "node"\n[security]\ncertificates = "{certificates}"\n'
    )
    us = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
    ours = Credentials(role=Role.CLIENT, certificates=str(certificates), token_file=str(certificates / "token"))
    seen: list[str] = []
    ready, owners_ready = tmp_path / "ready.json", tmp_path / "owners-ready.json"
    with Command("serve", str(config), "--ready-file", str(ready)) as controller:
        told = controller.wait_for_file(ready)
        address = told["address"]
        with Command("pool", str(config), "--controller", address, "--ready-file", str(owners_ready)) as pool:
            pool.wait_for_file(owners_ready)  # the second owner may come later than the ranks' thirtieth step
            torchrun = ("--nproc-per-node", "2", "-m", "kfdist", "worker", str(config), "--controller", address)
            with Command(*torchrun, module="torch.distributed.run") as ranks:
                ranks.wait_for_line(" 30/200", seconds=90)
                shown = json.loads(run("status", "--json", str(tmp_path / "run")))  # finds address and certificates
                seen += [json.dumps(shown), scrape_secured(told["metrics_address"], ours)]
                assert "kfdist_run_step" in seen[-1]
                seen += [process.title for process in process_table().values()]
                family = [process for each in (controller, pool, ranks) for process in each.family()]
                seen += [Path(f"/proc/{process.pid}/environ").read_text(errors="replace") for process in family]
                rays = Path(json.loads(owners_ready.read_text())["directory"])
                assert len(list(rays.rglob("*.out"))) > 3  # logs of Ray's processes, and of owners
                assert secrets_found(certificates, texts=[], folder=rays) == []
                assert shown["live_workers"] == 2 and shown["live_owners"] == 2
                assert shown["total_steps"] == 200 and shown["state"] == "running"
                ranks.expect(0)
                assert ranks.left_behind(5) == []
            shown = json.loads(run("status", "by-hand", "--address", address, "--json", environment=us))
            assert shown["state"] == "finished" and shown["step"] == 200
            pool.family()
            pool.signal(signal.SIGTERM)
            pool.expect(0, seconds=15)
            assert pool.left_behind(5) == []
        controller.signal(signal.SIGTERM)
        controller.expect(0, seconds=10)
        assert controller.left_behind() == []
    seen += [line for command in (controller, pool, ranks) for line in command.output]
    assert any("controller: gRPC on 0.0.0.0:" in text for text in seen)
    assert secrets_found(certificates, texts=seen, folder=tmp_path) == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["metrics"]["test_accuracy"] >= 0.95
    assert summary["rank_modules_clean"] is True

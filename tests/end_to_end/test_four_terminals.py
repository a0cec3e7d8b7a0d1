"""The same run by hand: controller, owners, ranks under torchrun, and a look at it, as the README shows it."""

import json
import signal
from pathlib import Path

import pytest

from tests.support.commands import Command, run

pytestmark = pytest.mark.timeout(300)


def test_a_run_by_hand_in_four_terminals(tmp_path: Path):
    config = tmp_path / "it.toml"
    config.write_text(
        f'[run]\nname = "by-hand"\ndir = "{tmp_path / "run"}"\nsteps = 60\n'
        '[control]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\n'
    )
    ready, owners_ready = tmp_path / "ready.json", tmp_path / "owners-ready.json"
    with Command("serve", str(config), "--ready-file", str(ready)) as controller:
        address = controller.wait_for_file(ready)["address"]
        with Command("pool", str(config), "--controller", address, "--ready-file", str(owners_ready)) as pool:
            pool.wait_for_file(owners_ready)  # the second owner may come later than the ranks' thirtieth step
            torchrun = ("--nproc-per-node", "2", "-m", "kfdist", "worker", str(config), "--controller", address)
            with Command(*torchrun, module="torch.distributed.run") as ranks:
                ranks.wait_for_line("step 30/60", seconds=90)
                shown = json.loads(run("status", "by-hand", "--address", address, "--json"))
                assert shown["live_workers"] == 2 and shown["live_owners"] == 2
                assert shown["total_steps"] == 60 and shown["state"] == "running"
                ranks.expect(0)
                assert ranks.left_behind(5) == []
            shown = json.loads(run("status", "by-hand", "--address", address, "--json"))
            assert shown["state"] == "finished" and shown["step"] == 60
            pool.family()
            pool.signal(signal.SIGTERM)
            pool.expect(0, seconds=15)
            assert pool.left_behind(5) == []
        controller.signal(signal.SIGTERM)
        controller.expect(0, seconds=10)
        assert controller.left_behind() == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["metrics"]["test_accuracy"] >= 0.95
    assert summary["rank_modules_clean"] is True

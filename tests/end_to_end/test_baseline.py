"""A baseline: `preconditioner.method = "none"` leaves a run its controller, and takes its owners away."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, run
from tests.support.controller import eventually

pytestmark = pytest.mark.timeout(300)


def test_a_baseline_is_paused_resumed_stopped_and_taken_up_again_like_any_other_run(tmp_path: Path):
    directory = tmp_path / "run"
    options = ("--set", f"run.dir={directory}", "--set", "preconditioner.method=none")
    options = (*options, "--set", "cluster.owners=0", "--set")
    with Command("train", *options, "run.steps=100000") as command:
        line = command.wait_for_line("controller on ")
        address = line.split("controller on ")[1].split(",")[0]
        url = line.split("metrics on ")[1].strip()

        def status() -> dict[str, Any]:
            return json.loads(run("status", "digits", "--address", address, "--json"))

        command.wait_for_line("step   ")
        run("pause", "digits", "--address", address)
        paused = eventually(status, lambda seen: seen["state"] == "paused", seconds=30)
        time.sleep(1.0)
        assert status()["step"] == paused["step"] < 100000
        assert (paused["live_workers"], paused["live_owners"], command.members("kfdist pool")) == (2, 0, [])
        metrics = urllib.request.urlopen(url, timeout=5).read().decode()
        assert 'kfdist_steps_total{run="digits"}' in metrics and "kfdist_loss" in metrics
        run("resume", "digits", "--address", address)
        eventually(status, lambda seen: seen["step"] > paused["step"], seconds=30)
        run("stop", "digits", "--address", address)
        command.expect(75, 60)
        assert command.left_behind(5) == []
    stopped = json.loads((directory / "summary.json").read_text())
    assert stopped["status"] == "stopped" and stopped["bytes"]["table"] > 0
    steps = stopped["steps"] + 20
    assert f"resumed at step {stopped['steps']}" in run("train", *options, f"run.steps={steps}")
    finished = json.loads((directory / "summary.json").read_text())
    assert (finished["status"], finished["steps"], finished["start"]) == ("finished", steps, 2)
    assert len(set(finished["parameter_sha256"])) == 1
    assert finished["inversions"]["completed"] == 0 and finished["staleness_steps"] == {"p50": None, "max": None}

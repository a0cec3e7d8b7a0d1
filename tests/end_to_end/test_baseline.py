"""A baseline: `preconditioner.method = "none"` leaves a run its controller, and takes its owners away."""

import time
import urllib.request
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient
from tests.support.commands import run
from tests.support.launches import ENDLESS, ONE_RANK, STEPS, addresses, launch, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_baseline_is_paused_resumed_stopped_and_taken_up_again_like_any_other_run(tmp_path: Path):
    directory = tmp_path / "run"
    options = (*ONE_RANK, "--set", "preconditioner.method=none", "--set", "cluster.owners=0")
    with launch(directory, *options, *ENDLESS) as command:
        served = addresses(command)
        address = ("--address", served.control)
        command.wait_for_line("step ")
        with ControlClient(served.control) as client:
            run("pause", "digits", *address)
            command.wait_until("it was paused", lambda: client.get("digits").state == "paused", 30)
            paused = client.get("digits")
            time.sleep(1.0)
            assert client.get("digits").step == paused.step < STEPS
            assert (paused.live_workers, paused.live_owners, command.members("kfdist pool")) == (1, 0, [])
            metrics = urllib.request.urlopen(served.metrics, timeout=5).read().decode()
            assert 'kfdist_steps_total{run="digits"}' in metrics and "kfdist_loss" in metrics
            run("resume", "digits", *address)
            command.wait_until("it went on", lambda: client.get("digits").step > paused.step, 30)
        run("stop", "digits", *address)
        command.expect(75, seconds=60)
        assert command.left_behind(5) == []
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped" and stopped["bytes"]["table"] > 0
    steps = stopped["steps"] + 20
    with launch(directory, *options, *ENDLESS, "--set", f"run.steps={steps}") as command:
        assert f"resumed at step {stopped['steps']}" in command.expect(0)
    finished = summary_of(directory)
    assert (finished["status"], finished["steps"], finished["start"]) == ("finished", steps, 2)
    assert finished["inversions"]["completed"] == 0 and finished["staleness_steps"] == {"p50": None, "max": None}

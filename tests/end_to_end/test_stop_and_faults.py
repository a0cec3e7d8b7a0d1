"""How a run ends when somebody or something ends it, and that the same command then resumes it."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import Command, run

pytestmark = pytest.mark.timeout(300)

LOCAL = ("--set", "cluster.link=local")


def _train(directory: Path, *arguments: str) -> Command:
    return Command("train", "--set", f"run.dir={directory}", *arguments)


def _summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def _checkpoints(directory: Path) -> list[int]:
    names = [path.name for path in (directory / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if not name.endswith(".incomplete"))


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not met in time"
        time.sleep(0.1)


def test_ctrl_c_ends_everything_in_time_and_the_same_command_resumes(tmp_path: Path):
    directory = tmp_path / "run"
    with _train(directory) as command:
        command.wait_for_line("step  20/")
        command.family()
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.expect(75, seconds=15)
        assert time.monotonic() - started < 10
        assert command.left_behind() == []
        assert "run the same command again to resume" in command.text
    assert _summary(directory)["status"] == "stopped"
    stopped_at = _summary(directory)["steps"]
    assert 20 <= stopped_at < 120 and _checkpoints(directory) == [stopped_at]
    with _train(directory) as command:
        command.wait_for_line(f"resumed at step {stopped_at}")
        command.expect(0)
        assert command.left_behind() == []
    assert _summary(directory)["status"] == "finished" and _summary(directory)["steps"] == 120
    assert _summary(directory)["metrics"]["test_accuracy"] >= 0.97


def test_sigterm_is_a_polite_stop_too(tmp_path: Path):
    with _train(tmp_path / "run", *LOCAL, "--set", "run.steps=100000") as command:
        command.wait_for_line("step ")
        command.signal(signal.SIGTERM)
        command.expect(75, seconds=12)
    assert _summary(tmp_path / "run")["status"] == "stopped"


def test_kfdist_stop_ends_a_run_resumably(tmp_path: Path):
    with _train(tmp_path / "run", "--set", "run.steps=100000") as command:
        address = command.wait_for_line("controller on ").split("controller on ")[1].split(",")[0]
        command.wait_for_line("step ")
        run("stop", "digits", "--address", address)
        command.expect(75, seconds=30)
        assert command.left_behind() == []
    assert _summary(tmp_path / "run")["status"] == "stopped"


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path):
    with _train(tmp_path / "run", *LOCAL, "--set", "run.steps=100000") as command:
        command.wait_for_line("step ")
        for worker in (workers := command.members("-m kfdist worker")):
            os.kill(worker.pid, signal.SIGSTOP)  # a rank that can't be polite
        assert len(workers) == 2
        command.signal(signal.SIGINT)
        command.wait_for_line("stopping")
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.expect(130, seconds=10)
        assert time.monotonic() - started < 5
        assert command.left_behind() == []


def test_a_rank_that_hangs_does_not_outlast_ctrl_c(tmp_path: Path):
    with _train(tmp_path / "run", *LOCAL, "--set", "run.steps=100000") as command:
        command.wait_for_line("step ")
        os.kill(command.members("-m kfdist worker")[0].pid, signal.SIGSTOP)
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.expect(75, seconds=15)
        assert time.monotonic() - started < 10
        assert command.left_behind() == []


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path):
    with _train(tmp_path / "runs" / "it") as command:
        command.wait_for_line("controller on ")
        command.wait_for_member("raylet")
        command.signal(signal.SIGINT)
        command.expect(75, seconds=15)
        assert command.left_behind() == []
    assert list(tmp_path.iterdir()) == []


def test_a_killed_rank_ends_the_run_which_resumes_from_its_newest_checkpoint(tmp_path: Path):
    directory = tmp_path / "run"
    arguments = [*LOCAL, "--set", "checkpoint.period=10"]
    with _train(directory, *arguments, "--set", "run.steps=100000") as command:
        command.wait_for_line("step     30/")
        os.kill(command.members("-m kfdist worker")[1].pid, signal.SIGKILL)
        command.expect(1, seconds=30)
        assert command.left_behind() == []
        assert "SIGKILL" in command.text and "again to resume" in command.text
        assert "Traceback" not in command.text
    newest = _checkpoints(directory)[-1]
    assert newest >= 20
    with _train(directory, *arguments, "--set", f"run.steps={newest + 20}") as command:
        command.wait_for_line(f"resumed at step {newest}")
        command.expect(0)
    assert _summary(directory)["steps"] == newest + 20


def test_killed_controller_owner_and_pool_are_started_again_and_the_run_goes_on(tmp_path: Path):
    directory = tmp_path / "run"
    with _train(directory, "--set", "run.steps=200") as command:
        address = command.wait_for_line("controller on ").split("controller on ")[1].split(",")[0]
        command.wait_for_line("pool with 2 owners")
        command.wait_for_line("step  20/")
        os.kill(command.members("-m kfdist serve")[0].pid, signal.SIGKILL)
        victim = command.members("ray::Owner")[0]
        os.kill(victim.pid, signal.SIGKILL)
        command.wait_for_line("the controller was started again")
        log = directory / "logs" / "pool.log"
        _wait_until(lambda: "is back at" in log.read_text())
        os.kill(command.members("-m kfdist pool")[0].pid, signal.SIGKILL)
        command.wait_for_line("the pool was killed by SIGKILL")
        command.wait_for_line("the pool was started again")
        command.expect(0)
        assert command.left_behind() == []
    summary = _summary(directory)
    assert summary["restarts"] == {"controller": 1, "pool": 1}
    assert summary["owner_restarts"] == 1
    assert summary["steps"] == 200 and summary["inversions"]["failed"] == 0
    assert len(set(summary["parameter_sha256"])) == 1
    assert address in (directory / "config.toml").read_text()


def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path):
    directory = tmp_path / "run"
    with _train(directory, "--set", "run.steps=100000") as command:
        command.wait_for_line("pool with 2 owners")
        command.wait_for_line("step ")
        assert len(command.family()) > 8
        command.signal(signal.SIGKILL)
        command.process.wait()
        assert command.left_behind(15) == []
    # The ranks saw it and stopped as they do at SIGTERM.
    assert _summary(directory)["status"] == "stopped"


@pytest.mark.chaos
def test_a_stopped_owner_is_replaced(tmp_path: Path):
    directory = tmp_path / "run"
    with _train(directory, "--set", "run.steps=400") as command:
        command.wait_for_line("pool with 2 owners")
        command.wait_for_line("step  20/")
        os.kill(command.members("ray::Owner")[0].pid, signal.SIGSTOP)
        command.expect(0)
        assert command.left_behind() == []
    summary = _summary(directory)
    assert summary["owner_restarts"] >= 1
    assert summary["inversions"]["failed"] == 0 and len(set(summary["parameter_sha256"])) == 1

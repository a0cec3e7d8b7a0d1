"""How a run ends when somebody asks it to; `test_faults.py` has the Ctrl-C after which the same command resumes it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launches import ENDLESS, LOCAL, ONE_OWNER, ONE_RANK, SMALL, launch, summary_of

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("where", "first", "member"),
    [
        (LOCAL, "files in", "-m kfdist worker"),
        pytest.param(ONE_OWNER, "controller on ", "raylet", marks=pytest.mark.slow),
    ],
    ids=["ranks alone", "owners"],
)
def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path, where: tuple[str, ...], first: str, member: str):
    with launch(tmp_path / "runs" / "it", *where, *ONE_RANK) as command:
        command.wait_for_line(first)
        command.wait_for_member(member)
        command.signal(signal.SIGINT)
        command.expect(75, seconds=15)
        assert command.left_behind() == []
    assert sorted(tmp_path.rglob("*")) == []


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path):
    with launch(tmp_path / "run", *LOCAL, *ONE_RANK, *ENDLESS) as command:
        command.wait_for_line("step ")
        os.kill(command.members("-m kfdist worker")[0].pid, signal.SIGSTOP)  # a rank that can't be polite
        command.signal(signal.SIGINT)
        command.wait_for_line("stopping")
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.expect(130, seconds=10)
        assert time.monotonic() - started < 5
        assert command.left_behind() == []


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_outlast_ctrl_c(tmp_path: Path):
    with launch(tmp_path / "run", *LOCAL, *ENDLESS) as command:
        command.wait_for_line("step ")
        os.kill(command.members("-m kfdist worker")[0].pid, signal.SIGSTOP)
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.expect(75, seconds=15)
        assert time.monotonic() - started < 10
        assert command.left_behind() == []


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path):
    directory = tmp_path / "run"
    settings = [f"run.dir={directory}", "run.steps=30", "run.log_period=1", "cluster.workers=1", "run.report=false"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "kfdist", "train", *arguments, *LOCAL, *SMALL]
    shell = ["bash", "-c", 'set -o pipefail; "$@" | head --lines 2', "bash"]
    done = subprocess.run([*shell, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 2, "")
    assert summary_of(directory)["status"] == "finished" and summary_of(directory)["steps"] == 30
    assert (directory / "logs" / "rank-0.log").read_text() == ""

"""What becomes of a run whose processes die, one kind after another."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient
from kfdist.system.credentials import Credentials, Role
from tests.support.commands import run
from tests.support.launches import (
    ENDLESS,
    LOCAL,
    ONE_OWNER,
    ONE_RANK,
    STEPS,
    addresses,
    checkpoints_of,
    launch,
    ready_file_of,
    summary_of,
)

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_resumes_from_its_newest_checkpoint_until_sigterm(tmp_path: Path):
    directory, arguments = tmp_path / "run", (*LOCAL, *ENDLESS, "--set", "checkpoint.period=10")
    with launch(directory, *arguments, report=True) as command:
        command.wait_for_line(" 30/")
        os.kill(command.members("-m kfdist worker")[1].pid, signal.SIGKILL)
        command.expect(1, seconds=30)
        assert command.left_behind() == []
        assert "SIGKILL" in command.text and "again to resume" in command.text
        assert "Traceback" not in command.text
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "The run failed: " in page and "rank 1 was killed by SIGKILL while training" in page
    newest = checkpoints_of(directory)[-1]
    assert newest >= 20
    with launch(directory, *arguments) as command:
        command.wait_for_line(f"resumed at step {newest}")
        command.wait_for_line("step ")
        command.signal(signal.SIGTERM)  # as polite a stop as Ctrl-C
        command.wait_for_line("run the same command again to resume", seconds=20)
        command.expect(75, seconds=20)
        assert command.left_behind() == []
    assert (directory / "report.html").read_text(encoding="utf-8") == page, "no other was asked for"
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped" and stopped["steps"] >= newest + 10
    assert checkpoints_of(directory)[-1] == stopped["steps"]


@pytest.mark.slow
def test_a_run_stopped_by_ctrl_c_resumes_and_goes_on_over_killed_controller_owner_and_pool_until_kfdist_stop(
    tmp_path: Path, certificates: Path
):
    directory = tmp_path / "run"
    # With TLS and a token: who is started again shows the same certificates, and is known by them.
    secured = ("--set", f"security.certificates={certificates}")
    ours = Credentials(role=Role.CLIENT, certificates=str(certificates), token_file=str(certificates / "token"))
    # Without owners it goes on for so many steps; then it waits for them, and leaves the processor to the new ones.
    arguments = (*ENDLESS, *ONE_OWNER, *secured, "--set", "preconditioner.staleness.hard_bound=40")
    with launch(directory, *arguments, report=True) as command:
        command.wait_for_line(" 10/")
        command.family()
        started = time.monotonic()
        command.signal(signal.SIGINT)
        command.wait_for_line("run the same command again to resume")
        assert time.monotonic() - started < 10
        command.expect(75, seconds=60)  # now only the page about the run is made
        assert command.left_behind() == []
    assert "The run stopped at step " in (directory / "report.html").read_text(encoding="utf-8")
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped" and stopped["steps"] >= 10
    assert checkpoints_of(directory)[-1] == stopped["steps"]
    with launch(directory, *arguments) as command:
        address = addresses(command).control
        command.wait_for_line(f"resumed at step {stopped['steps']}")
        command.wait_for_line(f"/{STEPS}")
        pool = command.wait_for_member("-m kfdist pool")
        command.wait_until("the pool served", lambda: bool(ready_file_of(pool)))
        shutil.rmtree(directory / "logs")  # somebody tidies up; who is started again makes it anew
        os.kill(command.members("-m kfdist serve")[0].pid, signal.SIGKILL)
        os.kill(command.members("ray::Owner")[0].pid, signal.SIGKILL)
        command.wait_for_line("the controller was started again")
        # The pool's last word to the launcher must count the owner, before it is killed itself.
        command.wait_until("the owner was back", lambda: ready_file_of(pool)["owner_restarts"] > 0)
        os.kill(pool.pid, signal.SIGKILL)
        command.wait_for_line("the pool was killed by SIGKILL")
        command.wait_for_line("the pool was started again")
        command.wait_until("the new pool served", lambda: ready_file_of(pool).get("pid", pool.pid) != pool.pid)
        with ControlClient(address, ours) as client:
            adopted = _adoptions(client)
            command.wait_until("its inverses were adopted", lambda: _adoptions(client) >= adopted + 8)
        run("stop", "digits", "--address", address, environment={"KFDIST_SECURITY__CERTIFICATES": str(certificates)})
        command.expect(75, seconds=30)
        assert command.left_behind() == []
    summary = summary_of(directory)
    assert summary["status"] == "stopped"
    assert summary["restarts"] == {"controller": 1, "pool": 1}
    # On a busy machine an owner may be silent so long that the pool kills it, too.
    silent = (directory / "logs" / "pool.log").read_text().count("it is killed and started again")
    assert 1 <= summary["owner_restarts"] <= 1 + silent
    assert summary["inversions"]["failed"] == 0
    assert len(set(summary["parameter_sha256"])) == 1
    assert address in (directory / "config.toml").read_text()


def _adoptions(client: ControlClient) -> float:
    """How many inverses of a newer version the run has taken into use."""
    return sum(sample.value for sample in client.samples("digits") if sample.name == "kfdist_adoptions_total")


@pytest.mark.slow
def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path):
    directory = tmp_path / "run"
    with launch(directory, *ENDLESS, *ONE_OWNER, *ONE_RANK) as command:
        command.wait_for_line("pool with 1 owners")
        command.wait_for_line("step ")
        assert len(command.family()) > 8
        command.signal(signal.SIGKILL)
        command.process.wait()
        assert command.left_behind(15) == []
    # The rank saw it and stopped as it does at SIGTERM.
    assert summary_of(directory)["status"] == "stopped"


@pytest.mark.chaos
def test_a_stopped_owner_is_replaced(tmp_path: Path):
    directory = tmp_path / "run"
    with launch(directory, "--set", "run.steps=400") as command:
        command.wait_for_line("pool with 2 owners")
        command.wait_for_line("step  20/")
        os.kill(command.members("ray::Owner")[0].pid, signal.SIGSTOP)
        command.expect(0)
        assert command.left_behind() == []
    summary = summary_of(directory)
    assert summary["owner_restarts"] >= 1
    assert summary["inversions"]["failed"] == 0 and len(set(summary["parameter_sha256"])) == 1

"""The commands that talk to a controller: for users, for programs, on a terminal, and when something is wrong."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from kfdist.cli import control_commands, settings_command
from kfdist.control.control_records import RunState
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.types import InForce, Obeyed
from tests.support.controller import ControllerThread, Member, sample
from tests.support.waits import eventually

Kfdist = Callable[..., str]

LONG_LEASE = pytest.mark.parametrize("controller", [60.0], indirect=True, ids=["long-lease"])
"""For tests that need members alive while a command runs."""


@pytest.fixture
def kfdist(controller: ControllerThread) -> Kfdist:
    app = typer.Typer()
    control_commands.register(app)
    settings_command.register(app)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env={"KFDIST_CONTROL_ADDRESS": controller.address})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.fixture
def digits(client, member: Member) -> Member:
    """A run that has made some steps."""
    client.create("digits", directory="/runs/digits", total_steps=120)
    member.register_owner("owner-0")
    member.register_worker("digits")
    member.beat_worker("digits", step=30, samples=(sample("kfdist_loss", 0.125),))
    eventually(lambda: client.get("digits"), lambda run: run.step == 30 and bool(run.gauges))
    return member


@LONG_LEASE
def test_status_and_list_for_users(kfdist, digits, client):
    assert "digits" in kfdist("status")
    lines = dict(line.split("  ", 1) for line in kfdist("status", "digits").splitlines())
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["state"] == "running"
    assert facts["step"] == "30/120"
    assert facts["ranks alive"] == facts["owners alive"] == "1"
    assert facts["directory"] == "/runs/digits"
    assert facts["loss"] == "0.125"
    client.create("other")
    header, newest, oldest = kfdist("list").splitlines()
    assert header.split() == ["RUN", "STATE", "STEP", "START", "RANKS", "OWNERS", "LOSS", "CREATED", "DIRECTORY"]
    assert newest.split()[:3] == ["other", "created", "0"]
    assert oldest.split()[:7] == ["digits", "running", "30/120", "1", "1", "1", "0.125"]
    assert kfdist("status") == kfdist("list")


@LONG_LEASE
def test_everything_as_json(kfdist, digits):
    run = json.loads(kfdist("status", "digits", "--json"))
    assert (run["name"], run["state"], run["step"], run["gauges"]) == ("digits", "running", 30, {"kfdist_loss": 0.125})
    assert json.loads(kfdist("status", "--json"))["runs"][0]["name"] == "digits"
    assert json.loads(kfdist("list", "--json"))["runs"][0]["state"] == "running"
    assert json.loads(kfdist("pause", "digits", "--json"))["state"] == "running"
    kinds = [event["kind"] for event in json.loads(kfdist("events", "digits", "--json"))["events"]]
    assert kinds[0] == "created"
    assert kinds[-1] == "pause_requested"


def test_a_loss_that_is_no_number_is_still_json(kfdist, digits, client):
    digits.beat_worker("digits", step=31, samples=(sample("kfdist_loss", float("nan")),))
    eventually(lambda: client.get("digits").step, lambda step: step == 31)
    assert json.loads(kfdist("status", "digits", "--json"), parse_constant=pytest.fail)["gauges"]["kfdist_loss"] is None
    assert ["loss", "nan"] in [line.split() for line in kfdist("status", "digits").splitlines()]


@pytest.fixture
def measured(digits: Member, client) -> Member:
    """The run of `digits` after inversions of a chain and of two blocks, one of a long name."""
    long = "transformer.encoder.layers.11.attention.output_projection"
    digits.beat_worker(
        "digits",
        step=40,
        samples=(
            sample("kfdist_bytes_total", 1_234_567, purpose="to_owners"),
            sample("kfdist_bytes_total", 0, purpose="from_owners"),
            sample("kfdist_samples_lost_total", 3),
            sample("kfdist_staleness_steps", 2, block="conv1"),
            sample("kfdist_staleness_steps", 4608, block="chain"),
            sample("kfdist_inversion_rung", 1, block=long),
            *(
                sample(f"kfdist_inversion_{quantity}", value, block=block, factor=factor)
                for block in ("conv1", long)
                for factor, scale in (("A", 1.0), ("G", 2.0))
                for quantity, value in (
                    ("rank", 8 * scale),
                    ("residual", 1.25e-7 * scale),
                    ("approximation_error", 0.03125 * scale),
                    ("orthogonality_error", 3.5e-6 * scale),
                    ("smallest_eigenvalue", -1.5e-9 * scale),
                )
            ),
        ),
    )
    eventually(lambda: client.get("digits").step, lambda step: step == 40)
    return digits


@LONG_LEASE
def test_status_shows_what_couriers_moved_and_lost_and_how_inversions_fare(kfdist, measured):
    facts, _, blocks = kfdist("status").partition("\n\n")
    found = dict(line.split("  ", 1) for line in facts.splitlines())
    assert found["bytes to_owners"].strip() == "1.235 MB"
    assert found["samples lost"].strip() == "3"
    assert "bytes from_owners" not in found, "what never happened takes no line"
    assert not any("inversion" in name for name in found)
    header, chain, conv1, other = blocks.splitlines()
    assert header.split() == ["BLOCK", "STALE", "RANK", "RESIDUAL", "RETRIES", "APPROX", "ORTHOG", "MIN_EIG"]
    assert chain.split() == ["chain", "4608", *["-"] * 6], "the stalest first"
    assert conv1.split() == ["conv1", "2", "16", "2.5e-07", "-", "6.2e-02", "7.0e-06", "-3.0e-09"]
    assert other.split()[1:5] == ["-", "16", "2.5e-07", "1"]
    assert other.startswith("transformer.encoder.layers.11.attention.output_projection"), "whole where programs read"


@LONG_LEASE
def test_status_as_json_has_every_sample(kfdist, measured):
    measured.beat_worker("digits", step=41, samples=(sample("kfdist_loss", float("nan")),))
    samples = json.loads(kfdist("status", "digits", "--json"), parse_constant=pytest.fail)["samples"]
    found = {(each["name"], *each["labels"].values()): each["value"] for each in samples}
    assert found["kfdist_inversion_residual", "conv1", "G"] == 2.5e-7
    assert found["kfdist_bytes_total", "from_owners"] == 0
    assert found["kfdist_loss",] is None
    assert len(found) == len(samples) == 27


def test_nothing_to_show(kfdist, controller):
    assert kfdist("status") == kfdist("list") == f"the controller at {controller.address} knows no run yet\n"
    assert json.loads(kfdist("status", "--json")) == {"runs": []}


@LONG_LEASE
def test_steering(kfdist, digits):
    obeyed = "all ranks obey at one step, which `kfdist events digits` names\n"
    assert kfdist("pause", "digits") == f"digits: running at step 30/120; asked for pause: {obeyed}"
    assert kfdist("set", "digits", "damping=0.5").endswith(f"asked for damping=0.5: {obeyed}")
    assert kfdist("checkpoint", "digits").endswith(f"asked for checkpoint: {obeyed}")
    settings = digits.beat_worker("digits", step=31).settings
    assert (settings.desired, settings.damping, settings.checkpoint_serial) == ("paused", 0.5, 1)
    digits.beat_worker("digits", step=31, in_force=InForce(obeyed=(Obeyed(revision=3, step=31),)))
    assert kfdist("pause", "digits").endswith("asked for pause: all ranks have obeyed since step 31\n")
    kfdist("resume", "digits")
    assert digits.beat_worker("digits", step=32).settings.desired == "running"
    lines = kfdist("events", "digits").splitlines()
    assert lines[0].split() == ["ID", "TIME", "KIND", "WHAT"]
    assert any("set damping from as configured to 0.5 at step" in line for line in lines)
    last = lines[-1].split()[0]
    assert kfdist("events", "digits", "--after", last) == "no event\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dampling=1"], ["'dampling=1'", "did you mean 'damping'?"]),
        (["damping"], ["damping: has no value; write damping=VALUE, or damping=configured"]),
        (["0.01"], ["'0.01'", "such as damping=0.01", "inverse_period"]),
        (["damping=fast"], ["damping: is 'fast', which is no number"]),
        (["inverse_period=2.5"], ["inverse_period: is '2.5', which is no whole number"]),
        (["soft_bound=off"], ["soft_bound: is 'off'", "none", "configured"]),
        (["damping=1", "damping=2"], ["damping: is given twice"]),
        (["damping=0"], ["damping: is 0.0", "greater than 0"]),
        (["damping=nan"], ["damping: is nan", "finite number"]),
        (["adoption=later"], ["adoption: is 'later'", "'asap' or 'fixed-lag'"]),
    ],
)
def test_bad_settings(kfdist, digits, settings, words):
    with pytest.raises(ConfigError) as caught:
        kfdist("set", "digits", *settings)
    assert all(word in str(caught.value) for word in words)


def test_stop_waits_until_the_run_has_ended(kfdist, digits, controller, client):
    answered: list[str] = []
    waiting = threading.Thread(target=lambda: answered.append(kfdist("stop", "digits", "--wait")))
    waiting.start()
    eventually(lambda: digits.beat_worker("digits", step=40).settings.desired, lambda wish: wish == "stopped")
    assert not answered
    digits.beat_worker("digits", step=41, phase="stopped")
    waiting.join(20)
    assert answered[0].startswith("digits: stopped at step 41/120")
    assert client.get("digits").state is RunState.STOPPED


def test_stop_says_when_waiting_was_in_vain(kfdist, digits):
    with pytest.raises(EnvironmentFault, match="still (stopping|lost) at step 30 after 0 s|is lost at step 30"):
        kfdist("stop", "digits", "--wait", "--timeout", "0")
    with pytest.raises(EnvironmentFault, match="'digits' is lost at step 30; `kfdist events digits` says more"):
        kfdist("stop", "digits", "--wait")


def test_watch_shows_changes_until_the_end(kfdist, digits):
    shown: list[str] = []
    watching = threading.Thread(target=lambda: shown.append(kfdist("watch", "digits")))
    watching.start()
    for step in range(50, 53):
        digits.beat_worker("digits", step=step)
    digits.beat_worker("digits", step=120, phase="finished")
    watching.join(20)
    lines = shown[0].splitlines()
    assert lines[-1].startswith("digits: finished at step 120/120")
    assert len(lines) == len(set(lines))


def test_watch_as_json_lines_can_be_resumed(kfdist, digits):
    digits.beat_worker("digits", step=120, phase="finished")
    revision = json.loads(kfdist("status", "digits", "--json"))["revision"]
    lines = [json.loads(line) for line in kfdist("watch", "digits", "--json", "--from-revision", "1").splitlines()]
    assert [line["revision"] for line in lines] == list(range(2, revision + 1))
    assert lines[-1]["state"] == "finished"


def test_addresses_are_checked(kfdist):
    with pytest.raises(ConfigError, match="--controller: 'nowhere' is no address.*host:port"):
        kfdist("status", "--address", "nowhere")


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kfdist", *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_exit_codes_and_messages(controller, client):
    client.create("digits")
    address = f"--address={controller.address}"
    fine = command("status", "digits", address)
    assert (fine.returncode, fine.stderr) == (0, "")
    unknown = command("pause", "digist", address)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "kfdist: there is no run 'digist' here; did you mean 'digits'?\n"


def test_an_absent_controller_is_an_environment_fault():
    # Port 1 is privileged and nobody serves gRPC there.
    absent = command("status", "--json", "--address=127.0.0.1:1")
    assert absent.returncode == 1
    assert json.loads(absent.stdout)["error"]["kind"] == "environment"
    assert "no controller answers at 127.0.0.1:1: start one with `kfdist serve`" in absent.stderr


def test_a_terminal_gets_a_table(controller, digits):
    shown = on_a_terminal("status", "digits", f"--address={controller.address}")
    assert "30/120" in shown
    assert "\x1b[1m" in shown, "in bold"


@LONG_LEASE
def test_on_a_terminal_of_80_columns_every_block_fits(controller, measured):
    shown = on_a_terminal("status", "digits", f"--address={controller.address}")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if line.startswith("BLOCK"))
    assert header.split()[1:] == ["STALE", "RANK", "RESIDUAL", "RETRIES", "APPROX", "ORTHOG"]
    names = [line.split()[0] for line in lines[lines.index(header) + 1 :]]
    assert names[:2] == ["chain", "conv1"]
    assert re.fullmatch("transform.*….*output_projection", names[2])


def on_a_terminal(*arguments: str) -> str:
    """Runs a command on a terminal of 80 columns and returns what it showed."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kfdist", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end of a terminal was closed
        pass
    finally:
        os.close(reader)
    assert process.communicate(timeout=30)[1] == b""
    return shown.decode()

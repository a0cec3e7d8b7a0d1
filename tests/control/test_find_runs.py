"""Finding runs without an address: by notices, by directories, by files; and what is said where that isn't enough."""

import fcntl
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kfdist.cli import control_commands, find_runs, main, settings_command
from kfdist.cli.complete import complete_config, complete_owner, complete_run
from kfdist.config import load_config
from kfdist.control.control_records import RunState
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.credentials import Credentials, Role
from kfdist.system.run_notices import DIRECTORY_VARIABLE, RunNotice, place_of, posted
from kfdist.training.run_directory import RunDirectory
from tests.support.controller import ControllerThread, Member
from tests.support.waits import eventually

Kfdist = Callable[..., str]
Post = Callable[..., None]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing runs, and a working directory of its own."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "notices"))
    monkeypatch.setattr(find_runs, "DEFAULT_ADDRESS", "127.0.0.1:1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def post() -> Iterator[Post]:
    """Posts notices until the test ends."""
    with ExitStack() as stack:

        def add(address: str, run: str = "", directory: Path | None = None, database: str = "x", **more: str) -> None:
            place = None if directory is None else place_of(directory)
            told = "" if directory is None else str(directory.absolute())
            notice = RunNotice(
                pid=os.getpid(), address=address, run=run, directory=told, place=place, database=database, **more
            )
            stack.enter_context(posted(notice))

        yield add


@pytest.fixture
def kfdist() -> Kfdist:
    app = typer.Typer()
    control_commands.register(app)
    settings_command.register(app)

    def run(*arguments: str, code: int = 0, err: str = "") -> str:
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        assert err in result.stderr
        return result.stdout

    return run


def run_directory(path: Path, name: str = "digits", status: str = "finished", address: str = "127.0.0.1:1") -> Path:
    """Makes the directory of a run that has made 40 of 60 steps, or all of them if it is finished."""
    steps = 60 if status == "finished" else 40
    (path / "epochs").mkdir(parents=True)
    (path / "epochs" / "00002.toml").touch()
    (path / "checkpoints" / "step-00000040").mkdir(parents=True)
    (path / "config.toml").write_text(
        f'[run]\nname = "{name}"\nsteps = 60\n[cluster]\nlink = "service"\n[control]\naddress = "{address}"\n'
    )
    summary = {"status": status, "run": name, "staleness_steps": {"p50": 3, "max": 7}, "seconds": 1.5}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"event": "start", "time": 1.7e9, "start": 2, "step": 0, "world_size": 2},
        {"event": "step", "time": 1.7e9 + 1, "step": steps, "loss": 0.25, "staleness": {"p50": 3, "max": 4}},
        {"event": "evaluation", "time": 1.7e9 + 2, "step": steps, "test_accuracy": 0.975},
    ]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"event": "st')
    return path


@pytest.fixture
def training(machine: Path) -> Iterator[Path]:
    """A run's directory, held as by a rank."""
    path = run_directory(machine / "runs" / "digits", status="running")
    with (path / "lock").open("w") as lock:
        lock.write(f"process 5 on {socket.gethostname()}, started today\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def test_the_runs_of_this_machine_are_found(kfdist, post, controller, client):
    client.create("digits", directory="/runs/digits", total_steps=60)
    post(controller.address)
    assert "digits" in kfdist("status").splitlines()[0]
    assert json.loads(kfdist("list", "--json"))["runs"][0]["directory"] == "/runs/digits"
    assert kfdist("pause").startswith("digits: created at step 0/60")
    assert kfdist("set", "damping=0.5") == kfdist("set", "digits", "damping=0.5")
    assert "pause_requested" in kfdist("events")
    with pytest.raises(ConfigError, match=r"no run 'digist' here; did you mean 'digits'\?; known here: digits"):
        kfdist("stop", "digist")


def test_several_runs_are_listed_and_one_must_be_named(kfdist, post, tmp_path, controller, client):
    client.create("digits", directory="/runs/a")
    with ControllerThread(tmp_path / "other.sqlite") as other, other.client() as others:
        others.create("digits", directory="/runs/b")
        others.create("cifar")
        post(controller.address)
        post(other.address)
        assert [run["name"] for run in json.loads(kfdist("status", "--json"))["runs"]] == ["cifar", "digits", "digits"]
        with pytest.raises(ConfigError, match="3 runs are going; name one:\n.*\n") as caught:
            kfdist("stop")
        assert "\n  cifar  (created" in str(caught.value)
        assert "\n  /runs/a  (created" in str(caught.value)
        with pytest.raises(ConfigError, match="2 runs are named 'digits'; name one:\n  /runs/b .*\n  /runs/a "):
            kfdist("stop", "digits")
        assert kfdist("pause", "cifar").startswith("cifar")
        assert kfdist("pause", "digits", "--controller", other.address).startswith("digits")


def test_a_directory_is_accepted_wherever_a_name_is(kfdist, post, controller, client, training, monkeypatch):
    client.create("digits", directory=str(training), total_steps=60)
    post(controller.address, "digits", training)
    shown = kfdist("status", "digits")
    assert "created" in shown
    for written in ("runs/digits", "runs/digits/", "./runs/../runs/digits", str(training)):
        assert kfdist("status", written) == shown
    monkeypatch.chdir(training)
    assert kfdist("status", ".") == shown
    assert kfdist("stop", ".").startswith("digits: stopping")


def test_a_moved_directory_is_still_the_run_and_a_copy_is_not(kfdist, post, controller, client, training, machine):
    client.create("digits", directory=str(training))
    post(controller.address, "digits", training)
    training.rename(machine / "moved")
    assert kfdist("pause", "./moved").startswith("digits: created")
    shutil.copytree(machine / "moved", machine / "copied")
    assert "lost" in kfdist("status", "./copied")
    with pytest.raises(ConfigError, match="'digits' in copied has ended .lost at step 40/60.*resumes it from step 40"):
        kfdist("pause", "./copied")


def test_a_run_under_a_controller_elsewhere_is_found_by_its_configuration(kfdist, controller, client, member, machine):
    path = run_directory(machine / "runs" / "far", "far", status="running", address=controller.address)
    client.create("far")
    member.register_worker("far", epoch=2)
    with (path / "lock").open("w") as lock:
        lock.write(f"process 5 on {socket.gethostname()}, started today")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert kfdist("pause", "runs/far").startswith("far: ")
        assert str(path) in kfdist("status", "far"), "the controller wasn't told"
        member.register_worker("far", epoch=3)
        with pytest.raises(EnvironmentFault, match="knows another run 'far', at its start 3"):
            kfdist("stop", "runs/far")
    assert "lost" in kfdist("status", "runs/far")


def test_a_run_that_has_no_controller_tells_what_its_files_do(kfdist, post, training):
    post("", "digits", training, database="")
    shown = kfdist("status")
    assert "running" in shown and "40/60" in shown and "process 5 on" in shown
    with pytest.raises(EnvironmentFault, match="is trained by process 5 on .*only a signal stops it: kill -TERM 5 on"):
        kfdist("stop")


def test_a_stop_that_outlives_the_controller_ends_with_what_the_files_say(kfdist, post, training, tmp_path, member):
    ending = ControllerThread(tmp_path / "c.sqlite")
    with ending.client() as client:
        client.create("digits", directory=str(training))
        post(ending.address, "digits", training)

        def end_with_the_launch() -> None:
            eventually(lambda: client.get("digits").state, lambda state: state is RunState.STOPPING)
            ending.close()
            (training / "summary.json").write_text(json.dumps({"status": "stopped", "run": "digits"}))
            (training / "lock").unlink()

        launch = threading.Thread(target=end_with_the_launch)
        launch.start()
        shown = kfdist("stop", "--wait")
        launch.join()
    assert shown.startswith("digits: stopped at step 40/60")


def test_a_shell_completes_runs_and_owners(post, controller, client, member, training, tmp_path):
    client.create("dogs")
    member.register_owner("owner-0")
    post(controller.address, database=str(tmp_path / "control.sqlite"))
    assert complete_run("d") == ["digits", "dogs"]
    assert complete_run("runs/d") == ["runs/digits"]
    assert (complete_owner("own"), complete_owner("x")) == (["owner-0"], [])


def test_configurations_are_completed(machine: Path) -> None:
    for name in ("ci.toml", "other.toml", "ci.txt"):
        (machine / name).touch()
    assert complete_config("ci") == ["ci.toml", "cifar10-resnet18", "cifar10-vgg16bn"]
    assert complete_config("../work/o") == ["../work/other.toml"]
    assert {"imagenet-resnet50", "other.toml"} < set(complete_config(""))


def test_every_command_that_takes_a_run_or_an_owner_has_it_completed():
    commands = typer.main.get_command(main.app)
    named = [
        (name, parameter.metavar, parameter._custom_shell_complete)
        for name, command in commands.commands.items()
        for parameter in command.params
        if str(parameter.metavar).strip(".") in ("RUN", "OWNER")
    ]
    assert len(named) >= 13
    assert [each for each in named if each[2] is None] == []


def test_a_controller_that_is_away_leaves_the_files_and_an_exit_code(kfdist, post, training):
    post("127.0.0.1:1", "digits", training)
    fault = "no controller answers at 127.0.0.1:1"
    for command in (("status", "digits"), ("status",), ("list",)):
        assert "40/60" in kfdist(*command, code=1, err=fault)
    told = json.loads(kfdist("status", "--json", code=1, err=fault))
    assert told["runs"][0]["state"] == "running" and fault in told["silent"][0]
    with pytest.raises(EnvironmentFault, match="no controller answers at 127.0.0.1:1"):
        kfdist("stop")


def test_a_controller_of_no_run_that_is_away_is_told_beside_the_run_of_another(kfdist, post, controller, client):
    client.create("digits", total_steps=60)
    post(controller.address)
    assert "digits" in kfdist("status")
    post("127.0.0.1:1")
    assert "digits" in kfdist("status", code=1, err="no controller answers at 127.0.0.1:1")


def test_a_run_that_was_given_in_epochs_is_lengthened_in_epochs(kfdist, machine):
    path = run_directory(machine / "runs" / "digits")
    (path / "config.toml").write_text((path / "config.toml").read_text().replace("steps = 60", "epochs = 3"))
    assert "a higher run.epochs trains on from here" in kfdist("status", "digits")


def test_a_finished_run_whose_last_steps_are_in_no_checkpoint_says_so(kfdist, machine):
    path = run_directory(machine / "runs" / "digits")
    (path / "summary.json").write_text('{"status": "finished", "steps": 60, "unsaved_steps": 20}')
    words = "the last 20 steps are in no checkpoint; the same command makes them anew from step 40"
    assert words in kfdist("status", "digits")
    with pytest.raises(ConfigError, match=f"has ended .finished at step .*{words}"):
        kfdist("pause", "digits")


@pytest.mark.parametrize(
    ("status", "state", "advice"),
    [
        ("finished", "finished", "a higher run.steps trains on"),
        ("stopped", "stopped", "resumes it from step 40"),
        ("failed", "failed", "resumes it from step 40"),
        ("running", "lost", "resumes it from step 40"),
    ],
)
def test_an_ended_run_answers_from_its_files(kfdist, machine, status, state, advice):
    run_directory(machine / "runs" / "digits", status=status)
    facts = dict(line.split("  ", 1) for line in kfdist("status", "digits").splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["state"] == state
    assert facts["start"] == "2"
    assert facts["loss"] == "0.25"
    assert facts["test accuracy"] == "97.50%"
    assert facts["staleness max"] == "7"
    assert facts["last heard of" if state == "lost" else "ended"].startswith("2023-11-1")
    assert advice in facts["next"]
    assert kfdist("watch", "digits") == kfdist("status", "digits")
    told = json.loads(kfdist("status", "runs/digits", "--json"))
    assert told["state"] == state and told["files"]["checkpoint"] == 40
    assert [event["kind"] for event in json.loads(kfdist("events", "digits", "--json"))["events"]] == [
        "start",
        "evaluation",
    ]
    with pytest.raises(ConfigError, match=f"has ended .{state} at step .*{advice}"):
        kfdist("pause", "digits")


def test_an_ended_run_says_of_both_evaluations_whose_they_are(kfdist, machine):
    path = run_directory(machine / "runs" / "digits")
    lines = [
        {"event": "evaluation", "time": 1.7e9 + step, "step": step, "weights": weights, "test_accuracy": accuracy}
        for step, weights, accuracy in ((59, "averaged", 0.5), (60, "trained", 0.9), (60, "averaged", 0.95))
    ]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told = json.loads(kfdist("status", "digits", "--json"))["files"]
    assert (told["test_accuracy"], told["averaged_test_accuracy"]) == (0.9, 0.95)
    shown = kfdist("status", "digits")
    assert re.search(r"^test accuracy +90.00%$", shown, flags=re.M)
    assert re.search(r"^averaged test accuracy +95.00%$", shown, flags=re.M)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**lines[1], "step": 80, "test_accuracy": 0.91}) + "\n")
    told = json.loads(kfdist("status", "digits", "--json"))["files"]
    assert told["test_accuracy"] == 0.91 and "averaged_test_accuracy" not in told


def test_events_of_an_ended_run_are_those_of_its_controller(kfdist, machine):
    path = run_directory(machine / "runs" / "digits")
    with ControllerThread(path / "control.sqlite") as running, running.client() as client:
        client.create("digits")
        client.pause("digits")
    kinds = [event["kind"] for event in json.loads(kfdist("events", "digits", "--json"))["events"]]
    assert kinds == ["created", "pause_requested"]
    assert kfdist("events", "digits", "--after", "2") == "no event\n"


def test_events_are_read_where_the_controller_wrote_them_from_any_working_directory(kfdist, machine, monkeypatch):
    config = load_config(None, overrides=["run.dir=run", "control.database=served.sqlite"], environment={})
    directory = RunDirectory.open(config)
    directory.begin(1, config)
    directory.close()
    with ControllerThread(Path("served.sqlite")) as running, running.client() as client:
        client.create("digits")
    monkeypatch.chdir("/")
    events = json.loads(kfdist("events", str(machine / "run"), "--json"))["events"]
    assert [event["kind"] for event in events] == ["created"]


def test_nothing_runs(kfdist, machine):
    assert kfdist("status") == "nothing runs on this machine; `kfdist train` starts a run\n"
    assert json.loads(kfdist("status", "--json")) == {"runs": []}
    with pytest.raises(EnvironmentFault, match="nothing runs"):
        kfdist("pause")
    with pytest.raises(ConfigError, match="no run 'digits': nothing runs"):
        kfdist("pause", "digits")
    run_directory(machine / "runs" / "old")
    told = kfdist("status")
    assert "Ended runs: runs/old (finished at step 60/60); `kfdist status runs/old` shows one" in told
    with pytest.raises(ConfigError, match=r"runs holds no run: there is no config.toml .*; in it are the runs old"):
        kfdist("status", "./runs")
    with pytest.raises(ConfigError, match="there is no such directory"):
        kfdist("status", "./nowhere")


def test_a_controller_that_nobody_named_is_steered_by_name_only(kfdist, controller, client, monkeypatch):
    monkeypatch.setattr(find_runs, "DEFAULT_ADDRESS", controller.address)
    client.create("digits")
    assert "digits" in kfdist("status")
    with pytest.raises(ConfigError, match="name the run that you mean: digits, of the controller at"):
        kfdist("stop")
    assert kfdist("stop", "digits").startswith("digits: stopping")


def test_certificates_are_found_by_the_notice_and_by_the_configuration(kfdist, post, tmp_path, certificates, training):
    secured = Credentials.at(Role.CONTROLLER, str(certificates), None)
    assert secured is not None
    with (
        ControllerThread(tmp_path / "secured.sqlite", credentials=secured) as running,
        Member(running.address, Credentials.at(Role.CLIENT, str(certificates), None)) as member,
    ):
        member.register_worker("digits", epoch=2)
        with (training / "config.toml").open("a") as config:
            config.write(f'[security]\ncertificates = "{certificates}"\n')
        text = (training / "config.toml").read_text().replace("127.0.0.1:1", running.address)
        (training / "config.toml").write_text(text)
        assert kfdist("pause", "runs/digits").startswith("digits")
        post(running.address, certificates=secured.certificates, token_file=secured.token_file)
        assert kfdist("resume").startswith("digits")


def test_the_controller_that_has_an_owner_is_found_among_several(tmp_path: Path, post: Post, controller) -> None:
    with ControllerThread(tmp_path / "other.sqlite") as other:
        for each, run, owners in ((controller, "mine", ("a-0", "a-1")), (other, "other", ("b-0",))):
            post(each.address, run)
            with each.client() as client:
                client.create(run)
            member = Member(each.address)
            for owner in owners:
                member.register_owner(owner)
            member.close()
        assert find_runs.find_controller(None, "b-0").address == other.address
        assert find_runs.find_controller(None, "a-1").address == controller.address
        with pytest.raises(ConfigError, match=r"owner 'c-0': .* has (a-0, a-1; .* has b-0|b-0; .* has a-0, a-1)\."):
            find_runs.find_controller(None, "c-0")
        assert find_runs.find_controller(other.address, "c-0").address == other.address

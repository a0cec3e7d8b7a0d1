"""`kfdist watch` on a terminal and off it: while a run changes, over a controller's restart, and to its end."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kfdist.cli import watching
from kfdist.cli.run_files import RunFiles
from kfdist.cli.run_target import Endpoint, Target
from kfdist.control.client import ControlClient
from kfdist.system.run_notices import DIRECTORY_VARIABLE, RunNotice, posted
from tests.support.controller import ControllerProcess, ControllerThread, Member, address_of_its_own, sample
from tests.support.waits import eventually


class Watcher:
    """A watch on a terminal."""

    def __init__(self, *arguments: str, columns: int = 80, cwd: Path | None = None) -> None:
        self._reader, writer = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kfdist", "watch", *arguments],
            stdin=writer,
            stdout=writer,
            stderr=writer,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(writer)
        self._text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self._reader, 65536):
                self._text += chunk.decode(errors="replace")
        except OSError:
            pass

    @property
    def text(self) -> str:
        """What it wrote, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._text)

    def see(self, word: str) -> None:
        eventually(lambda: word in self.text, bool, seconds=60)

    def end(self) -> int:
        code = self.process.wait(60)
        self._thread.join(10)
        return code


@contextmanager
def watcher(*arguments: str, **options) -> Iterator[Watcher]:
    made = Watcher(*arguments, **options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.mark.parametrize("controller", [60.0], indirect=True)
def test_a_terminal_shows_the_run_until_it_ends(controller, client, member):
    client.create("digits", total_steps=120)
    member.register_owner("owner-0")
    member.register_worker("digits")
    measured = (sample("kfdist_loss", 0.125), sample("kfdist_staleness_steps", 4608, block="conv1"))
    member.beat_worker("digits", step=30, samples=measured)
    with watcher("digits", f"--controller={controller.address}") as watched:
        watched.see("4608")
        assert "30/120" in watched.text and "conv1" in watched.text and "ranks 1" in watched.text
        assert "Ctrl-C ends the watch" in watched.text
        member.beat_worker("digits", step=77)
        watched.see("77/120")
        member.beat_worker("digits", step=120, phase="finished")
        assert watched.end() == 0
        assert "digits  finished  step 120/120" in watched.text


@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_fails_while_it_is_watched_says_why_or_where_that_is_found(
    machine, controller, client, member, known
):
    directory = machine / "runs" / "digits"
    directory.mkdir()
    (directory / "config.toml").write_text('[run]\nname = "digits"\n')  # as a start leaves it before it trains
    client.create("digits", directory=str(directory))
    member.register_worker("digits")
    notice = RunNotice(pid=os.getpid(), address=controller.address, run="digits", directory=str(directory))
    with posted(notice), watcher("digits", cwd=machine) as watched:
        watched.see("Ctrl-C ends the watch")
        if known:
            (directory / "summary.json").write_text('{"status": "failed", "error": "the training loss is nan"}')
        member.beat_worker("digits", step=9, phase="failed")
        assert watched.end() == 0
        assert ("the training loss is nan" if known else "`kfdist events digits` says more") in watched.text


def test_ctrl_c_ends_the_watch_and_not_the_run(controller, client):
    client.create("digits")
    with watcher("digits", f"--controller={controller.address}") as watched:
        watched.see("Ctrl-C ends the watch")
        watched.process.send_signal(signal.SIGINT)
        assert watched.end() == 130
        assert "the run goes on" in watched.text
    assert not client.get("digits").state.ended


def test_it_goes_on_over_a_restart_of_the_controller_and_says_so(tmp_path: Path):
    with ControllerProcess(tmp_path) as first:
        address = first.wait_ready()
        with ControlClient(address) as client:
            client.create("digits")
        lines = subprocess.Popen(
            [sys.executable, "-m", "kfdist", "watch", "digits", "--json", f"--controller={address}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert lines.stdout is not None and lines.stderr is not None
        with watcher("digits", f"--controller={address}") as watched:
            watched.see("Ctrl-C ends the watch")
            assert json.loads(lines.stdout.readline())["state"] == "created"
            first.kill()
            watched.see("doesn't answer; trying again")
            assert "doesn't answer" in lines.stderr.readline()
            with ControllerProcess(tmp_path, address=address) as second:
                second.wait_ready()
                with ControlClient(address) as client, Member(address) as member:
                    eventually(lambda: client.get("digits").name, bool)
                    member.register_worker("digits")
                    member.beat_worker("digits", step=9, phase="finished")
                assert watched.end() == 0
                assert "finished  step 9" in watched.text
                assert lines.wait(60) == 0
                assert "answers again" in lines.stderr.read()
                last = json.loads(lines.stdout.read().splitlines()[-1])
                assert (last["state"], last["step"]) == ("finished", 9)


def test_it_ends_when_the_controller_is_gone_and_nobody_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "_ORPHANED_SECONDS", 0.1)
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs" / "00001.toml").touch()
    (tmp_path / "config.toml").write_text('[run]\nname = "digits"\nsteps = 60\n')
    with ControllerThread(tmp_path / "control.sqlite") as controller:
        with controller.client() as client:
            client.create("digits")
        endpoint = Endpoint(address=controller.address)
        target = Target(name="digits", controller=endpoint, files=RunFiles(tmp_path))
        watched = threading.Thread(target=watching.watch, args=[target], kwargs={"from_revision": 0, "as_json": False})
        watched.start()
        seen = eventually(lambda: capsys.readouterr().out, bool, seconds=30)
        assert seen.startswith("digits: created")
    watched.join(60)
    out, err = capsys.readouterr()
    assert "lost" in out and str(tmp_path) in out
    assert "is gone, and nobody trains it any more" in err


def test_a_run_without_a_controller_is_watched_by_its_files(tmp_path, capsys):
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs" / "00001.toml").touch()
    (tmp_path / "config.toml").write_text('[run]\nname = "digits"\nsteps = 60\n')
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"event": "start", "time": 1.0, "start": 1, "step": 0, "world_size": 4}\n')
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1")
        lock.flush()
        target = Target(name="digits", files=RunFiles(tmp_path))
        watched = threading.Thread(target=watching.watch, args=[target], kwargs={"from_revision": 0, "as_json": True})
        watched.start()
        told = [json.loads(eventually(lambda: capsys.readouterr().out, bool, seconds=30))]
        with lines.open("a") as file:
            file.write('{"event": "step", "time": 2.0, "step": 10, "loss": null}\n')
        told += [json.loads(eventually(lambda: capsys.readouterr().out, bool, seconds=30))]
        (tmp_path / "summary.json").write_text('{"status": "finished"}')
    watched.join(60)
    told += [json.loads(capsys.readouterr().out.splitlines()[-1])]
    assert [(run["state"], run["step"], run["live_workers"]) for run in told] == [
        ("running", 0, 4),
        ("running", 10, 4),
        ("finished", 10, 0),
    ]


def test_several_runs_are_watched_until_none_goes_on(controller, client, member, capsys):
    for name in ("digits", "cifar"):
        client.create(name)
        member.register_worker(name)
    watched = threading.Thread(target=watching.watch_all, args=[controller.address], kwargs={"as_json": True})
    watched.start()
    told = eventually(lambda: capsys.readouterr().out, bool, seconds=30).splitlines()
    assert sorted(json.loads(line)["name"] for line in told) == ["cifar", "digits"]
    for step, name in enumerate(("digits", "cifar")):
        with Member(controller.address) as rank:
            rank.beat_worker(name, step=step, phase="finished")
    watched.join(60)
    ended = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(run["name"], run["step"]) for run in ended if run["state"] == "finished"} == {("digits", 0), ("cifar", 1)}


def test_several_runs_are_watched_over_their_controllers_restart(tmp_path, capsys):
    address = address_of_its_own()
    state = tmp_path / "control.sqlite"
    with ControllerThread(state, address=address) as first, Member(first.address) as member:
        for name in ("digits", "cifar"):
            member.register_worker(name)
            member.beat_worker(name)
        watched = threading.Thread(target=watching.watch_all, args=[address], kwargs={"as_json": True})
        watched.start()
        eventually(lambda: capsys.readouterr().out, bool, seconds=30)
    said: list[str] = []
    eventually(
        lambda: said.append(capsys.readouterr().err) or "".join(said),
        lambda text: f"no controller answers at {address}" in text,
        seconds=30,
    )
    with ControllerThread(state, address=address) as second, Member(second.address) as member:
        for name in ("digits", "cifar"):
            member.beat_worker(name, step=9, phase="finished")
        watched.join(60)
        assert not watched.is_alive()
    ended = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {run["name"] for run in ended if (run["state"], run["step"]) == ("finished", 9)} == {"cifar", "digits"}


def test_a_terminal_without_unicode_gets_escapes_and_no_stack_trace(controller, client):
    client.create("digits", total_steps=120, directory="/runs/wörk")
    shown = subprocess.run(
        [sys.executable, "-m", "kfdist", "status", "digits", f"--controller={controller.address}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert r"/runs/w\xf6rk" in shown.stdout


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "notices"))
    (tmp_path / "runs" / "old-run").mkdir(parents=True)
    (tmp_path / "runs" / "old-run" / "config.toml").touch()
    return tmp_path


def test_a_shell_completes_runs_at_once_and_asks_nobody(machine):
    with ControllerThread(machine / "control.sqlite") as running, running.client() as client:
        client.create("digits")
        client.create("dogs")
        database = str(machine / "control.sqlite")
        with posted(RunNotice(pid=1, address="192.0.2.1:1", database=database)), posted(RunNotice(pid=1, run="cifar")):
            assert completed("kfdist status d", machine) == ["digits", "dogs"]
            assert completed("kfdist watch ", machine) == ["cifar", "digits", "dogs", "old-run"]
            assert completed("kfdist stop --wait o", machine) == ["old-run"]
            assert completed("kfdist events runs/o", machine) == ["runs/old-run"]
            assert completed("kfdist set dig", machine) == ["digits"]
    assert completed("kfdist pause d", machine) == []


def completed(line: str, directory: Path) -> list[str]:
    """Asks as the script does that `kfdist --install-completion bash` installs."""
    environment = {
        **os.environ,
        "_KFDIST_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    script = "import sys; sys.argv[0] = 'kfdist'; from kfdist.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kfdist.cli.complete" in imported
    assert imported & {"torch", "grpc", "ray"} == set(), "which take longer than somebody who presses TAB waits"
    return done.stdout.split()

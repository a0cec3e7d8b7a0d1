"""`kfdist watch` on a terminal and off it: while a run changes, over a controller's restart, and to its end."""

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

from kfdist.control.client import ControlClient
from kfdist.system.run_notices import DIRECTORY_VARIABLE, RunNotice, posted
from tests.support.controller import ControllerProcess, ControllerThread, Member, eventually, sample


class Watcher:
    """A watch on a terminal."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self._reader, writer = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kfdist", "watch", *arguments],
            stdin=writer,
            stdout=writer,
            stderr=writer,
            env=environment,
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
    with watcher("digits", f"--controller={controller.address}") as watching:
        watching.see("4608")
        assert "30/120" in watching.text and "conv1" in watching.text and "ranks 1" in watching.text
        assert "Ctrl-C ends the watch" in watching.text
        member.beat_worker("digits", step=77)
        watching.see("77/120")
        member.beat_worker("digits", step=120, phase="finished")
        assert watching.end() == 0
        assert "digits  finished  step 120/120" in watching.text


def test_ctrl_c_ends_the_watch_and_not_the_run(controller, client):
    client.create("digits")
    with watcher("digits", f"--controller={controller.address}") as watching:
        watching.see("Ctrl-C ends the watch")
        watching.process.send_signal(signal.SIGINT)
        assert watching.end() == 130
        assert "the run goes on" in watching.text
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
        with watcher("digits", f"--controller={address}") as watching:
            watching.see("Ctrl-C ends the watch")
            assert json.loads(lines.stdout.readline())["state"] == "created"
            first.kill()
            watching.see("doesn't answer; trying again")
            assert "doesn't answer" in lines.stderr.readline()
            with ControllerProcess(tmp_path, address=address) as second:
                second.wait_ready()
                with ControlClient(address) as client, Member(address) as member:
                    eventually(lambda: client.get("digits").name, bool)
                    member.register_worker("digits")
                    member.beat_worker("digits", step=9, phase="finished")
                assert watching.end() == 0
                assert "finished  step 9" in watching.text
                assert lines.wait(60) == 0
                assert "answers again" in lines.stderr.read()
                last = json.loads(lines.stdout.read().splitlines()[-1])
                assert (last["state"], last["step"]) == ("finished", 9)


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

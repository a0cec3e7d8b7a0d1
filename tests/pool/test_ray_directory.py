"""Directories of pools: what is removed, and what is left alone."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.pool import ray_directory as module
from kfdist.pool.ray_directory import log_tail, make_directory, ray_processes, remove_stale, sweep
from kfdist.system import held_directories


@pytest.fixture
def parent(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "_PARENT", tmp_path)
    return tmp_path


def test_the_last_words_of_a_ray_are_those_of_its_standard_error(tmp_path):
    assert log_tail(tmp_path) == ""
    logs = tmp_path / "session_2026-11-28_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.err").touch()
    (logs / "monitor.log").write_text("about something else\n")
    (logs / "raylet.out").write_text("".join(f"line {number}\n" for number in range(9)) + "\n\tcounter - 2\n")
    assert log_tail(tmp_path, lines=2) == "raylet.out:\nline 7\nline 8"
    (logs / "gcs_server.err").write_text("File descriptor limit reached\n")
    assert log_tail(tmp_path, lines=2) == "gcs_server.err:\nFile descriptor limit reached"


@pytest.fixture
def old(monkeypatch) -> None:
    monkeypatch.setattr(held_directories, "_YOUNG_SECONDS", -1.0)


def test_a_directory_is_for_its_user_alone(parent):
    directory, hold = make_directory(None)
    assert directory.parent == parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    hold.close()


def test_that_of_a_living_pool_stays_and_that_of_a_dead_one_goes(parent, old):
    living, hold = make_directory(None)
    dead, lock = make_directory(None)
    lock.close()
    other = parent / "kfdist-another"
    other.mkdir()
    remove_stale()
    assert (living.exists(), dead.exists(), other.exists()) == (True, False, True)
    hold.close()
    remove_stale()
    assert not living.exists()


def test_one_that_was_just_made_stays(parent):
    directory, hold = make_directory(None)
    hold.close()
    remove_stale()
    assert directory.exists()


def test_names_that_cannot_be(parent, tmp_path):
    with pytest.raises(ConfigError, match="exists; choose a new one"):
        make_directory(Path("/tmp"))
    with pytest.raises(ConfigError, match="more than 36 characters"):
        make_directory(tmp_path / "a-name-that-is-far-too-long-for-a-socket")
    with pytest.raises(EnvironmentFault, match="can't be made: Not a directory"):
        make_directory(Path("/dev/null/x"))


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a file of the directory open, whose command line doesn't say so."""
    script = "import sys; open(input(), 'w').close(); kept = open(sys.stdin.readline().strip(), 'a'); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        for name in ("started", "log"):
            process.stdin.write(f"{tmp_path / name}\n".encode())
        process.stdin.flush()
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        yield process
        process.kill()


def test_processes_are_found_by_the_files_they_hold(tmp_path, holder, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
        assert ray_processes(tmp_path) == set()  # another user's are none of our business
    assert ray_processes(tmp_path) == {holder.pid}
    assert ray_processes(tmp_path / "log") == set()
    assert os.getpid() not in ray_processes(Path("/"))
    assert sweep(tmp_path, word="no such word") == set()
    assert holder.poll() is None
    assert sweep(tmp_path) == set()
    assert holder.wait() == -9


def test_who_only_reads_a_log_is_left_alone(tmp_path, holder):
    with subprocess.Popen(["tail", "-f", str(tmp_path / "log")], stdout=subprocess.DEVNULL) as reader:
        while not any(link.is_symlink() and link.readlink() == tmp_path / "log" for link in opened(reader.pid)):
            time.sleep(0.01)
        assert ray_processes(tmp_path) == {holder.pid}
        assert sweep(tmp_path) == set()
        assert reader.poll() is None
        reader.kill()


def opened(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def test_a_program_of_rays_that_names_the_directory_is_found_before_it_opens_anything(tmp_path):
    script = tmp_path / "site-packages" / "ray" / "agent.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; print(flush=True); sys.stdin.read()")
    files = tmp_path / "files"
    command = [sys.executable, str(script), f"--session-dir={files}/session_1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()
        assert ray_processes(files) == {agent.pid}
        assert sweep(files) == set()
        assert agent.wait() == -9

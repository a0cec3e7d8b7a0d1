"""Notices: seen while their process lives, gone after any end of it, and never taken from others."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kfdist.system import run_notices as module
from kfdist.system.run_notices import DIRECTORY_VARIABLE, RunNotice, notices, place_of, posted


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "notices"))
    return tmp_path / "notices"


def test_a_notice_is_seen_while_it_is_posted(tmp_path):
    notice = RunNotice(
        pid=os.getpid(), run="digits", directory=str(tmp_path), place=place_of(tmp_path), address="127.0.0.1:7"
    )
    assert notices() == []
    with posted(notice), posted(RunNotice(pid=1)):
        assert sorted(notices(), key=lambda each: each.pid) == [RunNotice(pid=1), notice]
    assert notices() == []


def test_a_path_that_is_no_utf8_survives():
    with posted(RunNotice(pid=1, directory="/runs/w\udce9d")):
        assert notices()[0].directory == "/runs/w\udce9d"


def test_what_a_killed_process_leaves_is_swept(directory):
    script = """if True:
        import time
        from kfdist.system.run_notices import RunNotice, posted
        with posted(RunNotice(pid=1)):
            print("up", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert notices() == [RunNotice(pid=1)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(directory.iterdir())) == 1
        assert notices() == []
    assert list(directory.iterdir()) == []


def test_a_notice_that_a_cleaner_removed_comes_back(directory, monkeypatch):
    monkeypatch.setattr(module, "_RENEW_SECONDS", 0.01)
    with posted(RunNotice(pid=1)):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        ends = time.monotonic() + 30
        while not notices():
            assert time.monotonic() < ends
            time.sleep(0.01)
    assert notices() == []


def test_directories_of_others_are_neither_read_nor_used(directory, tmp_path, caplog):
    with posted(RunNotice(pid=1)):
        directory.chmod(0o755)
        assert notices() == []
        with posted(RunNotice(pid=2)):
            pass
        directory.chmod(0o700)
        assert notices() == [RunNotice(pid=1)]
    assert "open to others" in caplog.text
    directory.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    with posted(RunNotice(pid=3)):
        assert notices() == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_links_and_strange_files_are_left_out(directory, tmp_path):
    with posted(RunNotice(pid=1)):
        (tmp_path / "other.json").write_text(json.dumps({"pid": 5}))
        (directory / "link.json").symlink_to(tmp_path / "other.json")
        os.mkfifo(directory / "pipe.json")
        assert notices() == [RunNotice(pid=1)]
    assert (tmp_path / "other.json").exists()


def test_a_session_directory_comes_first_and_tmp_is_read_as_well(tmp_path, monkeypatch):
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    places = module._directories()
    assert places[0] == tmp_path / "kfdist"
    assert places[-1] == Path(f"/tmp/kfdist-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert all(place.is_absolute() for place in module._directories())


def test_a_run_ends_as_it_has_whatever_becomes_of_its_notice(directory, monkeypatch):
    def refuse(*given, **named):
        raise PermissionError("read-only file system")

    with monkeypatch.context() as broken, posted(RunNotice(pid=1)):
        broken.setattr(Path, "unlink", refuse)
    assert len(list(directory.iterdir())) == 1
    assert notices() == [] == list(directory.iterdir())


def test_a_renewal_that_hangs_does_not_hold_the_end_up(monkeypatch):
    hangs, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "_RENEW_SECONDS", 0.01)
    monkeypatch.setattr(module, "_END_SECONDS", 0.01)
    with posted(RunNotice(pid=1)):
        monkeypatch.setattr(os, "utime", lambda path: (hangs.set(), goes_on.wait()))
        hangs.wait()
    goes_on.set()


def test_a_process_that_has_no_more_threads_is_found_all_the_same(monkeypatch, caplog):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with posted(RunNotice(pid=1)):
        assert notices() == [RunNotice(pid=1)]
    assert notices() == [] and "can't start new thread" in caplog.text


def test_a_moved_directory_is_the_same_place(tmp_path):
    (tmp_path / "a").mkdir()
    before = place_of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert place_of(f"{tmp_path}/b/") == before
    assert place_of(tmp_path / "a") is None

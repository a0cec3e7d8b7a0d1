"""Only what this user's processes have held and left is found, whatever others put beside it."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from kfdist.system import held_directories
from kfdist.system.held_directories import abandoned, hold


@pytest.fixture(autouse=True)
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_directories, "_YOUNG_SECONDS", -1.0)


def left(directory: Path) -> Path:
    directory.mkdir()
    hold(directory).close()  # as its end does
    return directory


def test_pipes_links_and_what_has_no_lock_are_passed_over(tmp_path: Path):
    (tmp_path / "run-pipe").mkdir()
    os.mkfifo(tmp_path / "run-pipe" / "lock")
    (tmp_path / "run-empty").mkdir()
    (tmp_path / "run-file").touch()
    (tmp_path / "run-link").symlink_to(left(tmp_path / "elsewhere"))
    (tmp_path / "run-linked-lock").mkdir()
    (tmp_path / "run-linked-lock" / "lock").symlink_to(tmp_path / "elsewhere" / "lock")
    found: list[Path] = []
    looking = threading.Thread(target=lambda: found.extend(abandoned(tmp_path, "run-")), daemon=True)
    looking.start()
    looking.join(60)
    assert (looking.is_alive(), found) == (False, [])
    mine = left(tmp_path / "run-mine")
    assert list(abandoned(tmp_path, "run-")) == [mine]


def test_another_users_is_left_alone_even_by_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left(tmp_path / "run-mine")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert list(abandoned(tmp_path, "run-")) == []


def test_a_new_one_is_held_although_somebody_is_just_looking_at_it(tmp_path: Path):
    with (tmp_path / "lock").open("wb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_EX)
        threading.Timer(0.1, fcntl.flock, (looked_at.fileno(), fcntl.LOCK_UN)).start()
        with hold(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(looked_at, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""The temporary directory of a launch, which a cleaner of old files may remove and anybody make again."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.launch import scratch
from kfdist.launch.scratch import check_scratch, temporary_directory
from kfdist.system import held_directories
from kfdist.system.held_directories import hold


def test_a_directory_that_was_removed_is_made_again_for_this_user_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scratch, "_PARENT", str(tmp_path))
    with temporary_directory() as made:
        check_scratch(made)
        shutil.rmtree(made)
        check_scratch(made)
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        (made / "rank-0.toml").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_launch_has_left_is_removed_by_the_next(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scratch, "_PARENT", str(tmp_path))
    left, other = tmp_path / "kfdist-run-left", tmp_path / "kfdist-ray-left"
    for directory in (left, other):
        directory.mkdir()
        hold(directory).close()  # as its end does
    with temporary_directory() as young:
        assert left.exists()
        monkeypatch.setattr(held_directories, "_YOUNG_SECONDS", -1.0)
        with temporary_directory() as made:
            assert set(tmp_path.iterdir()) == {young, made, other}  # a pool's may still have processes


def test_what_a_killed_launch_has_left_stays_while_its_pool_is_ending(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scratch, "_PARENT", str(tmp_path))
    monkeypatch.setattr(held_directories, "_YOUNG_SECONDS", -1.0)
    left = tmp_path / "kfdist-run-left"
    left.mkdir()
    hold(left).close()
    pool = f"python\0-m\0kfdist.pool.ray_directory\x007\0{left}/ray-0\0".encode()
    monkeypatch.setattr(scratch, "living_processes", lambda: {7: 1})
    monkeypatch.setattr(scratch, "command_line", lambda pid: pool)
    with temporary_directory():
        assert left.exists()
    monkeypatch.setattr(scratch, "living_processes", dict)
    with temporary_directory():
        assert not left.exists()


def test_one_that_somebody_else_made_again_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(EnvironmentFault, match="somebody else"):
        check_scratch(tmp_path)


def test_where_none_can_be_made_the_place_is_named(monkeypatch):
    monkeypatch.setattr(scratch, "_PARENT", "/proc/kfdist")
    with pytest.raises(EnvironmentFault, match="temporary files can't be made in /proc/kfdist"), temporary_directory():
        pass
    with pytest.raises(EnvironmentFault, match="can't be made again"):
        check_scratch(Path("/proc/kfdist"))

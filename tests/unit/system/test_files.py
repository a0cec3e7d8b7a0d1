"""Files are whole or not there."""

import os
from pathlib import Path

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.system.files import (
    check_working_directory,
    is_private,
    open_regular,
    read_ready_file,
    replace_file,
    write_file,
    write_ready_file,
)


def test_a_new_file_is_never_an_old_one(tmp_path: Path):
    write_file(tmp_path / "new", b"content")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "new", b"other")
    assert (tmp_path / "new").read_bytes() == b"content"


def test_replacing_leaves_nothing_else_behind(tmp_path: Path):
    for content in (b"one", b"two"):
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_cant_be_replaced_stays(tmp_path: Path):
    (tmp_path / "file" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        replace_file(tmp_path / "file", b"content")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_path_without_a_name_is_no_file():
    with pytest.raises(IsADirectoryError):
        replace_file(Path(""), b"content")
    with pytest.raises(EnvironmentFault, match="can't be written: Is a directory"):
        write_ready_file(Path(""), {})


def test_ready_files(tmp_path: Path):
    path = tmp_path / "ready.json"
    assert read_ready_file(path) is None
    for restarts in range(2):
        write_ready_file(path, {"restarts": restarts})
        assert read_ready_file(path) == {"restarts": restarts}
    with pytest.raises(
        EnvironmentFault, match=r"ready file .*no/such.* can't be written: No such file.*choose another"
    ):
        write_ready_file(tmp_path / "no" / "such", {})


def test_a_working_directory_that_ray_cannot_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_working_directory()
    monkeypatch.setattr("os.getcwdb", lambda: b"/runs/w\xff")
    with pytest.raises(EnvironmentFault, match=r"directory /runs/w\\xff isn't named in UTF-8.*run\.dir"):
        check_working_directory()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.undo()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(EnvironmentFault, match="was removed; start in another"):
        check_working_directory()


@pytest.mark.parametrize(("mode", "private"), [(0o600, True), (0o640, False), (0o604, False)])
def test_who_may_read_a_file(tmp_path: Path, mode: int, private: bool):
    path = tmp_path / "secret"
    path.touch()
    path.chmod(mode)
    assert is_private(path) is private


def test_regular_files_alone_are_opened_and_nothing_is_waited_for(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "link"):
        with open_regular(str(tmp_path / name)) as file:
            assert file.read() == b"content"
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is no regular file"):
            open_regular(str(path))
    with pytest.raises(IsADirectoryError):
        open_regular(str(tmp_path))

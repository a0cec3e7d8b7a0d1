"""What a pool says when Ray can't start, or loses its files; without a Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault
from kfdist.pool import command
from kfdist.pool.ray_cluster import RayCluster


def test_a_bare_exception_of_ray_becomes_a_sentence_with_the_end_of_its_log(monkeypatch, tmp_path: Path):
    directory = tmp_path / "ray"
    monkeypatch.setattr("kfdist.pool.ray_directory._LONGEST", 1000)

    def init(**_: object) -> None:
        logs = directory / "ray" / "session_2026" / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "raylet.err").write_text("no room in /dev/shm\n")
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setattr(RayCluster, "_import_ray", lambda self: ray)
    with pytest.raises(EnvironmentFault) as caught:
        RayCluster(load_config(None, environment={}), directory, environment={})
    first, *log = str(caught.value).splitlines()
    assert first.startswith("Ray can't be started: The current node timed out during startup.; it needs")
    assert log == ["raylet.err:", "no room in /dev/shm"]
    assert not directory.exists()


def test_a_ray_that_was_slow_to_start_is_started_again(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("kfdist.pool.ray_directory._LONGEST", 1000)
    inits: list[str] = []

    def init(**_: object) -> None:
        inits.append("init")
        if len(inits) == 1:
            raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    ray = SimpleNamespace(init=init, shutdown=lambda: inits.append("shutdown"))
    monkeypatch.setattr(RayCluster, "_import_ray", lambda self: ray)
    RayCluster(load_config(None, environment={}), tmp_path / "ray", environment={}).close()
    assert inits == ["init", "shutdown", "init", "shutdown"]


def supervisor(restarts: Any, watched: Any) -> Any:
    return SimpleNamespace(
        wait_until_registered=lambda ended, check: None, status=list, restarts=lambda: next(restarts), watch=watched
    )


def cluster(directory: Path) -> Any:
    return SimpleNamespace(directory=directory, check=lambda: None)


def test_a_ready_file_whose_folder_was_removed_does_not_end_the_pool(tmp_path: Path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    turns = []

    def watch() -> None:
        turns.append(1)
        (folder / "ready.json").unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()

    pool = supervisor(iter([0, 1, 1]), watch)
    ready = folder / "ready.json"
    command._supervise(cluster(tmp_path), pool, ready, lambda owners: None, lambda: len(turns) == 2)
    assert caplog.text.count("can't be written") == 1


def test_a_ready_file_that_could_never_be_written_is_refused(tmp_path: Path):
    pool = supervisor(iter([0]), lambda: None)
    with pytest.raises(EnvironmentFault, match="can't be written"):
        ready = tmp_path / "no" / "ready.json"
        command._supervise(cluster(tmp_path), pool, ready, lambda owners: None, lambda: False)


def test_a_pool_whose_directory_was_removed_ends_so_that_another_is_started(tmp_path: Path):
    pool = supervisor(iter([0]), lambda: None)
    with pytest.raises(EnvironmentFault, match=r"gone was removed, and Ray's sockets with it"):
        command._supervise(cluster(tmp_path / "gone"), pool, None, lambda owners: None, lambda: False)

"""Checkpoints between a run directory and Ray Train's storage; Ray Train is a directory here."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kfdist.config import Config, load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.submission.train_checkpoints import TrainCheckpoints


class Kept:
    """A checkpoint as Ray Train has it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self.directory)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, overrides=[f"run.dir={tmp_path / 'run'}"], environment={})


def write(config: Config, step: int, content: str = "weights") -> Path:
    run = config.run.directory
    (run / "epochs").mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text("[run]\n")
    (run / "epochs" / "00001.toml").touch()
    (run / "epochs" / "00002.toml").touch()
    directory = run / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "shared.safetensors").write_text(content)
    manifest = {"step": step, "world_size": 2, "sha256": f"{step} {content}"}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def give(checkpoints: TrainCheckpoints, storage: Path) -> Kept:
    """Gives the newest checkpoint to a storage, as Ray Train would copy it."""
    held = checkpoints.next()
    assert held is not None
    shutil.copytree(held.directory, storage / held.name)
    shutil.rmtree(held.directory)
    return Kept(storage / held.name)


def test_each_checkpoint_is_given_once_and_stays_while_the_ranks_remove_theirs(config: Config, tmp_path: Path):
    checkpoints = TrainCheckpoints(config, "")
    checkpoints.restore(None)
    assert checkpoints.next() is None
    original = write(config, 50)
    held = checkpoints.next()
    assert held is not None and held.metrics == {"step": 50, "world_size": 2}
    shutil.rmtree(original)
    assert (held.directory / "shared.safetensors").read_text() == "weights"
    assert sorted(path.name for path in (held.directory / "run" / "epochs").iterdir()) == ["00002.toml"]
    assert checkpoints.next() is None
    write(config, 100)
    again = checkpoints.next()
    assert again is not None and again.name != held.name and again.name.startswith("step-00000100-")
    assert checkpoints.next() is None


def test_a_step_that_was_trained_anew_is_given_anew(config: Config, tmp_path: Path):
    checkpoints = TrainCheckpoints(config, "")
    shutil.rmtree(write(config, 50))
    give_first = write(config, 50, "first")
    first = give(checkpoints, tmp_path / "storage")
    shutil.rmtree(give_first)
    write(config, 50, "second")
    second = give(checkpoints, tmp_path / "storage")
    assert first.directory != second.directory
    assert (second.directory / "shared.safetensors").read_text() == "second"


def test_a_lost_run_directory_comes_back_with_the_number_of_its_start(config: Config, tmp_path: Path):
    write(config, 50)
    kept = give(TrainCheckpoints(config, ""), tmp_path / "storage")
    shutil.rmtree(config.run.directory)
    checkpoints = TrainCheckpoints(config, "")
    checkpoints.restore(kept)
    run = config.run.directory
    assert (run / "checkpoints" / "step-00000050" / "shared.safetensors").read_text() == "weights"
    assert sorted(path.name for path in (run / "checkpoints" / "step-00000050").iterdir()) == [
        "manifest.json",
        "shared.safetensors",
    ]
    assert (run / "config.toml").exists() and (run / "epochs" / "00002.toml").exists()
    assert checkpoints.next() is None  # it came from there


def test_what_the_run_directory_has_newer_stays_and_is_given(config: Config, tmp_path: Path):
    write(config, 50)
    kept = give(TrainCheckpoints(config, ""), tmp_path / "storage")
    write(config, 100)
    checkpoints = TrainCheckpoints(config, "")
    checkpoints.restore(kept)
    held = checkpoints.next()
    assert held is not None and held.metrics["step"] == 100
    assert checkpoints.next() is None


def test_a_checkpoint_that_is_gone_before_it_was_held_is_passed_over(config: Config, monkeypatch):
    directory = write(config, 50)
    checkpoints = TrainCheckpoints(config, "")
    copytree = shutil.copytree

    def late(source: Path, target: Path, **options: object) -> object:
        shutil.rmtree(directory)
        return copytree(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copytree", late)
    assert checkpoints.next() is None
    assert list(config.run.directory.glob(".reported-*")) == []


def test_a_storage_that_this_node_does_not_see_has_and_gets_nothing_and_that_is_said(
    config: Config, tmp_path: Path, capsys
):
    write(config, 50)
    storage = tmp_path / "elsewhere"
    checkpoints = TrainCheckpoints(config, str(storage / "run" / ".kfdist-1"))
    checkpoints.restore(Kept(storage / "run" / "step-00000100-1"))
    assert checkpoints.next() is None
    assert f"Ray Train's storage {storage} isn't shared by this node" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_fetched_is_done_without_unless_it_is_the_only_one(
    config: Config, tmp_path: Path, capsys
):
    gone = Kept(tmp_path / "storage" / "step-00000100-1")
    checkpoints = TrainCheckpoints(config, "")
    with pytest.raises(EnvironmentFault, match="can't be fetched .* has none to go on from; mend the storage"):
        checkpoints.restore(gone)
    write(config, 50)
    checkpoints.restore(gone)
    assert "the run goes on from step 50" in capsys.readouterr().out
    held = checkpoints.next()
    assert held is not None and held.metrics["step"] == 50


def test_what_a_killed_worker_held_is_removed_by_the_next(config: Config):
    write(config, 50)
    assert TrainCheckpoints(config, "").next() is not None
    TrainCheckpoints(config, "")
    assert list(config.run.directory.glob(".reported-*")) == []


def test_a_file_system_without_links_is_copied_on(config: Config, monkeypatch):
    def refuse(self: Path, target: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write(config, 50)
    held = TrainCheckpoints(config, "").next()
    assert held is not None and (held.directory / "shared.safetensors").read_text() == "weights"


def test_a_full_disk_fails_no_rank_and_is_told_once(config: Config, monkeypatch, capsys):
    def refuse(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(config, 50)
    checkpoints = TrainCheckpoints(config, "")
    with monkeypatch.context() as full:
        full.setattr(tempfile, "mkdtemp", refuse)
        assert checkpoints.next() is None and checkpoints.next() is None
    assert capsys.readouterr().out.count("isn't given step-00000050") == 1
    assert checkpoints.next() is not None

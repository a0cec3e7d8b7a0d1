"""Checkpoints on one rank: whole or not there, whatever happens to the disk or to the process."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.errors import CheckpointError, EnvironmentFault, RankFailed
from kfdist.training.checkpoint import CheckpointStore, Saved
from kfdist.training.copies import Copies
from kfdist.training.manifest import FORMAT, Manifest

SINGLE = Copies.one(Communicator(None))


def state_of(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"step": step, "w": torch.full((64,), float(step))}, {"rng": torch.arange(step, step + 9), "n": [step, None]}


def save(store: CheckpointStore, step: int) -> Saved:
    shared, own = state_of(step)
    return store.save(shared, own, step=step, statistics="per-rank", config_sha256="c", facts={"run": "t"})


def assert_holds(store: CheckpointStore, step: int) -> None:
    path = store.newest()
    assert path is not None
    loaded = store.load(path)
    shared, own = state_of(step)
    assert loaded.manifest.step == loaded.shared["step"] == step
    assert torch.equal(loaded.shared["w"], shared["w"])
    assert loaded.ranks[0] is not None
    assert torch.equal(loaded.ranks[0]["rng"], own["rng"])
    assert loaded.ranks[0]["n"] == own["n"]


def fresh(directory: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(directory / "checkpoints", SINGLE, keep=keep)


def test_round_trip_and_what_is_on_the_disk(tmp_path: Path):
    saved = save(fresh(tmp_path), 123)
    assert saved.fault == ""
    directory = tmp_path / "checkpoints" / "step-00000123"
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert files.keys() == {"manifest.json", "shared.safetensors", "rank-00000.safetensors"}
    assert saved.bytes == files["shared.safetensors"] + files["rank-00000.safetensors"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["world_size"], manifest["statistics"]) == (
        FORMAT,
        123,
        1,
        "per-rank",
    )
    assert_holds(fresh(tmp_path), 123)


def test_a_start_that_was_taken_over_writes_nothing(tmp_path: Path):
    def check_start() -> None:
        raise EnvironmentFault("start 2 has taken over")

    store = CheckpointStore(tmp_path / "checkpoints", SINGLE, keep=3, check_start=check_start)
    with pytest.raises(RankFailed, match="start 2 has taken over"):
        save(store, 5)
    assert not (tmp_path / "checkpoints").exists()


def test_a_start_that_is_taken_over_while_it_writes_commits_nothing(tmp_path: Path):
    answers = iter([None, EnvironmentFault("start 2 has taken over")])

    def check_start() -> None:
        if (error := next(answers)) is not None:
            raise error

    store = CheckpointStore(tmp_path / "checkpoints", SINGLE, keep=3, check_start=check_start)
    assert "start 2 has taken over" in save(store, 5).fault
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_without_checkpoints_there_is_no_newest(tmp_path: Path):
    assert fresh(tmp_path).newest() is None


def test_only_the_newest_are_kept(tmp_path: Path):
    store = fresh(tmp_path, keep=2)
    for step in (1, 5, 9, 100):
        save(store, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000100"]
    assert_holds(fresh(tmp_path), 100)


def test_a_damaged_one_of_a_later_step_costs_no_other_its_place(tmp_path: Path):
    """The one that is kept was it, and what the resumed run wrote was removed as soon as it was there."""
    save(fresh(tmp_path, keep=1), 9)
    (tmp_path / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    store = fresh(tmp_path, keep=1)
    assert store.newest() is None and len(store.remarks) == 1
    for step in (3, 5):
        assert save(store, step).fault == ""
        assert_holds(fresh(tmp_path), step)
    assert not (tmp_path / "checkpoints" / "step-00000003").exists()
    save(store, 9)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000009"]
    assert_holds(fresh(tmp_path), 9)


def test_the_newest_is_that_of_the_largest_number(tmp_path: Path):
    """Names have eight digits at least, and a run may have more steps."""
    store = fresh(tmp_path, keep=2)
    for step in (99_999_990, 99_999_999, 100_000_008):
        save(store, step)
    assert_holds(fresh(tmp_path), 100_000_008)
    assert not (tmp_path / "checkpoints" / "step-99999990").exists()


def test_the_same_step_is_written_once(tmp_path: Path):
    store = fresh(tmp_path)
    save(store, 4)
    written = (tmp_path / "checkpoints" / "step-00000004").stat().st_mtime_ns
    assert save(store, 4).bytes == 0
    again = fresh(tmp_path)
    path = again.newest()
    assert path is not None
    again.load(path)
    assert save(again, 4).bytes == 0
    assert (tmp_path / "checkpoints" / "step-00000004").stat().st_mtime_ns == written


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda d: (d / "manifest.json").write_text(""), "manifest.json can't be read"),
    "manifest is a list": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json can't be read"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 100), "manifest.json can't be read"),
    "manifest changed": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace('"step": 9', '"step": 8')),
        "doesn't match its own hash",
    ),
    "format changed": (
        lambda d: (d / "manifest.json").write_text(
            (d / "manifest.json").read_text().replace(f'"format": {FORMAT}', '"format": 7')
        ),
        "doesn't match its own hash",
    ),
    "shared missing": (lambda d: (d / "shared.safetensors").unlink(), "shared.safetensors can't be read"),
    "shared cut": (lambda d: os.truncate(d / "shared.safetensors", 100), "shared.safetensors has 100 bytes instead of"),
    "rank flipped": (lambda d: flip(d / "rank-00000.safetensors", -1), "rank-00000.safetensors doesn't match its hash"),
    "rank's header flipped": (lambda d: flip(d / "rank-00000.safetensors", 3), "doesn't match its hash"),
    "rank longer": (
        lambda d: (d / "rank-00000.safetensors").write_bytes((d / "rank-00000.safetensors").read_bytes() + b"x"),
        "rank-00000.safetensors has",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_with_the_reason_and_written_anew(tmp_path: Path, kind: str):
    store = fresh(tmp_path)
    save(store, 5)
    save(store, 9)
    damage, reason = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step-00000009")
    later = fresh(tmp_path)
    assert_holds(later, 5)
    assert len(later.remarks) == 1
    assert "step-00000009 is damaged and skipped: rank 0: " in later.remarks[0]
    assert reason in later.remarks[0]
    # The run comes to step 9 again.
    assert save(later, 9).fault == ""
    assert_holds(fresh(tmp_path), 9)


@pytest.mark.parametrize("damaged", [False, True])
def test_one_of_another_version_is_refused_and_stays(tmp_path: Path, damaged: bool):
    store = fresh(tmp_path)
    for step in (3, 5, 9):
        save(store, step)
    directory = tmp_path / "checkpoints" / "step-00000005"
    (directory / "manifest.json").write_bytes(replace(Manifest.read(directory), format=1).encode())
    if not damaged:  # the newest that is whole is of this version
        assert_holds(fresh(tmp_path), 9)
        return
    (tmp_path / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000005: .*has format 1 .* resume with the version that wrote it"):
        fresh(tmp_path).newest()
    assert directory.exists()


def test_a_checkpoint_that_gets_damaged_after_it_was_found_is_refused(tmp_path: Path):
    store = fresh(tmp_path)
    save(store, 5)
    path = store.newest()
    assert path is not None
    flip(path / "shared.safetensors", -1)
    with pytest.raises(CheckpointError, match="step-00000005 can't be read: rank 0: shared.safetensors doesn't match"):
        store.load(path)


def test_a_manifest_that_lists_foreign_files_is_refused(tmp_path: Path):
    save(fresh(tmp_path), 5)
    directory = tmp_path / "checkpoints" / "step-00000005"
    manifest = Manifest.read(directory)
    entry = manifest.files["shared.safetensors"]
    outside = Manifest(
        step=5,
        world_size=1,
        statistics="per-rank",
        config_sha256="c",
        files={"../../secret": entry, "shared.safetensors": entry},
    )
    (directory / "manifest.json").write_bytes(outside.encode())
    store = fresh(tmp_path)
    assert store.newest() is None
    assert "doesn't list the files" in store.remarks[0]


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_checkpoint import fresh, save

calls, fatal = 0, {fatal}
def dying(name, function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

store = fresh(Path({directory!r}), keep=1)
save(store, 1)
for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open"):
    setattr(os, name, dying(name, getattr(os, name)))
save(store, 2)
print("done", flush=True)
"""


def test_a_process_killed_at_any_point_of_writing_leaves_a_whole_checkpoint(tmp_path: Path):
    """The process kills itself before its n-th system call on files, for every n until one gets through."""
    outcomes = set()
    # One import of torch for all: each attempt is a fork of this process.
    for fatal in range(1, 40):
        directory = tmp_path / str(fatal)
        child = os.fork()
        if child == 0:
            try:
                sys.stdout = open(os.devnull, "w")
                exec(WRITER.format(tests=str(Path(__file__).parent), fatal=fatal, directory=str(directory)), {})
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        store = fresh(directory)
        path = store.newest()
        assert path is not None, f"nothing is left after a kill at call {fatal}"
        outcomes.add(path.name)
        assert_holds(store, int(path.name.removeprefix("step-")))
        if not os.WIFSIGNALED(status):
            break
        # What was left half written is in nobody's way.
        assert save(store, 3).fault == ""
        assert_holds(fresh(directory), 3)
    else:
        pytest.fail("the writer never got through")
    assert fatal > 8, "the loop should have met every fsync, rename and unlink"
    assert outcomes == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_moments_never_loses_what_it_said_was_saved(tmp_path: Path, rounds: int):
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import fresh, save
store = fresh(Path({str(tmp_path)!r}), keep=2)
newest = store.newest()
step = int(newest.name.removeprefix("step-")) if newest else 0
print("begun", flush=True)
while True:
    step += 1
    assert save(store, step).fault == ""
    print(step, flush=True)
"""
    acknowledged = 0
    for round_number in range(rounds):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.05 + 0.037 * round_number)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        acknowledged = max([acknowledged, *(int(word) for word in said)])
        store = fresh(tmp_path)
        path = store.newest()
        assert path is not None
        assert int(path.name.removeprefix("step-")) >= acknowledged
        assert store.remarks == []
    assert acknowledged > 3


def test_a_disk_that_is_full_costs_the_new_checkpoint_only(tmp_path: Path):
    """The kernel itself refuses: files may not grow beyond a limit (EFBIG, where a full disk gives ENOSPC)."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import assert_holds, fresh, save
store = fresh(Path({str(tmp_path)!r}))
assert save(store, 1).fault == ""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
saved = save(store, 2)
assert "rank 0: [Errno 27] File too large" in saved.fault, saved
assert sorted(path.name for path in Path({str(tmp_path)!r}, "checkpoints").iterdir()) == ["step-00000001"]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert_holds(fresh(Path({str(tmp_path)!r})), 1)
assert save(store, 3).fault == ""
assert_holds(fresh(Path({str(tmp_path)!r})), 3)
"""
    assert resource.RLIMIT_FSIZE >= 0
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_a_small_file_system_that_is_full(tmp_path: Path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting isn't allowed here: {mounted.stderr.decode().strip()}")
    try:
        store = fresh(tmp_path)
        assert save(store, 1).fault == ""
        (tmp_path / "ballast").write_bytes(bytes(4096 * (os.statvfs(tmp_path).f_bavail - 1)))
        saved = save(store, 2)
        assert "No space left on device" in saved.fault
        (tmp_path / "ballast").unlink()
        assert_holds(fresh(tmp_path), 1)
        assert save(store, 2).fault == ""
        assert_holds(fresh(tmp_path), 2)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

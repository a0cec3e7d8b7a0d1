"""What a machine lacks: descriptors, shared memory, disk, a place to write, a clock."""

import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

from kfdist.config import load_config
from kfdist.doctor import machine_checks
from kfdist.doctor.finding import Verdict
from kfdist.doctor.machine_checks import (
    ask_timedatectl,
    check_disk,
    check_file_limit,
    check_shared_memory,
    check_synchronised,
    check_writable,
    shared_memory_needed,
)

Usage = namedtuple("Usage", "total used free")

DIGITS = load_config(None, environment={})
PICTURES = load_config(Path("imagenet-resnet50"), environment={}, overrides=['data.settings.root="/none"'])


def test_a_low_limit_of_files_is_seen_by_the_process_that_has_it() -> None:
    script = (
        "import json, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 256));"
        "from kfdist.config import load_config; from kfdist.doctor.machine_checks import check_machine;"
        "found = check_machine(load_config(None, environment={}), checkpoints=(0, ''));"
        "print(json.dumps({each.check: each.to_json() for each in found}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    limit = json.loads(done.stdout)["file limit"]
    assert limit["verdict"] == "failed"
    assert limit["seen"].startswith("128 (ulimit -n)")
    assert "the hard limit is 256" in limit["mend"]


def test_limits_of_files() -> None:
    assert check_file_limit(DIGITS, resource.RLIM_INFINITY, resource.RLIM_INFINITY).verdict is Verdict.OK
    little = check_file_limit(DIGITS, 512, 4096)
    assert (little.verdict, little.mend) == (Verdict.WARNING, "ulimit -n 640")
    assert check_file_limit(PICTURES, 640, 4096).verdict is Verdict.WARNING  # more ranks


def test_shared_memory_that_is_too_small_for_the_loaders(monkeypatch) -> None:
    needed, users = shared_memory_needed(PICTURES)
    assert needed > 8 * 8 * 2 * 256 * 3 * 176 * 176  # ranks, loaders, batches ahead, bytes of a batch
    assert "Ray" in users and "loader processes" in users
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda folder: Usage(0, 0, 64 << 20))
    assert check_shared_memory(PICTURES).verdict is Verdict.FAILED
    assert "--shm-size" in check_shared_memory(PICTURES).mend
    assert check_shared_memory(DIGITS).verdict is Verdict.WARNING  # Ray does without
    local = load_config(None, environment={}, overrides=['cluster.link="local"'])
    assert check_shared_memory(local).verdict is Verdict.OK


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert check_shared_memory(DIGITS, tmp_path / "none").verdict is Verdict.FAILED


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    assert check_writable("run directory", tmp_path / "runs" / "a", "mend").verdict is Verdict.OK
    refused = check_writable("run directory", Path("/proc/kfdist"), "choose another run.dir")
    assert (refused.verdict, refused.mend) == (Verdict.FAILED, "choose another run.dir")
    (tmp_path / "file").touch()
    assert check_writable("run directory", tmp_path / "file", "mend").verdict is Verdict.FAILED


def test_a_directory_that_cannot_even_be_looked_at(tmp_path: Path) -> None:
    run = tmp_path / ("x" * 300)
    assert "File name too long" in check_writable("run directory", run, "choose another run.dir").seen
    assert check_disk(run, 0, "nothing").verdict is Verdict.FAILED


def test_a_disk_without_room(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda folder: Usage(0, 0, 2 << 30))
    assert check_disk(tmp_path / "new", 3 << 30, "3 GiB").verdict is Verdict.FAILED
    assert check_disk(tmp_path / "new", 3 << 29, "1.5 GiB").verdict is Verdict.WARNING
    assert check_disk(tmp_path / "new", 1 << 29, "0.5 GiB").verdict is Verdict.OK


def test_a_clock_that_nothing_keeps_right(tmp_path: Path, monkeypatch) -> None:
    said = tmp_path / "timedatectl"
    said.write_text("#!/bin/sh\necho NTPSynchronized=no\n")
    said.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = check_synchronised(ask_timedatectl())
    assert found.verdict is Verdict.WARNING
    assert "timedatectl set-ntp true" in found.mend
    said.write_text("#!/bin/sh\necho NTPSynchronized=yes\n")
    assert check_synchronised(ask_timedatectl()).seen == "synchronised (timedatectl)"
    said.write_text("#!/bin/sh\nexit 1\n")
    assert ask_timedatectl() is None

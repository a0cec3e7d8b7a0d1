"""Whether this machine has what a run takes of it: files, disk, shared memory, and directories to write to."""

import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

from kfdist.config import Config
from kfdist.doctor.finding import Finding, failed, ok, warning
from kfdist.system.memory import in_words

SHARED_MEMORY = Path("/dev/shm")
TEMPORARY = Path("/tmp")

_OBJECT_STORE_BYTES = 80 << 20
"""What a private Ray asks for (`kfdist.pool.ray_cluster`)."""

_BATCHES_AHEAD = 2
"""Batches that a loader process has ready: torch's default."""

_LOG_BYTES = 1 << 30
"""Room for what a run writes beside its checkpoints."""

_BASE_FILES, _FILES_PER_PROCESS, _OPEN_SHARDS = 512, 32, 128


def check_file_limit(config: Config, soft: int, hard: int) -> Finding:
    """Checks how many files a process may have open (ulimit -n).

    Args:
        config: What is to run: Ray takes some hundred descriptors, each rank and owner that a server talks to a few.
        soft: The limit in force.
        hard: What it may be raised to.
    """
    processes = config.cluster.workers + config.cluster.owners
    needed = _BASE_FILES + _FILES_PER_PROCESS * processes
    needed += _OPEN_SHARDS if config.data.name == "image-shards" else 0
    infinite = resource.RLIM_INFINITY
    if soft == infinite or soft >= needed:
        return ok("file limit", f"{'no limit' if soft == infinite else soft} (ulimit -n), {needed} are enough")
    mend = f"ulimit -n {needed}"
    if hard != infinite and hard < needed:
        mend = f"the hard limit is {hard}: raise nofile to {needed} in /etc/security/limits.conf or for the container"
    say = failed if soft < needed // 2 else warning
    return say("file limit", f"{soft} (ulimit -n); this run may need {needed}", mend)


def shared_memory_needed(config: Config) -> tuple[int, str]:
    """Returns the bytes that a run on this machine takes of /dev/shm, and for what.

    Jobs and results are no part of it: ranks and couriers share memory that no file system holds.
    """
    needed, users = 0, []
    if config.cluster.link == "service" and config.preconditioner.inverts and config.cluster.ray == "local":
        needed += _OBJECT_STORE_BYTES
        users.append(f"{in_words(_OBJECT_STORE_BYTES)} for Ray")
    size = config.data.settings.get("train_size", 224 if config.data.name in ("image-folder", "image-shards") else 0)
    if isinstance(size, int) and size and config.data.loader_processes:
        batch = config.data.batch_size // config.data.micro_batches * 3 * size * size
        ahead = config.cluster.workers * config.data.loader_processes * _BATCHES_AHEAD * batch
        needed += ahead
        users.append(f"{in_words(ahead)} for batches that loader processes read ahead")
    return needed, " and ".join(users)


def check_shared_memory(config: Config, folder: Path = SHARED_MEMORY) -> Finding:
    """Checks that /dev/shm has room for what is put there."""
    needed, users = shared_memory_needed(config)
    if not needed:
        return ok("shared memory", f"this run keeps nothing in {folder}")
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return failed("shared memory", f"{folder} can't be used ({error.strerror})", f"mount a tmpfs on {folder}")
    if free >= needed:
        return ok("shared memory", f"{in_words(free)} free in {folder}, needed: {users}")
    mend = f"raise it (docker run --shm-size, mount -o remount,size=... {folder}), or lower data.loader_processes"
    seen = f"{in_words(free)} free in {folder}; needed: {users}"
    # Ray puts up with a slower place; a loader that finds no room dies of a bus error.
    only_ray = needed == _OBJECT_STORE_BYTES and "Ray" in users
    return warning("shared memory", seen, mend) if only_ray else failed("shared memory", seen, mend)


def check_writable(check: str, directory: Path, mend: str) -> Finding:
    """Checks that a file can be made in a directory, or in the nearest one above it that is there."""
    shown = str(directory)
    try:
        there = _nearest(directory)
        if there != directory.absolute():
            shown = f"{directory} (to be made in {there})"
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"kfdist")
    except OSError as error:
        return failed(check, f"{shown} can't be written: {error.strerror}", mend)
    return ok(check, f"{shown} can be written")


def check_disk(directory: Path, needed: int, what: str) -> Finding:
    """Checks that a run directory's disk has room.

    Args:
        directory: The run's, which may not be there yet.
        needed: Bytes of the run's checkpoints; 0 if not known.
        what: What they are, in words.
    """
    try:
        free = shutil.disk_usage(_nearest(directory)).free
    except OSError as error:
        return failed("disk", f"{directory} can't be looked at ({error.strerror})", "choose another run.dir")
    seen = f"{in_words(free)} free for {directory}; needed: {what}"
    mend = "make room, choose another run.dir, or keep fewer (checkpoint.keep)"
    if needed and free < needed:
        return failed("disk", seen, mend)
    return ok("disk", seen) if free >= needed + _LOG_BYTES else warning("disk", seen, mend)


def _nearest(directory: Path) -> Path:
    """Returns a directory, or the nearest one above it that is there.

    Raises:
        OSError: It can't be looked at.
    """
    return next(each for each in (directory.absolute(), *directory.absolute().parents) if each.exists())


def check_synchronised(answer: str | None) -> Finding:
    """Checks that something keeps this machine's clock right.

    Args:
        answer: What `timedatectl` says of NTPSynchronized; None where it can't tell.
    """
    if answer == "yes":
        return ok("clock", "synchronised (timedatectl)")
    if answer == "no":
        return warning("clock", "isn't synchronised (timedatectl)", "timedatectl set-ntp true, or start chrony or ntpd")
    return ok("clock", "timedatectl can't tell here; times of a container are its host's")


def ask_timedatectl() -> str | None:
    """Returns "yes" or "no", or None where there is no systemd to ask."""
    command = ["timedatectl", "show", "-p", "NTPSynchronized"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    answer = answer.strip().removeprefix("NTPSynchronized=")
    return answer if answer in ("yes", "no") else None


def check_machine(config: Config, *, checkpoints: tuple[int, str]) -> list[Finding]:
    """Checks this machine.

    Args:
        config: What is to run.
        checkpoints: Bytes of its checkpoints, 0 if not known, and what they are.
    """
    directory = config.run.directory
    return [
        check_file_limit(config, *resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_shared_memory(config),
        check_writable("temporary files", TEMPORARY, f"make {TEMPORARY} writable: Ray's sockets are there"),
        check_writable("run directory", directory, "choose another run.dir, or make it writable for this user"),
        check_disk(directory, *checkpoints),
        check_synchronised(ask_timedatectl()),
    ]

"""A pool from its start to its end, as `kfdist pool` runs it."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.pool.ray_cluster import ClusterOptions, RayCluster
from kfdist.pool.supervisor import PoolOptions, Supervisor
from kfdist.system.lifetime import watch_process

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class PoolCommand:
    """What a pool is told.

    Attributes:
        run: Name of the run; names Ray's namespace.
        ray: Which Ray: "local", "auto" or "host:port".
        owners: How many owners.
        threads: CPU threads of each inversion.
        controller: Where the controller listens.
        directory: What to name the pool's directory; a new one under /tmp if None.
        ready_file: Written, as JSON, once all owners are registered.
        parent_pid: The pool ends when this process does.
        as_json: Whether to print JSON.
    """

    run: str
    ray: str
    owners: int
    threads: int
    controller: str
    directory: Path | None = None
    ready_file: Path | None = None
    parent_pid: int | None = None
    as_json: bool = False


class _Ended(BaseException):
    """Somebody asked the pool to end in the middle of its start."""


def run_pool(command: PoolCommand) -> None:
    """Keeps a pool up until SIGTERM, SIGINT or the end of its parent. To be called in the main thread.

    Raises:
        ConfigError: No owners are asked for, or no controller's address is known.
        EnvironmentFault: Ray can't be had, or the owners can't be started or registered.
    """
    if command.owners < 1:
        raise ConfigError(f"is {command.owners}; a pool needs at least 1", path="cluster.owners")
    if command.controller.endswith(":0"):
        raise ConfigError(
            f"is {command.controller!r}, which names no port; give the address that `kfdist serve` printed, "
            "with --controller HOST:PORT",
            path="control.address",
        )
    ended = threading.Event()
    try:
        with _interrupting(ended, command.parent_pid) as expect_no_more:
            cluster = RayCluster(
                ClusterOptions(
                    address=command.ray,
                    namespace=f"kfdist-{command.run}",
                    cpus=command.owners,
                    directory=command.directory,
                )
            )
            try:
                expect_no_more()
                _supervise(cluster, command, ended.is_set)
            finally:
                cluster.close()
    except _Ended:
        pass


def _supervise(cluster: RayCluster, command: PoolCommand, ended: Callable[[], bool]) -> None:
    options = PoolOptions(owners=command.owners, threads=command.threads, controller=command.controller)
    supervisor = Supervisor(cluster, options)
    supervisor.wait_until_registered(ended)
    if ended():
        return
    told = supervisor.restarts()
    _announce(supervisor.status(), cluster.directory, command, told)
    while not ended():
        supervisor.watch()
        if supervisor.restarts() != told:
            told = supervisor.restarts()
            _write_ready_file(supervisor.status(), cluster.directory, command, told)


def _announce(owners: list[dict[str, Any]], directory: Path, command: PoolCommand, restarts: int) -> None:
    _write_ready_file(owners, directory, command, restarts)
    if command.as_json:
        shown = [{key: owner[key] for key in ("owner_id", "address", "pid", "fingerprint")} for owner in owners]
        print(json.dumps({"owners": shown}))
    else:
        for owner in owners:
            print(f"pool: {owner['owner_id']} inverts at {owner['address']} (process {owner['pid']})")
    sys.stdout.flush()


def _write_ready_file(owners: list[dict[str, Any]], directory: Path, command: PoolCommand, restarts: int) -> None:
    """Tells a launcher, at the start and again at every restart of an owner, how the pool is."""
    if command.ready_file is not None:
        content = {"owners": len(owners), "owner_restarts": restarts, "pid": os.getpid(), "directory": str(directory)}
        _write_whole(command.ready_file, content)


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    # Renamed into place: whoever waits for the file never reads half of it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise EnvironmentFault(f"the ready file {path} can't be written: {error.strerror}; choose another") from None


@contextmanager
def _interrupting(ended: threading.Event, parent_pid: int | None) -> Iterator[Callable[[], None]]:
    """Sets `ended` on a signal, and raises _Ended, too, until the function that it yields is called.

    Starting Ray takes seconds, in which nothing asks whether it is still wanted.
    """
    starting = True

    def handle(number: int, frame: object) -> None:
        del number, frame
        ended.set()
        if starting:
            raise _Ended

    def settle() -> None:
        nonlocal starting
        starting = False
        for number in _SIGNALS:
            signal.signal(number, handle)  # Ray has put its own there.

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, handle)
    if parent_pid is not None:
        watch_process(parent_pid, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield settle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

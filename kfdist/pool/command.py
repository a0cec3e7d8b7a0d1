"""A pool from its start to its end, as `kfdist pool` runs it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.errors import ConfigError
from kfdist.pool.ray_cluster import ClusterOptions, RayCluster
from kfdist.pool.supervisor import PoolOptions, Supervisor
from kfdist.system.addresses import server_address
from kfdist.system.files import write_ready_file
from kfdist.system.lifetime import watch_process

OnReady = Callable[[list[dict[str, Any]]], None]

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
    """

    run: str
    ray: str
    owners: int
    threads: int
    controller: str
    directory: Path | None = None
    ready_file: Path | None = None
    parent_pid: int | None = None


class _Ended(BaseException):
    """The pool was asked to end while it was starting."""


def run_pool(command: PoolCommand, on_ready: OnReady) -> None:
    """Keeps a pool running until SIGTERM, SIGINT or the end of its parent. Must be called in the main thread.

    Args:
        command: What to run.
        on_ready: Called once all owners are registered, with what each says of itself.

    Raises:
        ConfigError: No owners are asked for, or no controller's address is known.
        EnvironmentFault: Ray can't be had, or the owners can't be started or registered.
    """
    if command.owners < 1:
        raise ConfigError(f"is {command.owners}; a pool needs at least 1", path="cluster.owners")
    server_address(command.controller, field="control.address")
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
                _supervise(cluster, command, on_ready, ended.is_set)
            finally:
                cluster.close()
    except _Ended:
        pass


def _supervise(cluster: RayCluster, command: PoolCommand, on_ready: OnReady, ended: Callable[[], bool]) -> None:
    options = PoolOptions(owners=command.owners, threads=command.threads, controller=command.controller)
    supervisor = Supervisor(cluster, options)
    supervisor.wait_until_registered(ended)
    if ended():
        return
    told = supervisor.restarts()
    _write_ready_file(command, cluster.directory, told)
    on_ready(supervisor.status())
    while not ended():
        supervisor.watch()
        if supervisor.restarts() != told:
            told = supervisor.restarts()
            _write_ready_file(command, cluster.directory, told)


def _write_ready_file(command: PoolCommand, directory: Path, restarts: int) -> None:
    """Tells a launcher the state of the pool, at the start and at every restart of an owner."""
    if command.ready_file is not None:
        content = {"owners": command.owners, "owner_restarts": restarts, "pid": os.getpid()}
        write_ready_file(command.ready_file, {**content, "directory": str(directory)})


@contextmanager
def _interrupting(ended: threading.Event, parent_pid: int | None) -> Iterator[Callable[[], None]]:
    """Sets `ended` on a signal, and raises _Ended, too, until the function that it yields is called.

    Starting Ray takes seconds, in which nothing checks `ended`.
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

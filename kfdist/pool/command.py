"""A pool from its start to its end, as `kfdist pool` runs it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kfdist.config import Config
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.pool.ray_cluster import RayCluster
from kfdist.pool.supervisor import Supervisor
from kfdist.rpc.certificate_faults import check_credentials
from kfdist.system.addresses import server_address
from kfdist.system.credentials import Role
from kfdist.system.files import check_working_directory, write_ready_file
from kfdist.system.lifetime import watch_process

OnReady = Callable[[list[dict[str, Any]]], None]

_LOG = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP_SECONDS = 1.0
"""How long after its raylet's end a pool may still be asked to end, for the two to count as stopped together."""
_TICK_SECONDS = 0.05


class _Ended(BaseException):
    """The pool was asked to end while it was starting."""


def run_pool(
    config: Config, *, directory: Path | None, ready_file: Path | None, parent_pid: int | None, on_ready: OnReady
) -> None:
    """Keeps a pool running until SIGTERM, SIGINT or the end of its parent. Must be called in the main thread.

    Args:
        config: The run that the pool is for.
        directory: What to name the pool's directory; a new one under /tmp if None.
        ready_file: Written, as JSON, once all owners are registered, and again at every restart of an owner.
        parent_pid: The pool ends when this process does.
        on_ready: Called once all owners are registered, with what each says of itself.

    Raises:
        ConfigError: No owners are asked for, or no controller's address is known.
        EnvironmentFault: The credentials can't be used, Ray can't be had, or the owners can't be started or registered.
    """
    if config.cluster.owners < 1:
        raise ConfigError(f"is {config.cluster.owners}; a pool needs at least 1", path="cluster.owners")
    server_address(config.control.address, field="control.address")
    if (credentials := config.security.credentials(Role.OWNER)) is not None:
        check_credentials(credentials)
    check_working_directory()
    ended = threading.Event()
    with suppress(_Ended), _interrupting(ended, parent_pid) as expect_no_more:
        cluster = RayCluster(config, directory)
        try:
            expect_no_more()
            _supervise(cluster, Supervisor(cluster, config), ready_file, on_ready, ended.is_set)
        finally:
            cluster.close()


def _supervise(
    cluster: RayCluster, supervisor: Supervisor, ready_file: Path | None, on_ready: OnReady, ended: Callable[[], bool]
) -> None:
    directory = cluster.directory

    def check() -> None:
        _check_ray(cluster, ended)

    supervisor.wait_until_registered(ended, check)
    if not ended():
        on_ready(supervisor.status())
    told = None
    while not ended():
        restarts = supervisor.restarts()
        if ready_file is not None and restarts != told:
            content = {"owners": len(supervisor.status()), "owner_restarts": restarts, "pid": os.getpid()}
            try:
                write_ready_file(ready_file, {**content, "directory": str(directory)})
            except EnvironmentFault as fault:
                if told is None:
                    raise
                _LOG.warning("%s", fault)  # what was told before still holds, but for the number of restarts
            told = restarts
        supervisor.watch()
        check()
        if not ended() and not directory.exists():
            raise EnvironmentFault(
                f"the pool's directory {directory} was removed, and Ray's sockets with it; start again"
            )


def _check_ray(cluster: RayCluster, ended: Callable[[], bool]) -> None:
    """Raises if Ray's raylet has ended, unless the pool is to end, too."""
    if ended():
        return
    try:
        cluster.check()
    except EnvironmentFault:
        # Whoever stops everything at once, such as a service manager, may have sent it the signal first.
        deadline = time.monotonic() + _STOP_SECONDS
        while not ended():
            if time.monotonic() > deadline:
                raise
            time.sleep(_TICK_SECONDS)


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

"""The pool's Ray: a private one that starts and ends with the pool, or an existing one that it connects to.

`RAY_AUTH_MODE` is set explicitly, before Ray is imported, and inherited by every process that Ray starts: Ray 2.60
turns tokens on by itself in some cases and not in others, and processes that disagree can't talk. A private Ray uses
token mode with a new token, in a file for this user alone whose path travels in the environment, so it needs no HOME.
Ray listens on all interfaces, whatever it is told: the token keeps others from running code in owners.
"""

import contextlib
import logging
import math
import os
import secrets
import socket
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.pool.bundles import resources_of
from kfdist.pool.ray_directory import (
    log_tail,
    make_directory,
    raylet_of,
    remove,
    remove_stale,
    start_guardian,
    sweep,
)
from kfdist.system.addresses import split_address
from kfdist.system.processes import command_line
from kfdist.system.spawn import with_package

_LOG = logging.getLogger(__name__)

_SLOW_START = "timed out during startup"
"""What Ray says then, in a bare exception; it has no switch for how long."""

LOCAL = "local"

_OBJECT_STORE_BYTES = 80 << 20
"""Little more than Ray's minimum: owners exchange nothing through Ray."""

_SLOW_TO_END = "autoscaler/_private/monitor.py"
"""Ray's autoscaler: useless here, and Ray's shutdown waits a second for it before killing it."""

_REACH_SECONDS = 5.0
_CONNECT_TRIES = "8"
"""Ray tries once a second; by default for 20 s, although a refused token is never accepted later."""


class RayCluster:
    """A connection to Ray. At most one per process, as Ray has it; to be made in the main thread.

    Attributes:
        ray: The module, imported once the environment is right.
        directory: The pool's new directory; a private Ray has its files there, too.
        own: Whether this is a private Ray, of this pool alone.
    """

    def __init__(
        self, config: Config, directory: Path | None = None, environment: MutableMapping[str, str] = os.environ
    ) -> None:
        """Connects; starts a private Ray first if `cluster.ray` asks for one.

        Args:
            config: Which Ray, the run whose name the owners' namespace has, and how many owners.
            directory: What to name the pool's directory, which is removed at its end; a new one under /tmp if None.
            environment: The process's variables; Ray's are added.

        Raises:
            ConfigError: The directory's path is too long.
            EnvironmentFault: Ray can't be started or reached, or refuses the connection.
        """
        self._address = config.cluster.ray
        self.own = self._address == LOCAL
        environment.update(with_package(environment))
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        environment.setdefault("RAY_NUM_REDIS_GET_RETRIES", _CONNECT_TRIES)
        if not self.own:
            _check_reachable(self._address)
        self._raylet = 0
        self.ray: Any = None
        remove_stale()
        self.directory, self._hold = make_directory(directory)
        self._guardian = start_guardian(self.directory)
        try:
            if self.own:
                self._set_own_token(environment)
            else:
                set_auth_mode(environment)
            self.ray = self._import_ray()
            self._connect(config, environment["RAY_AUTH_MODE"])
            if self.own:
                self._raylet = raylet_of(self.directory)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Looks whether a private Ray still has its raylet: without it no owner lives, and Ray starts none again.

        A raylet also ends by itself where one of its agents was killed, as for want of memory.

        Raises:
            EnvironmentFault: It hasn't.
        """
        if self._raylet and not command_line(self._raylet):
            told = log_tail(self.directory / "ray")
            raise EnvironmentFault(
                f"Ray's raylet (process {self._raylet}) has ended, and all owners with it; start the pool again. Where "
                "memory is short (dmesg), give it more" + (f"; the end of its log:\n{told}" if told else "")
            )

    def close(self) -> None:
        """Disconnects; a private Ray ends, with all its processes and files. Safe to call twice."""
        sweep(self.directory, word=_SLOW_TO_END)
        with contextlib.suppress(Exception):  # Whatever it fails to end is swept next.
            self.ray.shutdown()
        if left := sweep(self.directory):
            _LOG.warning("processes %s of Ray outlast SIGKILL", sorted(left))
        remove(self.directory)
        self._hold.close()
        if self._guardian.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.communicate(b".")

    def _set_own_token(self, environment: MutableMapping[str, str]) -> None:
        token = self.directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        environment.pop("RAY_AUTH_TOKEN", None)  # would win over the path
        environment.pop("RAY_ADDRESS", None)
        # Of a job of another Ray that `kfdist train` is, whose working directory is nowhere in this one.
        environment.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
        environment.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            # A container's /dev/shm may have 64 MB; owners keep nothing in the object store.
            RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE="1",
        )
        # Ray adds 15 to its workers' niceness: beside anything busy, ranks too, owners would hardly get any time.
        environment.setdefault("RAY_worker_niceness", "0")

    def _import_ray(self) -> ModuleType:
        try:
            import ray
        except ImportError as error:
            raise EnvironmentFault(f"Ray can't be imported ({error}); install it with: pip install kfdist") from error
        if ray.is_initialized():
            raise EnvironmentFault("this process is connected to a Ray already; run the pool in a separate process")
        return ray

    def _connect(self, config: Config, mode: str) -> None:
        bundle = resources_of(config.cluster)
        own = {
            "num_cpus": math.ceil(config.cluster.owners * bundle["CPU"]),  # whatever the machine has
            "num_gpus": None if "GPU" in bundle else 0,  # None: those that there are
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            # Inside the pool's private directory, as Ray opens its own to all users of the machine.
            "_temp_dir": str(self.directory / "ray"),
        }
        options = {"namespace": f"kfdist-{config.run.name}", "log_to_driver": False, "configure_logging": False}
        try:
            self._init(**options, **(own if self.own else {}))
        except Exception as error:  # Ray raises bare ones, too, as where a node "timed out during startup"
            if self.own:
                told = log_tail(self.directory / "ray")
                raise EnvironmentFault(
                    f"Ray can't be started: {str(error).strip() or type(error).__name__}; it needs some 500 MB of "
                    f"memory, a few hundred descriptors (ulimit -n) and room in {self.directory.parent}"
                    + (f"; the end of its log:\n{told}" if told else "")
                ) from error
            raise EnvironmentFault(
                f'Ray at cluster.ray = "{self._address}" refuses this pool: {error}. RAY_AUTH_MODE is {mode!r} here: '
                "a cluster with a token needs RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN_PATH or "
                "RAY_AUTH_TOKEN, one without needs RAY_AUTH_MODE=disabled. Both sides need the same Ray "
                f"({self.ray.__version__} here) and the same Python"
            ) from error

    def _init(self, **options: Any) -> None:
        """Connects to Ray, or starts it: again if it took longer than the 30 s that Ray gives a raylet."""
        try:
            self.ray.init(address=self._address, **options)
        except Exception as error:
            if not self.own or _SLOW_START not in str(error):
                raise
            _LOG.warning("Ray's start took more than 30 s; it is ended and started once more")
            self.ray.shutdown()
            sweep(self.directory)
            self.ray.init(address=self._address, **options)


def set_auth_mode(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets RAY_AUTH_MODE for a Ray that others started, unless it is set: "token" where there is one."""
    if not environment.get("RAY_AUTH_MODE"):
        home = environment.get("HOME")
        tokens = ["RAY_AUTH_TOKEN" in environment, "RAY_AUTH_TOKEN_PATH" in environment]
        has_token = any(tokens) or (home is not None and (Path(home) / ".ray" / "auth_token").exists())
        environment["RAY_AUTH_MODE"] = "token" if has_token else "disabled"


def _check_reachable(address: str) -> None:
    """Fails at once where Ray would try for two minutes and then end this process."""
    if address == "auto":
        return
    try:
        socket.create_connection(split_address(address), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            f'nobody listens at cluster.ray = "{address}" ({error}); give the address that `ray start --head` printed, '
            'or "local" to have a Ray started for this run'
        ) from error

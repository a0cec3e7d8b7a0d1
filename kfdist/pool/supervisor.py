"""The Ray driver: places owners, watches them, and replaces the dead and the silent.

Ray starts an owner again whose process has ended. It doesn't see one that is stopped or stuck, so every owner is also
pinged, and one that doesn't answer is killed, which makes it Ray's business again.
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfdist import errors
from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.owner.owner import OwnerOptions, remembered_pid
from kfdist.pool.placement import place
from kfdist.pool.ray_cluster import RayCluster
from kfdist.system.credentials import Role
from kfdist.system.files import make_directory

_LOG = logging.getLogger(__name__)

_PING_PERIOD_SECONDS = 1.0
_TICK_SECONDS = 0.2
_REPORT_SECONDS = 10.0
_NAME_SECONDS = 30.0
_START_SECONDS = 90.0
"""How long all owners together may take to be registered at the start."""
_SILENT_SECONDS = 8.0
"""An owner that doesn't answer for this long is killed and started again."""


@dataclass(kw_only=True, eq=False)
class _Slot:
    """One owner's place: its actor, what it last said, and the pending ping.

    Attributes:
        options: What its actor is made from.
        index: Its number.
        actor: The actor's handle.
        status: What it last answered; empty until then.
        ping: The pending ping.
        asked_at: When the pending ping was sent.
        pause_until: When the next ping is due.
        restarts: How often its process was started again, as far as it has said.
        process: Its process's number and its Ray node, as far as it has said; 0 and nothing if it hasn't.
    """

    options: OwnerOptions
    index: int
    actor: Any
    status: dict[str, Any] = field(default_factory=dict)
    ping: Any = None
    asked_at: float = 0.0
    pause_until: float = 0.0
    restarts: int = 0
    process: tuple[int, str] = (0, "")

    @property
    def patience(self) -> float:
        """A new owner may take as long as the whole start: Ray answers no ping before the constructor returns."""
        return _SILENT_SECONDS if self.status else _START_SECONDS


class Supervisor:
    """Keeps a number of owners alive on a Ray until told to end."""

    def __init__(self, cluster: RayCluster, config: Config) -> None:
        """Places the owners of a run; returns before they serve.

        Raises:
            EnvironmentFault: The cluster has no room for them, or their logs none on the disk.
        """
        self._ray = cluster.ray
        self._controller = config.control.address
        self._directory = cluster.directory / "owners"
        self._usual = os.nice(0) if cluster.own else None
        self._introduced: list[tuple[str, str, int]] = []
        self._placement = place(self._ray, config)
        logs = config.run.directory.absolute() / "logs"
        make_directory(logs)
        names = owner_names(config.cluster.owners)
        self._slots = [
            self._place(
                index,
                OwnerOptions(
                    owner_id=name,
                    threads=config.cluster.threads,
                    device="cuda" if config.cluster.bundle.gpus else "cpu",
                    gpu_share=config.cluster.bundle.gpus or 1.0,
                    controller=self._controller,
                    directory=str(self._directory) if self._placement.remembers else "",
                    host=self._placement.host,
                    ports=config.cluster.owner_ports or (0, 0),
                    credentials=config.security.credentials(Role.OWNER),
                    log=str(logs / f"{name}.log"),
                ),
            )
            for index, name in enumerate(names)
        ]

    def wait_until_registered(self, ended: Callable[[], bool], check: Callable[[], None]) -> None:
        """Watches until every owner is known to the controller.

        Args:
            ended: Whether the pool was asked to end; this returns at once then.
            check: Called again and again; raises where Ray is no more.

        Raises:
            EnvironmentFault: It took too long; says what is missing. Or by `check`.
        """
        begun = reported = time.monotonic()
        while not ended():
            self.watch()
            check()
            waiting = [slot for slot in self._slots if not slot.status.get("registered")]
            if not waiting:
                return
            now = time.monotonic()
            if now - begun > _START_SECONDS:
                raise EnvironmentFault(f"after {_START_SECONDS:g} s, {self._why(waiting)}")
            if now - reported > _REPORT_SECONDS:
                reported = now
                _LOG.warning("%s; still trying", self._why(waiting))

    def watch(self) -> None:
        """Checks on all owners once; takes a fraction of a second."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.ping is None and now >= slot.pause_until:
                slot.ping, slot.asked_at = slot.actor.status.remote(), now
        pings = [slot.ping for slot in self._slots if slot.ping is not None]
        answered = set(self._ray.wait(pings, num_returns=len(pings), timeout=_TICK_SECONDS)[0]) if pings else set()
        if not pings:
            time.sleep(_TICK_SECONDS)
        for slot in self._slots:
            if slot.ping in answered:
                self._hear(slot)
            elif slot.ping is not None and time.monotonic() - slot.asked_at > slot.patience:
                self._kill(slot, f"hasn't answered for {slot.patience:g} s")
        self._introduce()

    def status(self) -> list[dict[str, Any]]:
        """Returns what each owner last said of itself."""
        return [dict(slot.status) for slot in self._slots]

    def restarts(self) -> int:
        """Returns how often owners' processes were started again."""
        return sum(slot.restarts for slot in self._slots)

    def _place(self, index: int, options: OwnerOptions) -> _Slot:
        return _Slot(options=options, index=index, actor=self._make_actor(index, options))

    def _make_actor(self, index: int, options: OwnerOptions) -> Any:
        where = self._placement.options(index)
        actor_class = self._ray.remote(self._placement.owner).options(
            name=options.owner_id, max_restarts=-1, max_task_retries=0, **where
        )
        deadline = time.monotonic() + _NAME_SECONDS
        while True:
            try:
                return actor_class.remote(options)
            except self._ray.exceptions.ActorAlreadyExistsError as error:
                # Ray needs a moment to forget the actor that died.
                if time.monotonic() > deadline:
                    raise EnvironmentFault(f"{options.owner_id} can't be started again: {error}") from error
                time.sleep(_TICK_SECONDS)
            except ValueError as error:
                raise EnvironmentFault(f"Ray refuses {options.owner_id}: {error}") from error

    def _hear(self, slot: _Slot) -> None:
        """Handles the answer to a ping, or the owner's death."""
        ray_errors = self._ray.exceptions
        ping, slot.ping = slot.ping, None
        slot.pause_until = time.monotonic() + _PING_PERIOD_SECONDS
        name = slot.options.owner_id
        try:
            status = self._ray.get(ping)
        except ray_errors.ActorUnavailableError:
            # Its process has ended and Ray is starting another one; the next ping waits for that.
            slot.status, slot.pause_until = {}, time.monotonic() + _TICK_SECONDS
        except ray_errors.ActorDiedError as error:
            if fault := fault_of_start(str(error)):
                raise EnvironmentFault(f"{name} can't be started: {fault}") from None
            _LOG.warning("%s can't be started again by Ray; a new one takes its place: %s", name, _last_line(error))
            slot.status, slot.pause_until = {}, time.monotonic() + _PING_PERIOD_SECONDS
            self._ray.kill(slot.actor)  # an actor that may restart keeps its name, even if it failed to
            slot.actor = self._make_actor(slot.index, slot.options)
        except ray_errors.RayTaskError as error:
            self._kill(slot, f"says that it is broken: {_first_line(error.cause)}")
        else:
            process = (status["pid"], status.get("node", ""))
            if process != slot.process:
                # It says itself how often it was started where it remembers that, else it is a new one here.
                slot.restarts = max(slot.restarts + (slot.process[0] > 0), status["restarts"])
                slot.process = process
                if slowed := _slowed(status, self._usual):
                    _LOG.info("%s is started%s", name, slowed)
                if slot.restarts:
                    _LOG.info("%s is back at %s (restart %s)", name, status["address"], slot.restarts)
            slot.status = status

    def _kill(self, slot: _Slot, reason: str) -> None:
        """Ends an owner's process with SIGKILL, which also ends a stopped one; Ray then starts it again."""
        name, slot.ping, slot.status = slot.options.owner_id, None, {}
        slot.pause_until = time.monotonic() + _PING_PERIOD_SECONDS
        told, node = slot.process
        pid = remembered_pid(self._directory, name) or told  # it may never have answered
        _LOG.warning("%s (process %s) %s; it is killed and started again", name, pid or "not known", reason)
        self._placement.kill(pid, node)

    def _introduce(self) -> None:
        """Tells every owner about all others whenever one of them is new or has moved."""
        living = [slot.status for slot in self._slots if slot.status.get("fingerprint")]
        key = [(status["owner_id"], status["address"], status["pid"]) for status in living]
        if key and key != self._introduced:
            self._introduced = key
            peers = [{field: status[field] for field in ("owner_id", "address", "fingerprint")} for status in living]
            gone = {slot.options.owner_id for slot in self._slots} - {status["owner_id"] for status in living}
            for slot in self._slots:
                slot.actor.introduce.remote(peers, sorted(gone))

    def _why(self, waiting: Sequence[_Slot]) -> str:
        reasons = []
        for slot in waiting:
            if not slot.status:
                reason = "doesn't answer yet"
            elif slot.status["fault"]:
                reason = f"can't invert: {slot.status['fault']}"
            elif not slot.status["fingerprint"]:
                reason = f"has no inversion process yet{_slowed(slot.status, self._usual)}"
            elif slot.status["refusal"]:
                reason = f"can't register: {slot.status['refusal']}"
            else:
                reason = f"can't register, as no controller answers at {self._controller}"
            reasons.append(f"{slot.options.owner_id} {reason}")
        return "; ".join(reasons)


def owner_names(count: int) -> list[str]:
    """Returns names for a new pool's owners, with an id that no other pool has: several may serve one controller."""
    pool = secrets.token_hex(3)
    return [f"owner-{pool}-{index}" for index in range(count)]


def fault_of_start(report: str) -> str:
    """Returns why an owner's constructor refused, from Ray's report of it; empty if that isn't why the owner died."""
    found = re.findall(rf"^{re.escape(errors.__name__)}\.\w+: (.*)", report, re.MULTILINE)
    return found[-1] if "creation task" in report and found else ""


def _slowed(status: Mapping[str, Any], usual: int | None) -> str:
    """Returns what to know of an owner that others go before; empty of one that nobody does.

    Args:
        status: What it says of itself; one of an older kfdist, on a Ray that others started, says no niceness.
        usual: The niceness of a pool with a Ray of its own, which owners keep; None for another Ray.
    """
    niceness = status.get("niceness", 0)
    if niceness <= (0 if usual is None else usual):
        return ""
    slow = f", at niceness {niceness}, so that beside busy processes it gets hardly any time"
    if usual is None:
        return f"{slow}; RAY_worker_niceness=0 in the environment of that node's `ray start` gives it its share"
    return f"{slow}; without RAY_worker_niceness in the pool's environment it keeps the pool's {usual}"


def _last_line(error: object) -> str:
    return str(error).strip().rpartition("\n")[2]


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]

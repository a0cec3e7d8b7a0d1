"""An owner's parts in a background thread: gRPC server, inversion process, membership.

The supervisor makes a Ray actor of it, which shows as `ray::Owner` in `ps`; nothing here needs Ray. An owner holds
caches only: when its process ends, Ray starts it again under the same name, with nothing to restore.
"""

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from kfdist.errors import EnvironmentFault
from kfdist.owner.executor import CHILD_MODULE, ExecutionFailed, Executor
from kfdist.owner.inversion_service import InversionServicer, ServiceLimits
from kfdist.owner.membership import Membership
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import add_InversionServiceServicer_to_server
from kfdist.rpc.certificate_faults import expiry_samples
from kfdist.rpc.servers import bind, make_server
from kfdist.system.addresses import join_address, split_address
from kfdist.system.credentials import Credentials
from kfdist.system.files import replace_file
from kfdist.telemetry.logging import setup_logging
from kfdist.types import MetricSample

_LOG = logging.getLogger(__name__)

_START_SECONDS = 30.0
_RETRY_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OwnerOptions:
    """How an owner works.

    Attributes:
        owner_id: Its name, kept over restarts.
        threads: CPU threads of each inversion.
        device: Where to invert.
        gpu_share: How much of a GPU's memory it may use.
        controller: Where the controller listens; empty for none.
        directory: Where it remembers its port and its starts; empty for nowhere.
        host: The address to listen on, as others reach it; on loopback unless there are credentials.
        ports: The first and the last port that it may listen on; 0 for any.
        credentials: Who it is, and what others must show.
        child_module: What to run as the inversion process.
        limits: How much it accepts.
        log: File that this process's log is appended to; empty where the process has seen to it.
    """

    owner_id: str
    threads: int = 1
    device: str = "cpu"
    gpu_share: float = 1.0
    controller: str = ""
    directory: str = ""
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (0, 0)
    credentials: Credentials | None = None
    child_module: str = CHILD_MODULE
    limits: ServiceLimits = ServiceLimits()
    log: str = ""


class Owner:
    """Serves inversions from a background thread until closed.

    Attributes:
        address: Where it listens.
        starts: How many times an owner of this name was started in this directory, itself included.
    """

    def __init__(self, options: OwnerOptions) -> None:
        """Starts everything; returns when it listens, while its inversion process is still warming up.

        Raises:
            ConfigError: Its address isn't on loopback, and it has no credentials.
            EnvironmentFault: It can't listen, or its credentials can't be used.
        """
        if options.log:
            _log_to(Path(options.log))
        self._options = options
        self._expiries = expiry_samples(options.credentials, "owner")
        self._memory = _Memory(options)
        self.starts = self._memory.starts
        # First, since it takes longest to start.
        self._executor = Executor(
            threads=options.threads, device=options.device, gpu_share=options.gpu_share, module=options.child_module
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kfdist-owner", daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None
        self._background: asyncio.Task[None] | None = None
        self._membership: Membership | None = None
        self._fingerprint = ""
        self._fault = ""
        try:
            self.address = self._do(self._start(), _START_SECONDS)
        except BaseException:
            self.close()
            raise
        self._memory.note(self.address)
        _LOG.info("%s, start %d, serves at %s", options.owner_id, self.starts, self.address)

    def status(self, seconds: float = 5.0) -> dict[str, Any]:
        """Returns how it stands; asked in its event loop, so an answer means that it serves.

        Raises:
            TimeoutError: It doesn't answer.
            Exception: A part of it has failed; it should be restarted.
        """
        return self._do(self._status(), seconds)

    def introduce(self, owners: Iterable[Mapping[str, str]], gone: Iterable[str] = ()) -> None:
        """Records what its pool knows, to tell couriers; other pools' owners are the controller's to tell.

        Args:
            owners: The pool's live owners: owner_id, address, fingerprint.
            gone: The names of its others.
        """
        peers = [
            inversion_pb2.Owner(owner_id=each["owner_id"], address=each["address"], fingerprint=each["fingerprint"])
            for each in owners
        ]
        self._loop.call_soon_threadsafe(self._servicer.change_peers, peers, gone)

    def close(self) -> None:
        """Ends everything; calls in progress are cut off. Safe to call twice."""
        self._executor.close()
        if self._loop.is_running():
            try:
                self._do(self._stop(), _START_SECONDS)
                self._servicer.tracing.flush()
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    async def _start(self) -> str:
        options = self._options
        self._servicer = InversionServicer(options.owner_id, self._executor, options.limits)
        self._server = server = make_server(options.credentials)
        add_InversionServiceServicer_to_server(self._servicer, server)
        address = self._bind(server)
        await server.start()
        self._background = asyncio.create_task(self._introduce(address))
        return address

    def _bind(self, server: grpc.aio.Server) -> str:
        """Binds to the port of an earlier start, so that couriers find the owner again while no controller is there."""
        host, (first, last) = self._options.host, self._options.ports
        remembered = [self._memory.port] if self._memory.port else []
        *others, final = [join_address(host, port) for port in (*remembered, *range(first, last + 1))]
        for address in others:
            with contextlib.suppress(EnvironmentFault):  # another process has it now
                return bind(server, address, self._options.credentials, path="")
        try:
            return bind(server, final, self._options.credentials, path="")
        except EnvironmentFault as fault:
            if not last:
                raise
            raise EnvironmentFault(f"no port of cluster.owner_ports = [{first}, {last}] can be had: {fault}") from fault

    async def _introduce(self, address: str) -> None:
        """Waits for the inversion process, whose fingerprint is part of the registration, and keeps registered."""
        while not self._fingerprint:
            try:
                self._fingerprint = await asyncio.to_thread(self._executor.fingerprint)
            except ExecutionFailed as failure:
                if str(failure) != self._fault:
                    self._fault = str(failure)
                    _LOG.warning("%s: %s; trying again", self._options.owner_id, failure)
                await asyncio.sleep(_RETRY_SECONDS)
        self._servicer.set_fingerprint(self._fingerprint)
        owner = inversion_pb2.Owner(owner_id=self._options.owner_id, address=address, fingerprint=self._fingerprint)
        self._servicer.set_peers([owner])
        if not self._options.controller:
            return
        request = membership_pb2.RegisterOwnerRequest(owner=owner, restarts=self.starts - 1, pid=os.getpid())
        self._membership = Membership(
            self._options.controller,
            self._options.credentials,
            request,
            measure=self._measure,
            learn_peers=self._servicer.set_peers,
        )
        await self._membership.run()

    def _measure(self) -> list[MetricSample]:
        lost = [
            MetricSample(name="kfdist_restarts_total", value=count, labels={"process": "inverter", "run": run})
            for run, count in self._servicer.processes_lost.items()
        ]
        return [*lost, *self._expiries()]

    async def _status(self) -> dict[str, Any]:
        if self._background is not None and self._background.done():
            await self._background  # It ends only by an error, which this raises.
        return {
            "owner_id": self._options.owner_id,
            "address": self.address,
            "fingerprint": self._fingerprint,
            "fault": "" if self._fingerprint else self._fault,
            "refusal": self._membership.refusal if self._membership is not None else "",
            "registered": self._membership is not None and self._membership.registered,
            "restarts": self.starts - 1,
            "pid": os.getpid(),
            "child_pid": self._executor.pid,
            "niceness": os.nice(0),
            "queue_depth": self._servicer.queue_depth,
            "completed": self._servicer.completed,
            "failed": dict(self._servicer.failed),
        }

    async def _stop(self) -> None:
        if self._background is not None:
            self._background.cancel()
        if self._server is not None:
            await self._server.stop(grace=None)


def _log_to(file: Path) -> None:
    """Logs to a file, whose folder somebody may have removed since the first start, or to standard error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        setup_logging(stream=file.open("a", encoding="utf-8"))
    except OSError as error:
        setup_logging()
        _LOG.warning("the log %s can't be written (%s)", file, error)


def remembered_pid(directory: Path, owner_id: str) -> int:
    """Returns the process id of an owner as of its newest start in a directory, 0 if it had none."""
    return _Memory.read(directory / f"{owner_id}.json").get("pid", 0)


class _Memory:
    """What an owner remembers of its earlier starts: a file with its port, its process and how many there were."""

    def __init__(self, options: OwnerOptions) -> None:
        self._path = Path(options.directory) / f"{options.owner_id}.json" if options.directory else None
        remembered = self.read(self._path) if self._path is not None else {}
        self.port = remembered.get("port", 0)
        self.starts = remembered.get("starts", 0) + 1
        self._write(self.port)

    @staticmethod
    def read(path: Path) -> dict[str, int]:
        """Returns what was remembered; nothing at the first start, or if the disk lost it."""
        try:
            return {key: int(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def note(self, address: str) -> None:
        """Remembers where the owner listens."""
        self._write(split_address(address)[1])

    def _write(self, port: int) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {"port": port, "starts": self.starts, "pid": os.getpid()}
            replace_file(self._path, json.dumps(content).encode())

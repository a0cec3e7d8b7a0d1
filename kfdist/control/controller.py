"""The controller as a whole: store, ledger, leases, services, health, reflection and /metrics, from start to end."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kfdist.control.control_records import Change, RunRecord
from kfdist.control.exporter import MAX_RUNS, Exporter
from kfdist.control.leases import LEASE_SECONDS, Members
from kfdist.control.ledger import Ledger
from kfdist.control.membership_service import MembershipService
from kfdist.control.metrics_server import MetricsServer
from kfdist.control.run_rules import announced
from kfdist.control.run_service import RunService
from kfdist.control.store import Store
from kfdist.control.watchers import QUEUED_CHANGES
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, membership_pb2_grpc, run_pb2, run_pb2_grpc
from kfdist.rpc.certificate_faults import expiry_samples
from kfdist.rpc.servers import bind, make_server
from kfdist.system.credentials import Credentials
from kfdist.system.files import write_ready_file

_LOG = logging.getLogger(__name__)

GRACE_SECONDS = 0.5
"""How long calls may go on once the controller was told to end. Short, because streams never end by themselves."""

SERVICES = tuple(
    service.full_name
    for file in (run_pb2.DESCRIPTOR, membership_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)


@dataclass(frozen=True, kw_only=True)
class AnnouncedRun:
    """A run as its configuration describes it.

    Attributes:
        name: Its name.
        directory: Its directory, shown to users.
        total_steps: Its planned number of steps, 0 if unknown.
        config: Its resolved configuration as TOML, kept for users.
    """

    name: str
    directory: str = ""
    total_steps: int = 0
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """Where a controller serves, what it remembers, and for whom.

    Attributes:
        state: Its SQLite file.
        address: Where to serve gRPC, "host:port"; port 0 takes any free one.
        metrics_address: Where to serve /metrics, in the same form.
        credentials: Who it is, and what others must show; without them both addresses must be on loopback.
        lease_seconds: How long ranks and owners may be silent.
        queued_changes: How many changes a watch may leave unread.
        announced: The run that it is started for, known from the start; None if there is none.
    """

    state: Path
    address: str = "127.0.0.1:7070"
    metrics_address: str = "127.0.0.1:9464"
    credentials: Credentials | None = None
    lease_seconds: float = LEASE_SECONDS
    queued_changes: int = QUEUED_CHANGES
    announced: AnnouncedRun | None = None


class Controller:
    """A controller in this process's running event loop.

    Attributes:
        address: Where it serves gRPC, once started.
        metrics_address: Where it serves /metrics, once started.
        ledger: Its memory of runs and owners, once started; for the event loop that it runs in.
    """

    def __init__(self, options: ControllerOptions) -> None:
        """Keeps the options; `start` opens everything."""
        self._options = options
        self.address = ""
        self.metrics_address = ""

    async def start(self) -> None:
        """Opens the file, binds both addresses and serves. If it raises, nothing stays open.

        Raises:
            ConfigError: An address isn't "host:port", or reaches beyond loopback without credentials.
            EnvironmentFault: An address or the file is in use, the file is damaged or of another format, or the
                credentials can't be used.
        """
        credentials = self._options.credentials
        exporter = Exporter(expiry_samples(credentials, "controller"))
        self._server = make_server(credentials)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._server.stop, None)
            # The addresses first: if they are taken, no file is made.
            self.address = bind(self._server, self._options.address, credentials)
            self._metrics = MetricsServer(exporter, self._options.metrics_address, credentials)
            undo.callback(self._metrics.close)
            store = Store(self._options.state)
            undo.callback(store.close)
            kept = store.counters(MAX_RUNS)
            self.ledger = Ledger(store, on_change=exporter.show, queued_changes=self._options.queued_changes)
            undo.push_async_callback(self.ledger.close)
            exporter.go_on(kept, self.ledger.keep_counters)
            members = Members(self.ledger, exporter, lease_seconds=self._options.lease_seconds)
            await self._announce()
            self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - set under an if
            self._add_services(members, exporter)
            undo.pop_all()
        self.metrics_address = self._metrics.address
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._leases = asyncio.create_task(members.watch_leases(), name="kfdist-leases")

    async def stop(self) -> None:
        """Refuses new calls, ends running ones after GRACE_SECONDS, and closes everything."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE_SECONDS)
        self._leases.cancel()
        with suppress(asyncio.CancelledError):
            await self._leases
        await self.ledger.close()
        await asyncio.to_thread(self._metrics.close)

    async def _announce(self) -> None:
        run = self._options.announced
        if run is None:
            return

        def rule(record: RunRecord | None) -> Change:
            return announced(
                record, name=run.name, directory=run.directory, total_steps=run.total_steps, now_ns=time.time_ns()
            )

        await self.ledger.change(run.name, rule, config=run.config)

    def _add_services(self, members: Members, exporter: Exporter) -> None:
        run_pb2_grpc.add_RunServiceServicer_to_server(RunService(self.ledger, exporter), self._server)
        membership = MembershipService(self.ledger, members, exporter)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(membership, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)


async def serve(
    options: ControllerOptions, *, ready_file: Path | None = None, on_ready: Callable[[Controller], None] | None = None
) -> None:
    """Runs a controller until SIGTERM or SIGINT.

    Args:
        options: Where it serves, what it remembers, and for whom.
        ready_file: Written once it serves, whole or not at all: JSON with `address` and `metrics_address`.
        on_ready: Called once it serves.

    Raises:
        ConfigError, EnvironmentFault: As for `Controller.start`.
    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Before anything is opened, so that a signal during the start also ends it in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    controller = Controller(options)
    await controller.start()
    try:
        if ready_file is not None:
            content = {"address": controller.address, "metrics_address": controller.metrics_address}
            write_ready_file(ready_file, content)
        if on_ready is not None:
            on_ready(controller)
        _LOG.info("serving on %s, metrics on %s", controller.address, controller.metrics_address)
        await ended.wait()
        _LOG.info("ending")
    finally:
        await controller.stop()

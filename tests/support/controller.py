"""A real controller for tests: in a thread of this process, or as the process that users start; and members of it."""

import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import grpc

from kfdist.control.client import ControlClient
from kfdist.control.control_records import OwnerRecord
from kfdist.control.controller import Controller, ControllerOptions
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, membership_pb2_grpc, run_pb2_grpc
from kfdist.rpc.beats import in_force_message
from kfdist.rpc.channels import open_channel
from kfdist.system.addresses import split_address
from kfdist.system.credentials import Credentials
from kfdist.types import InForce
from tests.support.waits import eventually

CALL_SECONDS = 10.0


class ControllerThread:
    """A controller whose event loop runs in a thread, on free ports."""

    def __init__(self, state: Path, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        given = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", **options}
        self.controller = Controller(ControllerOptions(state=state, **given))
        try:
            self.call(self.controller.start())
        except BaseException:
            self._end_loop()
            raise
        self.address = self.controller.address

    def call(self, work: Any) -> Any:
        """Runs a coroutine in the controller's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def client(self) -> ControlClient:
        return ControlClient(self.address)

    def live_owners(self) -> list[OwnerRecord]:
        async def look() -> list[OwnerRecord]:
            return self.controller.ledger.live_owners()

        return self.call(look())

    def scrape(self) -> str:
        return scrape(self.controller.metrics_address)

    def close(self) -> None:
        self.call(self.controller.stop())
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ControllerProcess:
    """`kfdist serve` as a process."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1:0", arguments: tuple[str, ...] = ()) -> None:
        self.state = folder / "control.sqlite"
        self.ready_file = folder / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        command = ["serve", *arguments, "--state", str(self.state), "--ready-file", str(self.ready_file)]
        command += ["--set", f"control.address={address}", "--set", "control.metrics_address=127.0.0.1:0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kfdist", *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_ready(self) -> str:
        """Waits until it serves and returns its address."""
        eventually(lambda: self.ready_file.exists() or self.process.poll() is not None, bool, seconds=30)
        assert self.ready_file.exists(), self.output()
        self.ready = json.loads(self.ready_file.read_text())
        return self.ready["address"]

    def output(self) -> str:
        """Waits for its end and returns what it wrote."""
        return self.process.communicate(timeout=30)[0]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Member:
    """Whoever registers and beats: one channel, one Heartbeat stream at a time."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self._channel = open_channel(address, credentials)
        self.stub: Any = membership_pb2_grpc.MembershipServiceStub(self._channel)
        self.runs: Any = run_pb2_grpc.RunServiceStub(self._channel)
        self._requests: queue.Queue[Any] = queue.Queue()
        self._answers: Any = None

    def register_worker(
        self, run: str, rank: int = 0, world_size: int = 1, epoch: int = 1, pid: int = 0, **fields: Any
    ) -> Any:
        request = membership_pb2.RegisterWorkerRequest(
            run=run, epoch=epoch, worker_rank=rank, world_size=world_size, pid=pid or os.getpid(), **fields
        )
        return self.stub.RegisterWorker(request, timeout=CALL_SECONDS)

    def register_owner(self, owner_id: str, *, port: int = 1, restarts: int = 0, pid: int = 7) -> list[str]:
        owner = inversion_pb2.Owner(owner_id=owner_id, address=f"127.0.0.1:{port}", fingerprint="cpu")
        request = membership_pb2.RegisterOwnerRequest(owner=owner, restarts=restarts, pid=pid)
        return [owner.owner_id for owner in self.stub.RegisterOwner(request, timeout=CALL_SECONDS).owners]

    def beat_worker(
        self,
        run: str,
        rank: int = 0,
        epoch: int = 1,
        step: int = 0,
        phase: str = "running",
        samples: tuple[Any, ...] = (),
        in_force: InForce | None = None,
        inversion_seconds: Mapping[str, float] | None = None,
    ) -> Any:
        beat = membership_pb2.WorkerBeat(
            run=run,
            epoch=epoch,
            worker_rank=rank,
            step=step,
            phase=phase,
            inversion_seconds=inversion_seconds,
            in_force=None if in_force is None else in_force_message(in_force),
        )
        return self.send(membership_pb2.HeartbeatRequest(worker=beat, samples=samples))

    def beat_owner(self, owner_id: str, samples: tuple[Any, ...] = (), address: str = "") -> Any:
        beat = membership_pb2.OwnerBeat(owner_id=owner_id, address=address)
        return self.send(membership_pb2.HeartbeatRequest(owner=beat, samples=samples))

    def send(self, request: Any) -> Any:
        """Sends one message on the stream, opening it if there is none, and returns the answer."""
        if self._answers is None:
            self._requests = queue.Queue()
            self._answers = self.stub.Heartbeat(iter(self._requests.get, None), timeout=60)
        self._requests.put(request)
        try:
            return next(self._answers)
        except grpc.RpcError:
            self.hang_up()
            raise

    def assignment(self, run: str) -> Any:
        return self.stub.GetAssignment(membership_pb2.GetAssignmentRequest(run=run), timeout=CALL_SECONDS)

    def hang_up(self) -> None:
        """Ends the stream."""
        if self._answers is not None:
            self._requests.put(None)
            self._answers.cancel()
            self._answers = None

    def close(self) -> None:
        self.hang_up()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sample(name: str, value: float, **labels: str) -> membership_pb2.Sample:
    return membership_pb2.Sample(name=name, value=value, labels=labels)


def scrape(metrics_address: str) -> str:
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as response:
        return response.read().decode()


def scrape_secured(metrics_address: str, credentials: Credentials) -> str:
    """Scrapes over TLS, from this machine."""
    context = credentials.tls(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # Prometheus is told a role as `server_name`, which urllib can't be
    url = f"https://127.0.0.1:{split_address(metrics_address)[1]}/metrics"
    with urllib.request.urlopen(url, context=context, timeout=10) as response:
        return response.read().decode()


def values(exposition: str) -> Mapping[str, float]:
    """Returns the samples of a scrape by their text before the value."""
    return dict(_samples(exposition))


def _samples(exposition: str) -> Iterator[tuple[str, float]]:
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            yield series, float(value)


def address_of_its_own() -> str:
    """Returns a free address at which a controller can be started again and again.

    Its port is none of those that the kernel gives to connections: while nobody listens there, a client that tries to
    connect might get the very port, and keep the controller out.
    """
    draw = random.SystemRandom()
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", draw.randrange(15_000, 30_000)))
            return f"127.0.0.1:{probe.getsockname()[1]}"

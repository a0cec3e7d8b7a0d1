"""A controller that is killed again and again, and callers that ask until each of their mutations is acknowledged."""

import asyncio
import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from kfdist.control.controller import ControllerOptions, serve
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, run_pb2
from kfdist.rpc.status import code_of
from tests.support.controller import Member
from tests.support.waits import eventually

RUNS = ("first", "second")
OWNERS = ("owner-0", "owner-1")

_PROCESSES = multiprocessing.get_context("forkserver")
"""Its one server is that of `tests.support.ranks` where ranks are used, too, which says what it loads."""


def _serve(state: Path, address: str, metrics_address: str, ready: Path) -> None:
    options = ControllerOptions(state=state, address=address, metrics_address=metrics_address, lease_seconds=3600)
    asyncio.run(serve(options, ready_file=ready))


class KilledController:
    """A controller in a process of its own, at one address over all its starts."""

    def __init__(self, folder: Path, address: str, metrics_address: str = "127.0.0.1:0") -> None:
        self.address = address
        self.metrics_address = metrics_address
        self.starts = 0
        self._folder = folder
        self._process: Any = None

    def start(self) -> None:
        """Starts it and waits until it serves."""
        self.starts += 1
        ready = self._folder / f"ready-{self.starts}.json"
        self._process = _PROCESSES.Process(
            target=_serve,
            args=(self._folder / "c.sqlite", self.address, self.metrics_address, ready),
            daemon=True,
        )
        self._process.start()
        eventually(lambda: ready.exists() or not self._process.is_alive(), bool, seconds=60)
        assert ready.exists(), f"start {self.starts} ended with {self._process.exitcode}"

    def kill(self) -> None:
        """Kills it as nothing can be killed more."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(30)
        assert self._process.exitcode == -signal.SIGKILL


@dataclass
class Asked:
    """A mutation that somebody asked for.

    Attributes:
        kind: What it is.
        run: Of which run, or which owner.
        value: The damping, where it sets one.
        answers: Every answer that came, serialized: the request is repeated now and then.
    """

    kind: str
    run: str
    value: float = 0.0
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    answers: list[bytes] = field(default_factory=list)

    def ask(self, member: Member) -> None:
        """Makes the call once."""
        self.answers.append(self._call(member).SerializeToString(deterministic=True))

    def _call(self, member: Member) -> Any:
        common = {"request_id": self.request_id, "name": self.run}
        match self.kind:
            case "pause":
                return member.runs.Pause(run_pb2.PauseRequest(**common), timeout=5)
            case "resume":
                return member.runs.Resume(run_pb2.ResumeRequest(**common), timeout=5)
            case "damping":
                request = run_pb2.UpdateSettingsRequest(damping=self.value, **common)
                return member.runs.UpdateSettings(request, timeout=5)
            case "refresh":
                return member.runs.Refresh(run_pb2.RefreshRequest(**common), timeout=5)
            case "checkpoint":
                return member.runs.Checkpoint(run_pb2.CheckpointRequest(**common), timeout=5)
            case "drain":
                request = membership_pb2.DrainOwnerRequest(request_id=self.request_id, owner_id=self.run)
                return member.stub.DrainOwner(request, timeout=5)
            case _:
                request = membership_pb2.UndrainOwnerRequest(request_id=self.request_id, owner_id=self.run)
                return member.stub.UndrainOwner(request, timeout=5)

    @property
    def revision(self) -> int:
        """The revision of the settings that it made, or found."""
        return run_pb2.PauseResponse.FromString(self.answers[0]).run.settings_revision


class Caller(threading.Thread):
    """Asks for one random mutation after the other, each until it is acknowledged, whatever becomes of the controller.

    Some are asked for again after their answer, as by a client that lost it.

    Attributes:
        asked: What it has asked for; once it has ended, all of it is acknowledged.
        lost: How many calls had no answer.
        fault: A refusal, of which there should be none.
        ended: Tells it to end after the mutation it is at.
    """

    def __init__(self, address: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.asked: list[Asked] = []
        self.lost = 0
        self.fault: grpc.RpcError | None = None
        self.ended = threading.Event()
        self._address = address
        self._random = random.Random(seed)

    def run(self) -> None:
        while not self.ended.is_set():
            asked = self._draw()
            self.asked.append(asked)
            while not asked.answers or (self._random.random() < 0.1 and len(asked.answers) < 3):
                try:
                    with Member(self._address) as member:
                        asked.ask(member)
                except grpc.RpcError as error:
                    code = code_of(error)
                    if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                        self.fault = error
                        return
                    self.lost += 1
                    time.sleep(0.02)

    def _draw(self) -> Asked:
        kind = self._random.choice(
            ["pause", "resume", "damping", "damping", "refresh", "checkpoint", "undrain", "drain"]
        )
        if kind in ("drain", "undrain"):
            return Asked(kind, OWNERS[0])
        return Asked(kind, self._random.choice(RUNS), value=self._random.uniform(0.001, 1.0))

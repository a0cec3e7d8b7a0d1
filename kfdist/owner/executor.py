"""Runs inversions in a process that can be killed: at a deadline, or by whatever goes wrong in it.

Plain blocking code without Ray and gRPC; an owner calls it from one thread at a time.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from kfdist.owner.child import Answer
from kfdist.rpc.chunking import digest_of
from kfdist.system.processes import describe_exit
from kfdist.system.spawn import module_command, with_package

CHILD_MODULE = "kfdist.owner.child"

_GREETING_SECONDS = 120.0
"""How long a new process may take to import torch; a cold file cache on a loaded machine takes its time."""


class ExecutionFailed(Exception):
    """An inversion that gave no result.

    Attributes:
        process_lost: Whether its process ended or was killed.
    """

    process_lost = False


class DeadlineExceeded(ExecutionFailed):
    """It took too long, and its process was killed."""

    process_lost = True


class InversionRaised(ExecutionFailed):
    """It raised, for want of memory above all; its process lives on."""


class ChildCrashed(ExecutionFailed):
    """Its process ended, or none could be started."""

    process_lost = True


class PayloadRefused(ExecutionFailed):
    """The payload is no job."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A finished inversion.

    Attributes:
        result: What `kfdist.curvature.jobs.run_job` returned.
        digest: Its SHA-256, hexadecimal.
        seconds: Wall-clock seconds of the inversion itself.
    """

    result: bytes
    digest: str
    seconds: float


class Executor:
    """Keeps one warm process and replaces it when it has to.

    `run` is called by one thread at a time, everything else by any.
    """

    def __init__(
        self, *, threads: int, device: str = "cpu", gpu_share: float = 1.0, module: str = CHILD_MODULE
    ) -> None:
        """Starts the process, and doesn't wait for it.

        Args:
            threads: CPU threads of each inversion.
            device: Where to invert.
            gpu_share: How much of a GPU's memory it may use.
            module: What to run as the process; another one wraps `kfdist.owner.child`.
        """
        self._module = module
        self._arguments = {"threads": threads, "device": device, "gpu-share": gpu_share}
        self._fingerprint = ""
        self._closed = False
        # Guards which process is in charge and who reads its greeting; not held while it works.
        self._lock = threading.Lock()
        self._child: _Child | None = self._start()

    @property
    def pid(self) -> int:
        """Process id of the process in charge; 0 while there is none."""
        return self._child.pid if self._child is not None else 0

    def fingerprint(self) -> str:
        """Returns what the numbers depend on; waits for the process to start if need be.

        Raises:
            ChildCrashed: No process could be started.
        """
        self._ready()
        return self._fingerprint

    def run(self, payload: bytes | bytearray, deadline_seconds: float) -> Execution:
        """Does one job.

        Args:
            payload: What `kfdist.curvature.jobs.encode_job` returned.
            deadline_seconds: How long it may take once the process is there to take it.

        Raises:
            DeadlineExceeded: It took longer; the process was killed and another one is starting.
            ChildCrashed: The process ended.
            InversionRaised: The inversion raised.
            PayloadRefused: The payload is malformed.
        """
        child = self._ready()
        try:
            with child.deadline(deadline_seconds):
                child.connection.send_bytes(payload)
                answer = child.receive()
                result = child.connection.recv_bytes() if answer["kind"] == Answer.RESULT else b""
        except TimeoutError:
            self._replace()
            raise DeadlineExceeded(
                f"the inversion took longer than its deadline of {deadline_seconds:g} s and was killed"
            ) from None
        except EOFError:
            raise ChildCrashed(f"the inversion process {self._replace()} in the middle of an inversion") from None
        match answer["kind"]:
            case Answer.RESULT:
                return Execution(result=result, digest=digest_of(result), seconds=answer["seconds"])
            case Answer.REFUSAL:
                raise PayloadRefused(answer["reason"])
            case _:
                raise InversionRaised(f"the inversion raised {answer['reason']}")

    def close(self) -> None:
        """Ends the process; an inversion in progress fails. Safe to call twice and from any thread."""
        self._closed = True
        child = self._child  # Without the lock, whose holder may be waiting for this very process.
        if child is not None:
            child.kill()

    def _ready(self) -> "_Child":
        """Returns a process that has greeted."""
        with self._lock:
            if self._child is None:
                self._child = self._start()
            child = self._child
            if not child.greeted:
                try:
                    with child.deadline(_GREETING_SECONDS):
                        greeting = child.receive()
                except TimeoutError:
                    self._discard()
                    raise ChildCrashed(
                        f"the inversion process wasn't ready after {_GREETING_SECONDS:g} s and was killed"
                    ) from None
                except EOFError:
                    raise ChildCrashed(f"the inversion process {self._discard()} before it was ready") from None
                if "fault" in greeting:
                    self._discard()
                    raise ChildCrashed(greeting["fault"])
                self._fingerprint = greeting["fingerprint"]
                child.greeted = True
            return child

    def _start(self) -> "_Child":
        if self._closed:
            raise ChildCrashed("the owner is ending")
        try:
            return _Child(self._module, self._arguments)
        except OSError as error:
            raise ChildCrashed(f"no inversion process can be started: {error}") from error

    def _discard(self) -> str:
        """Ends the process in charge and says how it ended."""
        child, self._child = self._child, None
        return child.end() if child is not None else "had ended"

    def _replace(self) -> str:
        """Ends the process in charge, says how it ended, and lets the next one warm up."""
        with self._lock:
            ended = self._discard()
            with contextlib.suppress(ChildCrashed):  # then the next job tries again
                self._child = self._start()
            return ended


class _Child:
    """One process and the connection to it, over which bytes are sent, never pickles.

    Attributes:
        connection: Our end; to be used within `deadline`.
        greeted: Whether it has said that it is ready.
    """

    def __init__(self, module: str, arguments: Mapping[str, object]) -> None:
        threads = str(arguments["threads"])
        environment = {
            **with_package(os.environ),
            # Read when the libraries load; Ray sets the first to the actor's number of CPUs.
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        arguments = {**arguments, "connection": theirs.fileno(), "owner-pid": os.getpid()}
        with theirs:
            self._process = subprocess.Popen(
                module_command(module, *(f"--{name}={value}" for name, value in arguments.items())),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print goes where the owner's log goes
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self.greeted = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def receive(self) -> dict[str, Any]:
        """Reads one JSON object."""
        return json.loads(self.connection.recv_bytes())

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Kills the process if what is done in the context takes longer, which ends every wait for it.

        Raises:
            TimeoutError: It took longer.
            EOFError: The process has gone.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (EOFError, OSError):  # OSError: it went in the middle of a message
            if not expired.is_set():
                raise EOFError from None
        finally:
            timer.cancel()
            timer.join()  # else it might kill the process later, in another job's time
        if expired.is_set():
            raise TimeoutError

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Kills it, reaps it, and says how it ended."""
        # Its connection may close an instant before it can be reaped.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        self._process.kill()
        ended = self._process.wait()
        self.connection.close()
        return describe_exit(ended)

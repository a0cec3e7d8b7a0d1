"""Runs inversions in a process that can be killed: at a deadline, or by whatever goes wrong in it.

Plain blocking code without Ray and gRPC; an owner calls it from one thread at a time.
"""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import threading
import time
from dataclasses import dataclass

from kfdist.owner.frames import HEAD, Answer
from kfdist.system.spawn import module_command, with_package

CHILD_MODULE = "kfdist.owner.child"

_GREETING_SECONDS = 120.0
"""How long a new process may take to import torch; a cold file cache on a loaded machine takes its time."""

_PIPE_BYTES = 1 << 20


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
        seconds: Wall-clock seconds of the inversion itself.
    """

    result: bytes
    seconds: float


class Executor:
    """Keeps one warm process and replaces it when it has to.

    `run` is called by one thread at a time, everything else by any.
    """

    def __init__(self, *, threads: int, device: str = "cpu", module: str = CHILD_MODULE) -> None:
        """Starts the process, and doesn't wait for it.

        Args:
            threads: CPU threads of each inversion.
            device: Where to invert.
            module: What to run as the process; another one wraps `kfdist.owner.child`.
        """
        self._threads = threads
        self._device = device
        self._module = module
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
        deadline = time.monotonic() + deadline_seconds
        try:
            child.send(payload, deadline)
            kind, seconds, data = child.receive(deadline)
        except TimeoutError:
            self._replace()
            raise DeadlineExceeded(
                f"the inversion took longer than its deadline of {deadline_seconds:g} s and was killed"
            ) from None
        except EOFError:
            raise ChildCrashed(f"the inversion process {self._replace()} in the middle of an inversion") from None
        if kind is Answer.RESULT:
            return Execution(result=data, seconds=seconds)
        sentence = data.decode(errors="replace")
        if kind is Answer.REFUSAL:
            raise PayloadRefused(sentence)
        raise InversionRaised(f"the inversion raised {sentence}")

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
                    _, _, greeting = child.receive(time.monotonic() + _GREETING_SECONDS)
                except TimeoutError:
                    ended = self._discard()
                    raise ChildCrashed(f"the inversion process {ended}, after {_GREETING_SECONDS:g} s") from None
                except EOFError:
                    raise ChildCrashed(f"the inversion process {self._discard()} before it was ready") from None
                self._fingerprint = json.loads(greeting)["fingerprint"]
                child.greeted = True
            return child

    def _start(self) -> "_Child":
        if self._closed:
            raise ChildCrashed("the owner is ending")
        return _Child(self._module, self._threads, self._device)

    def _discard(self) -> str:
        """Ends the process in charge and says how it ended."""
        child, self._child = self._child, None
        return child.end() if child is not None else "had ended"

    def _replace(self) -> str:
        """Ends the process in charge, says how it ended, and lets the next one warm up."""
        with self._lock:
            ended = self._discard()
            if not self._closed:
                self._child = self._start()
            return ended


class _Child:
    """One process and its pipes. Every wait has a deadline: TimeoutError then, EOFError when the process has gone."""

    def __init__(self, module: str, threads: int, device: str) -> None:
        environment = {
            **with_package(os.environ),
            # Read when the libraries load; Ray sets the first to the actor's number of CPUs.
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        self._process = subprocess.Popen(
            module_command(module, "--threads", str(threads), "--device", device, "--owner-pid", str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._input, self._output):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError):  # only faster
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.greeted = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, payload: bytes | bytearray, deadline: float) -> None:
        """Writes a payload's frame."""
        for data in (HEAD.pack(Answer.PAYLOAD, len(payload), 0.0), payload):
            view = memoryview(data)
            while view:
                _wait_for(self._input, select.POLLOUT, deadline)
                try:
                    view = view[os.write(self._input, view) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise EOFError from None

    def receive(self, deadline: float) -> tuple[Answer, float, bytes]:
        """Reads one frame."""
        kind, size, seconds = HEAD.unpack(self._read(HEAD.size, deadline))
        return Answer(kind), seconds, bytes(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytearray:
        received = bytearray()
        while len(received) < size:
            _wait_for(self._output, select.POLLIN, deadline)
            try:
                part = os.read(self._output, min(size - len(received), _PIPE_BYTES))
            except BlockingIOError:
                continue
            if not part:
                raise EOFError
            received += part
        return received

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Kills it, reaps it, and says how it ended."""
        ended = self._process.poll()
        if ended is None:
            # Its pipe may close an instant before it can be reaped.
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self._process.wait(0.2)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if ended is None:
            return "was killed by its owner"
        return f"was killed by signal {-ended}" if ended < 0 else f"ended with exit status {ended}"


def _wait_for(descriptor: int, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(descriptor, event)
    if not poller.poll(max(deadline - time.monotonic(), 0.0) * 1000):
        raise TimeoutError

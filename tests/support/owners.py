"""Real owners for tests, without Ray: in a thread of this process, or as a process that can be killed and stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import grpc.aio

from kfdist.owner.executor import Execution
from kfdist.owner.inversion_service import InversionServicer, ServiceLimits
from kfdist.owner.owner import Owner, OwnerOptions
from kfdist.rpc._generated.kfdist.v1.inversion_pb2_grpc import add_InversionServiceServicer_to_server
from kfdist.rpc.chunking import digest_of
from kfdist.rpc.servers import bind, make_server
from kfdist.system.credentials import Credentials
from tests.support.faults import act_as
from tests.support.faulty import child


class OwnerProcess:
    """An owner in a process of its own, its inversion process under the test's script of faults."""

    def __init__(self, owner_id: str, *, folder: Path, controller: str) -> None:
        self._options = {
            "owner_id": owner_id,
            "directory": str(folder),
            "controller": controller,
            "child_module": child.__name__,
        }
        self.start()

    def start(self) -> None:
        """Starts it, again if need be, and waits until it listens."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(self._options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **act_as(owner=self._options["owner_id"])},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the owner didn't start"

    def status(self) -> dict[str, Any]:
        """Asks how it stands."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait_until(self, *, queued: int, seconds: float = 20.0) -> None:
        """Waits until so many inversions run or wait there."""
        deadline = time.monotonic() + seconds
        while (seen := self.status()["queue_depth"]) != queued:
            assert time.monotonic() < deadline, f"{seen} inversions instead of {queued}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Echo:
    """An executor that answers with its input, for tests of what travels rather than of what is computed."""

    def run(self, payload: bytes | bytearray, deadline_seconds: float) -> Execution:
        del deadline_seconds
        return Execution(result=bytes(payload), digest=digest_of(payload), seconds=0.0)


async def start_echo(
    credentials: Credentials | None, limits: ServiceLimits | None = None
) -> tuple[grpc.aio.Server, InversionServicer, str]:
    """Starts an owner's server without an inversion process in the running event loop; returns its address, too."""
    server = make_server(credentials)
    servicer = InversionServicer("owner-0", Echo(), limits)  # pyright: ignore[reportArgumentType]
    servicer.set_fingerprint("cpu")
    add_InversionServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0", credentials)
    await server.start()
    return server, servicer, address


def main() -> None:
    server = Owner(OwnerOptions(**json.loads(sys.argv[1])))
    print(server.address, flush=True)
    for _ in sys.stdin:
        print(json.dumps(server.status()), flush=True)
    server.close()


if __name__ == "__main__":
    main()

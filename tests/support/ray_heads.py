"""A Ray cluster of one node with a dashboard, as `ray start --head` makes it, ended with every process."""

import json
import os
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.commands import Command, run

# No token, and `python` is this one, whatever PATH the test has.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head node.

    Attributes:
        command: Its `ray start`, the parent of all its processes.
        dashboard: The dashboard's address.
    """

    command: Command
    dashboard: str

    def kfdist(self, *arguments: str, **options: Any) -> Command:
        """Starts a `kfdist` command beside it."""
        return Command(*arguments, environment=ENVIRONMENT, **options)

    def job(self, *arguments: str, code: int = 0) -> str:
        """Runs `ray job ...` and returns its output."""
        return run(
            *("job", arguments[0], "--address", self.dashboard, *arguments[1:]),
            module="ray.scripts.scripts",
            environment=ENVIRONMENT,
            code=code,
            seconds=400.0,
        )

    def jobs(self, prefix: str) -> list[dict[str, Any]]:
        """Returns the jobs whose submission id begins so, the oldest first."""
        with urllib.request.urlopen(f"{self.dashboard}/api/jobs/", timeout=10) as answer:
            listed = [job for job in json.loads(answer.read()) if (job["submission_id"] or "").startswith(prefix)]
        return sorted(listed, key=lambda job: job["start_time"])


@contextmanager
def ray_head(*, cpus: int, variables: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Starts a head node and yields it once it takes jobs."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _PORTS]
        ports = dict(zip(_PORTS, (each.getsockname()[1] for each in sockets), strict=True))
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need short paths
    options = [text for name, port in ports.items() for text in (f"--{name}", str(port))]
    options += ["--dashboard-host", "127.0.0.1", "--include-dashboard", "true", "--num-cpus", str(cpus)]
    options += ["--temp-dir", directory, "--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
    started = Command(
        *("start", "--head", *options),
        module="ray.scripts.scripts",
        # Ray's own niceness for workers, 15, would leave ranks and owners nothing beside other tests.
        environment={**ENVIRONMENT, "RAY_worker_niceness": "0", **(variables or {})},
    )
    try:
        with started as command:
            head = Head(command=command, dashboard=f"http://127.0.0.1:{ports['dashboard-port']}")
            command.wait_until("it had a node", lambda: _has_node(head.dashboard))
            yield head  # and then ends with SIGKILL: asked politely, it would wait for half a minute
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _has_node(dashboard: str) -> bool:
    try:
        with urllib.request.urlopen(f"{dashboard}/nodes?view=summary", timeout=5) as answer:
            nodes = json.loads(answer.read())["data"]["summary"]
    except (urllib.error.URLError, OSError, KeyError, ValueError):
        return False
    return any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)

"""A controller and owners as processes of this machine, without Ray, for measurements."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from kfdist.errors import EnvironmentFault
from kfdist.runtime.invert.service import Service, connect
from kfdist.system.lifetime import PARENT_VARIABLE


@dataclass(frozen=True)
class Served:
    """What runs.

    Attributes:
        service: How a preconditioner reaches it.
        controller: Its process id.
        owners: Those of the owners; their inversion processes are their children.
    """

    service: Service
    controller: int
    owners: list[int]


@contextmanager
def served(*, owners: int = 1, threads: int = 1, device: str = "cpu", run: str = "benchmark") -> Iterator[Served]:
    """Starts them; they end with the context, or with this process.

    Args:
        owners: How many.
        threads: CPU threads of an inversion.
        device: Where to invert.
        run: Name of the run at the controller.

    Raises:
        EnvironmentFault: The controller doesn't start.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        places = [f"control.{each}=127.0.0.1:0" for each in ("address", "metrics_address")]
        words = ["serve", "--state", f"{folder}/control.sqlite", "--ready-file", str(ready)]
        words += [word for place in places for word in ("--set", place)]
        log = Path(folder) / "controller.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "kfdist", *words]
            controller = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},  # it ends with this process
            )
        started: list[BaseProcess] = []
        try:
            while not ready.exists():
                if controller.poll() is not None:
                    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    raise EnvironmentFault(f"the controller ended with {controller.returncode}: {''.join(said)}")
                time.sleep(0.05)
            address = json.loads(ready.read_text(encoding="utf-8"))["address"]
            for number in range(owners):
                owner = multiprocessing.get_context("spawn").Process(
                    target=_own, args=(f"owner-{number}", address, device, threads)
                )
                owner.start()
                started.append(owner)
            pids = [owner.pid for owner in started if owner.pid is not None]
            yield Served(connect(address, run=run, device=device), controller.pid, pids)
        finally:
            for owner in started:
                owner.terminate()
                owner.join()
            controller.terminate()
            controller.wait()


def _own(owner_id: str, controller: str, device: str, threads: int) -> None:
    from kfdist.owner.owner import Owner, OwnerOptions

    share = 0.5  # of a GPU that it may share with the rank
    Owner(OwnerOptions(owner_id=owner_id, controller=controller, device=device, gpu_share=share, threads=threads))
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # whoever measures ends this one, or has died

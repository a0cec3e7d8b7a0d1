"""Shows how long a step of a wide layer holds up the host when its statistics leave for an inversion.

    python benchmarks/step_handover.py [WIDTH] [OUT.json]

One `Linear(WIDTH, WIDTH)` under `kfac`, folded and shipped at every step to a link whose thread does what the remote
link's does with a job: it takes the payload and its SHA-256. It answers at once that the inversion failed, so that
nothing else takes time. Measured are the host seconds of `Preconditioner.step()`, of its phase "invert" (where the job
leaves), and how long the link's thread works on a job. Writes benchmarks/results/step_handover.json unless told
otherwise; a file that is there keeps its other entries, so that two commits can stand beside each other.
"""

import json
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

import kfdist
from kfdist.curvature.jobs import failure_result
from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.types import InForce, Job, JobResult, MetricSample, RunSettings

RESULT = Path(__file__).parent / "results" / "step_handover.json"
STEPS, WARM = 24, 4
EXAMPLES = 32


class FailingLink(AbstractLink):
    """Takes each job's payload and digest in a thread of its own, and answers that its inversion failed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.payload_bytes = 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def _carry(self) -> None:
        while (job := self._jobs.get()) is not None:
            begun = time.perf_counter()
            self.payload_bytes = len(job.payload)
            _ = job.digest
            self.seconds.append(time.perf_counter() - begun)
            payload = failure_result({job.group: "not inverted"})
            self._results.put(
                JobResult(group=job.group, version=job.version, payload=payload, seconds=0.0, owner="benchmark")
            )

    @override
    def start(self, context: LinkContext) -> None:
        del context
        self._thread.start()

    @override
    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    @override
    def poll(self) -> list[JobResult]:
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    @override
    def wait(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.001))

    @override
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        del step, phase, samples

    @override
    def report(self, in_force: InForce) -> None:
        del in_force

    @override
    def settings(self) -> RunSettings:
        return RunSettings()

    @override
    def counters(self) -> LinkCounters:
        return LinkCounters()

    @override
    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def measure(width: int) -> dict[str, Any]:
    """Trains a few steps and returns what they took."""
    torch.manual_seed(0)
    model, link = nn.Sequential(nn.Linear(width, width)), FailingLink()
    steps, invert = [], []
    with kfdist.Preconditioner(
        model, "kfac", factor_period=1, inverse_period=1, kl_clip=None, skip=(), link=link
    ) as preconditioner:
        for _ in range(STEPS):
            model(torch.randn(EXAMPLES, width)).square().mean().backward()
            begun = time.perf_counter()
            report = preconditioner.step()
            steps.append(time.perf_counter() - begun)
            invert.append(report.phase_seconds["invert"])
            model.zero_grad()
            while len(link.seconds) < len(steps):  # each job meets an idle thread
                time.sleep(0.001)
    return {
        "width": width,
        "payload_bytes": link.payload_bytes,
        "step_seconds": spread(steps[WARM:]),
        "invert_seconds": spread(invert[WARM:]),
        "link_thread_seconds": spread(link.seconds[WARM:]),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median and the extremes."""
    return {
        "median": round(statistics.median(seconds), 5),
        "least": round(min(seconds), 5),
        "most": round(max(seconds), 5),
    }


def conditions() -> dict[str, Any]:
    """Says what the figures depend on."""
    tree = Path(kfdist.__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    cpus = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "commit": commit,
        "cpu": cpus[0].strip() if cpus else platform.processor(),
        "cores": len(cpus),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": STEPS - WARM,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measures and writes."""
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULT
    entry = {**conditions(), **measure(width)}
    entries = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*entries, entry], indent=2) + "\n")
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()

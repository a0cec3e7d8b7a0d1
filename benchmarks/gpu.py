"""Measures on a CUDA device what a step of kfdist costs beside SGD's, and how long each method's inversions take.

    python -m benchmarks.gpu [--seconds 180] [--out benchmarks/results/gpu.json]

ResNet-50 on synthetic images, 256 a step, under bfloat16 autocast with channels last, as the recipe imagenet-resnet50
has it; inverses by an owner on CPUs, then by one on the same GPU. `--tiny` runs the same code on a CPU in seconds.

The file is written after each part, so that nothing is lost where time runs out. A part that fails is told, and the
others go on, as long as the device answers; the exit code is then 1.
"""

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.bench.served import served
from kfdist.config import load_config
from kfdist.curvature.inverters import INVERTERS
from kfdist.errors import ConfigError
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from kfdist.models import build_model
from kfdist.system.files import replace_file
from kfdist.system.provenance import processor_field, versions
from kfdist.training.method import plan_of
from kfdist.types import JobResult

RESULT = Path(__file__).parent / "results" / "gpu.json"
RECIPE = "imagenet-resnet50"
WARM = 5


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a model on one batch of random images, over and over.

    Attributes:
        device: Where.
        tiny: Whether it only shows that the benchmark works.
    """

    device: torch.device
    tiny: bool

    @property
    def batch_size(self) -> int:
        """How many examples a step has."""
        return 8 if self.tiny else 256

    def make(self) -> nn.Module:
        """Makes the model, always the same."""
        if self.tiny:
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            model: nn.Module = nn.Sequential(*layers, nn.Linear(32, 10))
        else:
            settings = {"architecture": "resnet50", "arguments": {"zero_init_residual": True}}
            model = build_model("torchvision", settings, example_shape=(3, 224, 224), classes=1000, seed=0)
        return model.to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def batch(self, examples: int) -> tuple[Tensor, Tensor]:
        """Makes random images and labels on the device."""
        side, classes = (16, 10) if self.tiny else (224, 1000)
        x = torch.randn(examples, 3, side, side, device=self.device)
        return x.contiguous(memory_format=torch.channels_last), torch.arange(examples, device=self.device) % classes

    def train(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Does a forward and a backward in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()

    def finish(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Clock:
    """When each step was done, by events of the device, or by the host's clock where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Notes the end of a step, and waits for nothing."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Returns how long each step took; the device must be done."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) for before, after in pairs]
        return [1e3 * (after - before) for before, after in pairs]


def steps(task: Task, seconds: float, preconditioner_of: Any) -> dict[str, Any]:
    """Trains for some seconds and returns how long steps took, and the most memory.

    Args:
        task: What is trained.
        seconds: How long.
        preconditioner_of: Makes a model's preconditioner; None for SGD alone.
    """
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, batch = task.make(), task.batch(task.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5)
    pre = None if preconditioner_of is None else preconditioner_of(model)

    def step() -> None:
        optimizer.zero_grad()
        task.train(model, batch)
        if pre is not None:
            pre.step()
        optimizer.step()

    with nullcontext() if pre is None else pre:  # which ends its processes where a step fails, too
        found = timed(task, seconds, step)
        if pre is not None:
            totals = pre.counters()
            found |= {"largest_staleness": max(pre.staleness().values()), "adoptions": totals["adoptions"]}
    return found


def timed(task: Task, seconds: float, step: Callable[[], None]) -> dict[str, Any]:
    """Makes steps for some seconds; returns how long they took, and the most memory."""
    begun = time.perf_counter()
    step()  # with kfdist, this waits for the first inverses
    task.finish()
    first = time.perf_counter() - begun
    for _ in range(WARM):
        step()
    clock, ends, host = Clock(task.device), time.perf_counter() + seconds, []
    clock.mark()
    while not host or time.perf_counter() < ends:
        before = time.perf_counter()
        step()
        clock.mark()
        host.append(1e3 * (time.perf_counter() - before))
        if len(host) % 20 == 0:
            task.finish()  # else the host would be far ahead when the time is over
    task.finish()
    took = sorted(clock.milliseconds())
    found: dict[str, Any] = {
        "steps": len(took),
        "first_step_seconds": round(first, 3),
        "mean_ms": round(statistics.fmean(took), 3),
        "p50_ms": round(took[len(took) // 2], 3),
        "p99_ms": round(took[min(len(took) - 1, int(0.99 * len(took)))], 3),
        "host_p50_ms": round(statistics.median(host), 3),
        "images_per_second": round(1e3 * task.batch_size / statistics.fmean(took), 1),
    }
    if task.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


class Recording(LocalLink):
    """A local link that keeps how long inversions took."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.seconds: list[float] = []

    def poll(self) -> list[JobResult]:
        """Returns the finished inversions, and notes their seconds."""
        results = super().poll()
        self.seconds += [result.seconds for result in results]
        return results


def inversions(task: Task, method: str, device: str) -> dict[str, Any]:
    """Inverts a model's factors twice with a method; returns how long the second time took."""
    model, batch, link = task.make(), task.batch(min(32, task.batch_size)), Recording(device)
    settings = {"factor_period": 1, "inverse_period": 1, "lr": 0.0, "adoption": kfdist.FixedLag(0), "link": link}
    try:
        pre = kfdist.Preconditioner(model, method, **settings)
    except ConfigError as error:
        return {"refused": str(error)}
    with pre:
        report = None
        for _ in range(2):
            link.seconds.clear()
            model.zero_grad()
            task.train(model, batch)
            task.finish()
            begun = time.perf_counter()
            report = pre.step()
            task.finish()
            whole = time.perf_counter() - begun
    assert report is not None
    return {
        "jobs": len(link.seconds),
        "seconds": round(sum(link.seconds), 4),
        "largest_seconds": round(max(link.seconds, default=0.0), 4),
        "step_seconds": round(whole, 4),
    }


@dataclass
class Report:
    """What was measured so far, as the file has it.

    Attributes:
        path: The file.
        device: Where it is measured.
        facts: What is told beside the measurements.
        parts: The measurements, by kind and name.
        lost: Why nothing more can be measured; empty while the device answers.
    """

    path: Path
    device: torch.device
    facts: Mapping[str, Any]
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: {"steps": {}, "inversions": {}})
    lost: str = ""

    def add(self, kind: str, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measures a part, and writes the file; what goes wrong is what it says of this part."""
        found: dict[str, Any] = {"failed": self.lost}
        if not self.lost:
            try:
                found = measured()
            except Exception as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
            self.lost = self._left_over()
        self.parts[kind][name] = found
        print(f"{kind}, {name}: {found}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file anew."""
        text = json.dumps({**self.facts, **self.parts}, indent=2) + "\n"
        replace_file(self.path, text.encode())

    @property
    def failures(self) -> list[str]:
        """The parts that failed."""
        return [f"{kind}, {name}" for kind, found in self.parts.items() for name in found if "failed" in found[name]]

    def _left_over(self) -> str:
        """Frees what the last part held; says whether the device, after an error of its own, no longer answers."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                return f"the device doesn't answer any more: {error}"
        return ""


def measure(task: Task, seconds: float, report: Report) -> None:
    """Measures all within a budget: about half for steps, the rest for inversions, cheap methods first."""
    ends = time.perf_counter() + seconds
    config = load_config(Path(RECIPE), environment={})
    threads = config.cluster.threads
    torch.set_num_threads(threads)

    def preconditioner(link: kfdist.Service | AbstractLink) -> Any:
        def make(model: nn.Module) -> kfdist.Preconditioner:
            plan = plan_of(config, model, world_size=1, costs=None)
            return kfdist.Preconditioner.from_plan(replace(plan, settings=replace(plan.settings, lr=0.1)), link=link)

        return make

    def with_owner(device: str) -> dict[str, Any]:
        with served(threads=threads, device=device) as running:
            return steps(task, share, preconditioner(running.service))

    share = seconds / 8
    report.add("steps", "sgd", lambda: steps(task, share / 2, None))
    if task.tiny:
        report.add("steps", "kfdist, local", lambda: steps(task, share, preconditioner(LocalLink())))
    else:
        for device in ("cpu", task.device.type):
            report.add("steps", f"kfdist, owner on {device}", partial(with_owner, device))
    cheap = ["rs-kfac", "sre-kfac", "kfac", "seng", "eva", "cg-fac", "ekfac", "b-kfac", "b-r-kfac", "b-kfac-c"]
    for method in dict.fromkeys([*cheap, *INVERTERS]):
        if time.perf_counter() > ends:
            report.add("inversions", method, lambda: {"skipped": "no time left"})
        else:
            report.add("inversions", method, partial(inversions, task, method, task.device.type))


def hardware(device: torch.device) -> Mapping[str, Any]:
    """Describes what it ran on."""
    found: dict[str, Any] = {"cpu": processor_field("model name"), "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def main(words: list[str] | None = None) -> None:
    """Measures, writes and prints; ends with 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="about how long it may take, the starts beside it")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--tiny", action="store_true", help="a small network on a CPU, to try the benchmark itself")
    given = parser.parse_args(words)
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --tiny tries the benchmark on a CPU")
    device = torch.device("cpu" if given.tiny else "cuda")
    facts = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(path=given.out, device=device, facts=facts)
    measure(Task(device=device, tiny=given.tiny), given.seconds, report)
    if failures := report.failures:
        raise SystemExit("failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
